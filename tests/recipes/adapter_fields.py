"""Where every option under `adapter:` is seen at work: spectune's own, and that PEFT's reach the attached config."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import yaml

from spectune.adapter import spectral_modules
from spectune.training.yaml_file import put
from tests.recipes.every_field import Different, Entries, Run, Told
from tests.recipes.short_trainings import step


def layers(run: Run) -> list[str]:
    return sorted({path.removeprefix("base_model.model.bert.encoder.") for path, _, _ in spectral_modules(run.model)})


def first(run: Run) -> Any:
    return next(module for _, _, module in spectral_modules(run.model))


def shapes(run: Run) -> dict[str, tuple[int, ...]]:
    return {name: tuple(p.shape) for name, p in first(run).named_parameters()}


def values(run: Run) -> Any:
    return first(run).S_R.tolist()


def update(run: Run) -> Any:
    """The first layer's update from random numbers."""
    return first(run).delta().left_OP.flatten()[:6].tolist()


def disturbed(run: Run) -> Any:
    """The first layer's update as one forward of the training sees it."""
    return first(run).train().training_delta().left_OP.flatten().tolist()


def frozen(run: Run) -> Any:
    return {name: value.tolist() for name, value in first(run).frozen.items()}


def trained_elsewhere(run: Run) -> set[str]:
    """What is trained besides the adapter, by the end of its name."""
    named = [name for name, p in run.model.named_parameters() if p.requires_grad and ".spectune_" not in name]
    return {".".join(name.replace(".modules_to_save.default", "").split(".")[-2:]) for name in named}


def outcome(run: Run) -> str:
    """Whether the adapter is attached, or refused in a sentence that names the option."""
    try:
        return type(run.model).__name__
    except ValueError as error:
        return f"refused: {error}"


def refusal(words: str) -> Callable[[Run], Any]:
    """Get the outcome as wanted when these words are in it."""

    def wanted(run: Run) -> str:
        found = outcome(run)
        assert found.startswith("refused") and words in found, found
        return found

    return wanted


def asked(run: Run, name: str) -> Any:
    """What the engine was asked for while the adapter was attached; `obtain` is watched by the test."""
    run.model  # noqa: B018
    return run.seen[name]


def other(method: str, **options: Any) -> tuple[str, ...]:
    """Get the word that puts another method in place of the run's adapter."""
    targets = options.pop("target_modules", ["query"])
    told = {"method": method, "target_modules": targets, **options}
    return (f"adapter={yaml.safe_dump(told, default_flow_style=True, width=10_000).strip()}",)


