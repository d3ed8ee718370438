"""The full size of each experiment runs the papers' hyperparameters, as written here from the papers and their code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from spectune.papers import experiment_names, load_experiment, prepare
from spectune.sweeps.config import SweepConfig, cell
from spectune.tuner import build_adapter_config

GLUE = ("mnli", "sst2", "mrpc", "cola", "qnli", "qqp", "rte", "stsb")
FULL = [name for name in experiment_names() if load_experiment(name).full is not None]


def sweep_of(name: str, folder: Path, **more: Any) -> SweepConfig:
    return prepare(load_experiment(name), folder, small=False, data=folder, **more).sweep


# experiment -> (source, what every run has, method -> (rate, options of the adapter))
SPECTRAL = "pilancilab/spectral_adapter @3c18280"
SVFT = "arXiv 2405.19597, VijayLingam95/SVFT @8303115"
LLAMA_KINDS = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj", "gate_proj"]
SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj", "gate_proj"]
FOUR = ["up_proj", "down_proj", "o_proj", "gate_proj"]
PYTHIA = ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"]
LORA_8 = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "lora_dropout": 0.05}
MATH = {
    "epochs": 2, "batch_size": 4, "gradient_accumulation": 16, "warmup": 0.1, "schedule": "cosine", "weight_decay": 0.0,
    "precision": "bfloat16",
}  # fmt: skip
VISION = {
    "epochs": 10, "batch_size": 64, "weight_decay": 0.01, "warmup": 0.1, "schedule": "linear",
    "head_learning_rate": 4e-3,
}  # fmt: skip
VASE = {"steps": 1500, "batch_size": 2, "weight_decay": 0.01, "warmup": 0.0, "precision": "float16"}
COMMON = {"epochs": 3, "batch_size": 4, "gradient_accumulation": 16, "warmup": 100, "schedule": "linear"}


def svft(pattern: str, d: int | None = None, kinds: list[str] | str | None = None, **more: Any) -> dict[str, Any]:
    found: dict[str, Any] = {"method": "svft", "pattern": pattern, "gate": True, **more}
    return found | ({} if d is None else {"off_diagonals": d}) | ({} if kinds is None else {"target_modules": kinds})


TABLE: dict[str, tuple[str, dict[str, Any], dict[str, tuple[float, dict[str, Any]]]]] = {
    "gsm8k-mistral": (
        f"{SPECTRAL} mistral_tune/spectral_lora_tune/mistral_tune.py",
        {"epochs": 2, "batch_size": 4, "weight_decay": 0.01, "warmup": 0.0, "schedule": "linear"},
        {
            "lora": (2.5e-5, LORA_8 | {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj"]}),
            "dora": (2.5e-5, LORA_8 | {"use_dora": True}),
            "spectral_a": (2.5e-5, {"r": 8}),
        },
    ),
    "orca-llama3": (
        f"{SPECTRAL} llama3_tune/llama_tune.py",
        {"epochs": 1, "batch_size": 8, "weight_decay": 0.1, "schedule": "constant"},
        {
            "full": (1e-5, {}),
            "lora": (1e-5, LORA_8 | {"target_modules": LLAMA_KINDS}),
            "dora": (1e-5, LORA_8 | {"target_modules": LLAMA_KINDS, "use_dora": True}),
            "spectral_a": (1e-5, {"r": 8, "target_modules": LLAMA_KINDS}),
        },
    ),
    "metamath-gemma": (
        f"{SVFT}: table 12 and MetaMath/run_math.sh",
        MATH,
        {
            "svft_plain": (5e-2, svft("plain", kinds=SEVEN)),
            "svft_random": (1e-3, svft("random", 16, SEVEN)),
            "svft_banded": (5e-3, svft("banded", 16, SEVEN)),
            "svft_top_k": (5e-3, svft("top_k", 16)),
        },
    ),
    "metamath-gemma-7b": (
        f"{SVFT}: table 12",
        MATH,
        {"svft_plain": (5e-2, svft("plain", kinds=SEVEN)), "svft_random": (1e-3, svft("random", 16, SEVEN))},
    ),
    "metamath-llama3": (
        f"{SVFT}: table 12",
        MATH,
        {"svft_plain": (5e-2, svft("plain", kinds=FOUR)), "svft_random": (1e-3, svft("random", 12, FOUR))},
    ),
    "metamath-pythia": (
        f"{SVFT}: MetaMath/run_pythia.sh, the number of off-diagonals from the 5.56M of table 6",
        MATH,
        {"svft_random": (5e-3, svft("random", 8, PYTHIA))},
    ),
    "svft-patterns": (
        f"{SVFT}: table 5, rates as in table 12 and the scripts",
        MATH,
        {
            "svft_plain": (5e-2, svft("plain")),
            "banded_8": (5e-3, svft("banded", 8)),
            "banded_16": (5e-3, svft("banded", 16)),
            "random_8": (1e-3, svft("random", 8)),
            "random_16": (1e-3, svft("random", 16)),
        },
    ),
    "svft-truncation": (
        f"{SVFT}: table 10",
        MATH,
        {
            "r128_d64": (5e-3, svft("banded", 64, SEVEN, basis_rank=128)),
            "r1536_d0": (5e-2, svft("plain", kinds=SEVEN, basis_rank=1536)),
            "r1536_d2": (5e-3, svft("banded", 2, SEVEN, basis_rank=1536)),
            "r2048_d0": (5e-2, svft("plain", kinds=SEVEN)),
        },
    ),
    "commonsense-gemma": (
        f"{SVFT}: table 13 and LLM-Adapters/run_commonsense.sh",
        COMMON,
        {"svft_plain": (5e-2, svft("plain", kinds=SEVEN)), "svft_banded": (5e-3, svft("banded", 16, SEVEN))},
    ),
    "commonsense-gemma-7b": (
        f"{SVFT}: table 13",
        COMMON,
        {"svft_plain": (5e-2, svft("plain", kinds=SEVEN)), "svft_banded": (1e-3, svft("banded", 8, SEVEN))},
    ),
    "vtab-specadapt": (
        "zhangkunzk/SpecAdapt_pytorch @11899bd: code/run.py, code/script/run.sh, torchstocks/optim/peft/svda.py",
        {"epochs": 100, "batch_size": 64, "warmup": 0.05, "schedule": "cosine"},
        {
            "specadapt": (
                3e-3,
                {"basis_rank": 1024, "singular_decay": 0.39, "grad_norm": "rms", "weight_dropout": 0.1},
            ),
            "lora": (1e-3, {"peft_type": "LORA"}),
        },
    ),
    "concept-vase": (
        f"{SPECTRAL} adapter_efficiency/*/experiments/*/vase.yml",
        VASE,
        {
            **{f"lora_{r}": (1e-4, {"r": r, "lora_alpha": r}) for r in (1, 2, 3)},
            **{f"oft_{r}": (1e-4, {"r": r, "block_share": True}) for r in (8, 16, 32, 64)},
            **{f"lidb_{r}": (1e-4, {"method": "lidb", "r": r}) for r in (1, 16, 32)},
            **{f"vera_{r}": (1e-4, {"r": r, "d_initial": 1.0}) for r in (1, 1024, 4096)},
            "svdiff": (1e-4, {"method": "svdiff"}),
            **{
                f"spectral_r_{r}": (rate, {"method": "spectral_r", "r": r, "train_singular_values": True})
                for r, rate in ((2, 1e-2), (8, 5e-2), (24, 1e-2), (32, 5e-2), (40, 1e-2))
            },
        },
    ),
}
# Rates of the text encoder beside the UNet's.
VASE_TEXT = {
    "lora": 1e-5,
    "oft": 1e-5,
    "lidb": 5e-4,
    "svdiff": 1e-3,
    "vera_1": 1e-3,
    "vera_1024": 5e-3,
    "vera_4096": 5e-3,
}
VASE_TEXT |= {f"spectral_r_{r}": rate for r, rate in ((2, 1e-3), (8, 5e-4), (24, 1e-4), (32, 1e-4), (40, 1e-3))}
DATASETS = ("cifar100", "flowers102", "food101", "resisc45")
VISION_RATES: dict[str, dict[str, tuple[float, ...]]] = {  # vision_experiments/run_vit_base.sh, run_vit_large.sh
    "few-shot-vision": {"full": (4e-5, 4e-5, 4e-5, 8e-5), "vera": (2e-2, 5e-2, 4e-2, 7e-2)},
    "few-shot-vision-large": {"full": (4e-5, 4e-5, 4e-5, 4e-5), "vera": (2e-2, 4e-2, 4e-2, 7e-2)},
}
VISION_ONE = {"lora": 4e-3, "dora": 4e-3, "lora_r1": 4e-3, "dora_r1": 4e-3, "boft": 4e-3, "boft_4": 4e-3, "head": 4e-3}
VISION_ONE |= {"svft_plain": 5e-2, "svft_banded_2": 5e-2, "svft_banded_4": 5e-3, "svft_banded_8": 5e-3}
# method -> rates in the order of GLUE; deberta_tune/*/glue_tune.py
GLUE_RATES: dict[str, dict[str, tuple[float, ...]]] = {
    "glue-deberta": {
        "spectral_a": (1e-4, 1e-4, 7e-4, 3e-4, 1e-4, 1e-4, 3e-4, 5e-4),
        "lora": (1e-4, 6e-5, 2e-4, 1e-4, 1e-4, 1e-4, 2e-4, 2e-4),
        "dora": (1e-4, 6e-5, 2e-4, 1e-4, 1e-4, 1e-4, 2e-4, 2e-4),
        "oft": (8e-5, 2e-4, 9e-4, 4e-4, 2e-4, 3e-4, 3e-4, 7e-4),
        "adalora": (5e-4, 8e-4, 1e-3, 5e-4, 1.2e-3, 5e-4, 1.2e-3, 2.2e-3),
    },
    "glue-svft": {"svft_plain": (5e-2, 5e-2, 5e-2, 8e-2, 8e-2, 5e-2, 5e-2, 5e-2)},  # SVFT, table 11
    "glue-svft-random": {"svft_random": (1e-2, 1e-2, 1e-2, 1e-2, 3e-2, 1e-2, 3e-2, 1e-2)},
}
# epochs, batch sizes, longest texts, in the order of GLUE
GLUE_RUNS: dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]] = {
    "glue-deberta": ((1, 5, 13, 8, 1, 10, 10, 30), (32,) * 8, (512,) * 8),
    "glue-svft": (
        (10, 10, 30, 20, 10, 6, 15, 15), (32, 32, 16, 16, 32, 16, 4, 32), (256, 128, 320, 64, 512, 320, 320, 128),
    ),
    "glue-svft-random": (
        (10, 10, 30, 20, 10, 6, 15, 15), (32, 32, 16, 16, 32, 32, 16, 32), (256, 128, 320, 64, 512, 320, 320, 128),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", list(TABLE))
def test_rates_adapters_and_loop_are_the_papers(name: str, tmp_path: Path) -> None:
    _, training, methods = TABLE[name]
    sweep = sweep_of(name, tmp_path)
    for method, (rate, options) in methods.items():
        arm = sweep.methods[method]
        for task in sweep.tasks:
            assert arm.rates(task) == [rate], (method, task)
            asked = cell(sweep, task, method, rate, 0).config.training.model_dump()
            over = arm.over.get("training", {})
            assert {k: asked[k] for k in training} == {**training, **{k: over[k] for k in training if k in over}}
        adapters = [arm.adapter] if name != "concept-vase" else list(arm.adapter.values())  # type: ignore[union-attr]
        for adapter in adapters:
            assert not options or {k: adapter.get(k) for k in options} == options, method  # type: ignore[union-attr]


def test_the_text_encoders_rates_are_those_of_the_official_settings(tmp_path: Path) -> None:
    sweep = sweep_of("concept-vase", tmp_path)
    assert len(sweep.methods) == 19
    for method, arm in sweep.methods.items():
        rate = arm.over["training"]["text_encoder_learning_rate"]
        assert rate == VASE_TEXT.get(method, VASE_TEXT.get(method.split("_")[0])), method


@pytest.mark.parametrize("name", list(VISION_RATES))
def test_vision_rates_are_those_of_the_scripts(name: str, tmp_path: Path) -> None:
    sweep = sweep_of(name, tmp_path)
    assert set(VISION_RATES[name]) | set(VISION_ONE) == set(sweep.methods) and sweep.seeds == [42, 123, 3076]
    for place, task in enumerate(DATASETS):
        for method in sweep.methods:
            rates = VISION_RATES[name].get(method)
            assert sweep.methods[method].rates(task) == [VISION_ONE[method] if rates is None else rates[place]]
            found = cell(sweep, task, method, 4e-3, 42).config
            assert {k: found.training.model_dump()[k] for k in VISION} == VISION
            assert not found.data.augment  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", list(GLUE_RATES))
def test_glue_is_run_task_by_task_as_published(name: str, tmp_path: Path) -> None:
    sweep = sweep_of(name, tmp_path)
    assert set(sweep.methods) == set(GLUE_RATES[name]) and set(sweep.tasks) == set(GLUE)
    for place, task in enumerate(GLUE):
        for method, rates in GLUE_RATES[name].items():
            assert sweep.methods[method].rates(task) == [rates[place]], (task, method)
            found = cell(sweep, task, method, rates[place], 0).config
            epochs, batches, lengths = (column[place] for column in GLUE_RUNS[name])
            assert (found.training.epochs, found.training.batch_size) == (epochs, batches), task
            assert found.data.max_tokens == lengths, task  # type: ignore[attr-defined]
            head = rates[place] if name == "glue-deberta" else 6e-3
            assert found.training.head_learning_rate == head


@pytest.mark.parametrize("name", FULL)
def test_what_has_a_published_rate_is_run_at_one_and_tune_gives_grids(name: str, tmp_path: Path) -> None:
    full = load_experiment(name).full
    assert full is not None
    if full.tuned is None:
        return
    assert not sweep_of(name, tmp_path).chooses
    tuned = prepare(load_experiment(name), tmp_path, small=False, tune=True, data=tmp_path)
    assert all(len(arm.rates(task)) >= 3 for arm in tuned.sweep.methods.values() for task in tuned.sweep.tasks)
    assert any("from its own grid" in sentence for sentence in tuned.published["deviations"])


@pytest.mark.parametrize("name", FULL)
def test_every_adapter_is_one_that_can_be_built(name: str, tmp_path: Path) -> None:
    """PEFT refuses wrong options only when it makes a config, such as a schedule of AdaLoRA without room to prune."""
    for method, arm in sweep_of(name, tmp_path).methods.items():
        adapters = [] if isinstance(arm.adapter, str) else [arm.adapter]
        if name.startswith("concept"):
            adapters = list(adapters[0].values())
        for adapter in adapters:
            assert build_adapter_config(dict(adapter)) is not None, method


def test_vtab_is_learned_without_augmentation_by_one_rate_for_all(tmp_path: Path) -> None:
    """code/dataset.py only resizes; code/run.py has one rate for body and head, script/run.sh decay 0.2 for LoRA."""
    sweep = sweep_of("vtab-specadapt", tmp_path)
    assert len(sweep.tasks) == 19 and sweep.seeds == [42]
    for method, (rate, decay) in {"specadapt": (3e-3, 0.0), "lora": (1e-3, 0.2)}.items():
        found = cell(sweep, "dtd", method, rate, 42).config
        assert not found.data.augment  # type: ignore[attr-defined]
        assert (found.training.head_learning_rate, found.training.weight_decay) == (rate, decay)


def test_specadapts_own_rules_are_on_and_each_is_taken_out_once(tmp_path: Path) -> None:
    sweep = sweep_of("specadapt-ablation", tmp_path)
    whole = sweep.methods["whole"].adapter
    for name, changed in {
        "rank_4": {"r": 4}, "rank_64": {"r": 64}, "no_guided_decay": {"singular_decay": None},
        "no_grad_norm": {"grad_norm": None}, "own_cores": {"shared_core": False},
        "no_dropout": {"weight_dropout": None},
    }.items():  # fmt: skip
        adapter = sweep.methods[name].adapter
        assert {k: v for k, v in {**whole, **changed}.items() if v is not None} == adapter  # type: ignore[dict-item]