LOFTQ = "adapter.init_lora_weights=loftq"
BANDED = other("svft", pattern="banded", basis_rank=8)
RANDOM = ("adapter.init_weights=false",)
SPECTRAL: Entries = {
    "method": Told("adapter.method=spectral_r", shapes, Different),
    "r": Told("adapter.r=3", shapes, {"A_U": (32, 3), "A_Vh": (3, 32)}),
    "columns": Told("adapter.columns=bottom", values, Different),
    "train_singular_values": Told(
        "adapter.train_singular_values=true", shapes, Different, given=other("spectral_r", r=4)
    ),
    "basis_rank": Told("adapter.basis_rank=5", shapes, {"M": (5,)}, given=other("svft")),
    "pattern": Told("adapter.pattern=banded", shapes, {"M": (154,)}, given=other("svft")),  # 32 * 5 - 2 * 3
    "off_diagonals": Told("adapter.off_diagonals=1", shapes, {"M": (22,)}, given=BANDED),  # 8 * 3 - 2
    "pattern_seed": Told("adapter.pattern_seed=3", frozen, Different, given=other("svft", pattern="random")),
    "full_basis": Told(
        "adapter.full_basis=true", shapes, {"M": (32 + 31 + 32,)},  # lines of 48 x 32
        given=other("svft", pattern="banded", off_diagonals=1, target_modules=["intermediate.dense"]),
    ),
    "gate": Told("adapter.gate=true", shapes, {"M": (32,), "gate": (1,)}, given=other("svft")),
    "shared_core": Told(
        "adapter.shared_core=false",
        lambda run: sum(name.endswith("default.H") for name, _ in run.model.named_parameters()), 2,
        given=other("specadapt", r=2),
    ),
    "weight_dropout": Told(
        "adapter.weight_dropout=0.5", lambda run: disturbed(run) == disturbed(run), False,
        given=other("specadapt", r=2, init_weights=False),
    ),
    "output_width": Told("adapter.output_width=5", shapes, Different, given=other("lidb", r=2)),
    "input_width": Told("adapter.input_width=5", shapes, Different, given=other("lidb", r=2)),
    "concept": Told("adapter.concept=1", frozen, Different, given=other("orthogonal_adaptation", r=2)),
    "basis_seed": Told("adapter.basis_seed=1", frozen, Different, given=other("orthogonal_adaptation", r=2)),
    "singular_decay": Told("adapter.singular_decay=0.5", lambda run: step(run).moved, Different, given=RANDOM),
    "grad_norm": Told(
        "adapter.grad_norm=rms", lambda run: step(run).moved, Different, given=("training.max_grad_norm=0",)
    ),
    "svd.solver": Told("adapter.svd.solver=exact", lambda run: first(run).quality.solver, "exact"),
    "svd.tolerance": Told("adapter.svd.tolerance=1e-3", lambda run: asked(run, "tolerance"), 1e-3),
    "svd.seed": Told("adapter.svd.seed=3", values, Different, given=("adapter.columns=random",)),
    "svd.cache_dir": Told(
        "adapter.svd.cache_dir={here}/bases",
        lambda run: outcome(run) and len(list(run.file.parent.glob("bases/*/*.safetensors"))) * bool(run.words), 4,
    ),
    "svd.share": Told("adapter.svd.share=false", lambda run: asked(run, "share"), False),
    "save_basis": Told("adapter.save_basis=always", lambda run: "U_OR" in first(run).state_dict(), True),
    "target_modules": Told(
        "adapter.target_modules=[pooler.dense]", layers, ["base_model.model.bert.pooler.dense"]
    ),
    "exclude_modules": Told(
        "adapter.exclude_modules=[query]", layers, [f"layer.{i}.attention.self.value" for i in (0, 1)]
    ),
    "layers_to_transform": Told(
        "adapter.layers_to_transform=[1]", layers, [f"layer.1.attention.self.{n}" for n in ("query", "value")]
    ),
    "layers_pattern": Told(
        "adapter.layers_pattern=[blocks]", outcome, refusal("layers_pattern"),
        given=("adapter.layers_to_transform=[1]",),
    ),
    "rank_pattern": Told("adapter.rank_pattern={query: 3}", shapes, {"A_U": (32, 3), "A_Vh": (3, 32)}),
    "modules_to_save": Told(
        "adapter.modules_to_save=[LayerNorm]", trained_elsewhere,
        {f"{module}.{kind}" for module in ("LayerNorm", "classifier") for kind in ("weight", "bias")},
    ),
    "bias": Told("adapter.bias=spectune_only", trained_elsewhere, Different),
    "init_weights": Told("adapter.init_weights=false", update, Different),
    "format_version": Told("adapter.format_version=99", outcome, refusal("format")),
    "task_type": Told("adapter.task_type=TOKEN_CLS", outcome, "PeftModelForTokenClassification"),
    "peft_type": Told("adapter.peft_type=LORA", outcome, refusal("peft_type")),
    "auto_mapping": Told("adapter.auto_mapping={a: b}", lambda run: run.adapter.auto_mapping, {"a": "b"}),
    "peft_version": Told("adapter.peft_version=9.9.9", lambda run: run.adapter.peft_version, "9.9.9"),
    "base_model_name_or_path": Told("adapter.base_model_name_or_path=x", outcome, refusal("base_model_name_or_path")),
    "revision": Told("adapter.revision=other", lambda run: run.adapter.revision, "other"),
    "inference_mode": Told("adapter.inference_mode=true", outcome, refusal("leaves nothing to train")),
}  # fmt: skip

# What PEFT's methods take, and a value that is not the default; further words where it is refused alone.
BASE = {
    "task_type": ("TOKEN_CLS",), "auto_mapping": ("{a: b}",), "peft_version": ("9.9.9",), "revision": ("other",),
    "target_modules": ("[value, dense]",),
}  # fmt: skip
SOME = BASE | {"modules_to_save": ("[pooler]",), "exclude_modules": ("[layer.0.attention.self.query]",)}
LAYERS = {
    "layers_to_transform": ("[1]",), "layers_pattern": ("[layer]", "adapter.layers_to_transform=[1]"), "bias": ("all",)
}  # fmt: skip
PATTERNS = {"rank_pattern": ("{query: 3}",), "alpha_pattern": ("{query: 3}",)}
IN_LORA = SOME | LAYERS | {
    "r": ("3",), "lora_alpha": ("5",), "lora_dropout": ("0.25",), "use_rslora": ("true",),
    "init_lora_weights": ("pissa",), "megatron_core": ("elsewhere",),
    "loftq_config": ("{loftq_bits: 8, loftq_iter: 1}", LOFTQ),
    "trainable_token_indices": ("{word_embeddings: [1]}",), "use_dora": ("true",),
    "velora_config": ("{num_groups: 2}",), "alora_invocation_tokens": ("[1, 2]",), "use_qalora": ("true",),
    "qalora_group_size": ("8",), "monteclora_config": ("{num_samples: 3}",), "layer_replication": ("[[0, 2]]",),
    "runtime_config": ("{ephemeral_gpu_offload: true}",), "lora_bias": ("true",),
    "target_parameters": ("[dense.weight]",), "use_bdlora": ("{nblocks: 2, match_strict: false}",),
    "kasa_config": ("{beta: 0.5}",), "ensure_weight_tying": ("true",),
} | PATTERNS  # fmt: skip
FOREIGN: dict[str, tuple[str, dict[str, tuple[str, ...]]]] = {
    "LORA": ("", IN_LORA),
    "ADALORA": (
        ", total_step: 9",
        {name: IN_LORA[name] for name in ("lora_alpha", "lora_dropout", *SOME, *LAYERS)} | {
            "target_r": ("3",), "init_r": ("7",), "tinit": ("2",), "tfinal": ("3",), "deltaT": ("4",),
            "beta1": ("0.5",), "beta2": ("0.6",), "orth_reg_weight": ("0.1",), "total_step": ("11",),
        },
    ),
    "IA3": (
        ", feedforward_modules: []",
        SOME | {"feedforward_modules": ("[query]",), "init_ia3_weights": ("false",)},
    ),
    "VERA": (
        ", r: 4",
        BASE | LAYERS | {
            "r": ("3",), "projection_prng_key": ("5",), "save_projection": ("false",), "vera_dropout": ("0.25",),
            "d_initial": ("0.2",), "init_weights": ("false",), "modules_to_save": ("[pooler]",),
            "target_modules": ("[value]",),
        },
    ),
    "OFT": (
        ", oft_block_size: 8",
        SOME | LAYERS | {
            "r": ("4", "adapter.oft_block_size=0"), "oft_block_size": ("4",), "module_dropout": ("0.25",),
            "init_weights": ("false",), "coft": ("true",), "eps": ("1e-3",), "block_share": ("true",),
            "use_cayley_neumann": ("false",), "num_cayley_neumann_terms": ("7",),
        },
    ),
    "LOKR": (
        "",
        SOME | PATTERNS | {name: LAYERS[name] for name in ("layers_to_transform", "layers_pattern")} | {
            "r": ("3",), "alpha": ("5",), "rank_dropout": ("0.25",), "module_dropout": ("0.25",),
            "use_effective_conv2d": ("true",), "decompose_both": ("true",), "decompose_factor": ("4",),
            "rank_dropout_scale": ("true",), "init_weights": ("false",),
        },
    ),
}  # fmt: skip
# What is refused, with words of the refusal.
REFUSED = {
    "base_model_name_or_path": ("x", "filled in from the model"),
    "inference_mode": ("true", "leaves nothing to train"),
    "eva_config": ("{rho: 3.0}", "eva needs a call"),
    "corda_config": ("{verbose: true}", "corda needs a call"),
    "lora_ga_config": ("{scale: gd}", "lora_ga needs a call"),
    "arrow_config": ("{top_k: 2}", "arrow needs a call"),
}
NEEDS_A_GPU = ("loftq_config",)
REFUSED_START = ("eva", "corda", "lora_ga")
# PEFT sets it by the kind of the layer, and warns. The other is for Megatron's layers, which no recipe builds; it and
# what AdaLoRA has from LoRA and does not use are PEFT's to judge.
LEFT_TO_PEFT = {"LORA": {"fan_in_fan_out", "megatron_config"}, "IA3": {"fan_in_fan_out"}, "VERA": {"fan_in_fan_out"}}
LEFT_TO_PEFT |= {
    "OFT": {"fan_in_fan_out"},
    "ADALORA": LEFT_TO_PEFT["LORA"] | (set(IN_LORA) - set(FOREIGN["ADALORA"][1])),
}


def foreign(kind: str, *words: str) -> tuple[str, ...]:
    """Get the words of a run with one of PEFT's methods."""
    return (f"adapter={{peft_type: {kind}, target_modules: [query]{FOREIGN[kind][0]}}}", *words)


def plain(value: Any) -> Any:
    """Get an option of an attached config as YAML would hold it."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    return sorted(value) if isinstance(value, (set, list)) and all(isinstance(v, str) for v in value) else value


def arrived(config: Any, name: str, text: str) -> bool:
    """Ask whether an attached config holds what a word said."""
    told: dict[str, Any] = {}
    put(told, f"value={text}")
    found, wanted = plain(getattr(config, name)), plain(told["value"])
    if isinstance(wanted, dict):
        return found is not None and bool(wanted.items() <= found.items())
    # The recipe adds its own head to what is saved.
    return set(wanted) <= set(found or []) if name == "modules_to_save" else bool(found == wanted)
