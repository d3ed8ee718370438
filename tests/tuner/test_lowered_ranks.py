"""Layers with fewer directions than `r`, and layers of zeros: adapted with what they have, or left out, and said."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

from spectune import METHODS, AdapterBank, SpectralConfig, SpectuneError, export_lora, fuse, merge_checkpoint
from spectune.adapter import spectral_modules
from spectune.algebra import dense

from ..models import MODELS, output
from .conftest import train

LLAMA = MODELS["llama"]
WITH_R = [name for name, method in METHODS.items() if "r" in method.options()]


class Small(nn.Module):
    """A wide layer, and the usual small ones: a router, a head with one output, a 1x5 convolution, one of zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.router, self.head = nn.Linear(16, 16), nn.Linear(16, 4), nn.Linear(16, 1)
        self.conv, self.zero = nn.Conv1d(1, 1, 5, padding=2), nn.Linear(16, 16)
        nn.init.zeros_(self.zero.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.conv(torch.relu(self.wide(x))[:, None])[:, 0]
        return self.router(x) + self.head(x) + self.zero(x).sum(-1, keepdim=True)


LAYERS = ["wide", "router", "head", "conv", "zero"]
# r = 8 for the wide layer, then what the others have; None is left out. specadapt's shared core is r x r everywhere.
USUAL = (8, 4, 1, 1, 8)
LOWERED: dict[str, tuple[int | None, ...]] = {
    "spectral_a": (8, 4, 1, 1, None),
    "spectral_r": (8, 4, None, None, None),
    "orthogonal_adaptation": (8, 8, 8, 5, 8),
}
OPTIONS: dict[str, dict[str, Any]] = {"specadapt": {"shared_core": False}}


def small() -> nn.Module:
    torch.manual_seed(0)
    return Small().eval()


def ranks(model: nn.Module) -> dict[str, int]:
    return {path.rpartition(".")[2]: module.method.r for path, _, module in spectral_modules(model)}  # type: ignore[attr-defined]


@pytest.mark.parametrize("method", WITH_R)
def test_r_is_lowered_to_what_a_layer_has_and_zeros_are_left_out_each_in_one_line(method: str, tmp_path: Path) -> None:
    config = SpectralConfig(method=method, r=8, target_modules=LAYERS, **OPTIONS.get(method, {}))
    base, x = small(), torch.randn(3, 16)
    expected = {name: r for name, r in zip(LAYERS, LOWERED.get(method, USUAL), strict=True) if r is not None}
    with pytest.warns(UserWarning, match="lowered|left out") as said:
        model = get_peft_model(base, config)
    assert ranks(model) == expected
    lines = [str(warning.message) for warning in said]
    lowered = [line for line in lines if line.startswith("r=8 is more than some weights have and was lowered")]
    assert len(lowered) == 1 and all(name in lowered[0] for name, r in expected.items() if r < 8)
    left = [line for line in lines if line.startswith("left out of the adapter")]
    assert len(left) == (len(expected) < 5) and len(lines) == len(lowered) + len(left)
    assert not left or all((name in left[0]) == (name not in expected) for name in LAYERS)

    train(model)
    model.eval()
    tuned = output(model, {"x": x})
    model.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = PeftModel.from_pretrained(small(), tmp_path)
    assert ranks(again) == expected
    torch.testing.assert_close(output(again, {"x": x}), tuned, rtol=0, atol=1e-5)
    torch.testing.assert_close(output(again.merge_and_unload(), {"x": x}), tuned, rtol=0, atol=1e-5)


def test_a_larger_basis_rank_is_lowered_in_one_line_and_the_usual_one_in_silence() -> None:
    with pytest.warns(UserWarning, match=r"^basis_rank=9 is more .* to 4 in router; to 1 in head\.$") as said:
        get_peft_model(small(), SpectralConfig(method="svft", basis_rank=9, target_modules=LAYERS[:3]))
    assert len(said) == 1
    get_peft_model(small(), SpectralConfig(method="specadapt", r=2, target_modules=LAYERS[:2]))


@pytest.mark.parametrize("method", ["spectral_a", "spectral_r", "svdiff"])
def test_a_model_whose_targets_are_all_zero_is_refused_and_left_alone(method: str) -> None:
    base = small()
    with pytest.raises(SpectuneError, match=r"^zero: all .*singular values .*zero.* Exclude the layer or use"):
        get_peft_model(base, SpectralConfig(method=method, target_modules=["zero"]))
    assert type(base.zero) is nn.Linear


def test_columns_that_a_layer_has_not_are_left_out_there() -> None:
    with pytest.warns(UserWarning, match="r=3 is more .* to 2 in router"):
        model = get_peft_model(small(), SpectralConfig(r=3, columns=[0, 9, 3], target_modules=["wide", "router"]))
    found = {path.rpartition(".")[2]: module.columns for path, _, module in spectral_modules(model)}
    assert found == {"wide": (0, 9, 3), "router": (0, 3)}
    with pytest.warns(UserWarning, match=r"left out of the adapter: router \(too few directions for spectral_a\)"):
        get_peft_model(small(), SpectralConfig(r=3, columns=6, target_modules=["wide", "router"]))
    base = small()
    with pytest.raises(SpectuneError, match=r"columns=\[0, 99\]: no targeted weight has all"):
        get_peft_model(base, SpectralConfig(r=2, columns=[0, 99], target_modules=["wide", "router"]))
    assert type(base.wide) is nn.Linear


def test_other_concepts_do_not_take_the_rows_of_the_first() -> None:
    config = SpectralConfig(method="orthogonal_adaptation", r=12, concept=1, target_modules=["wide"])
    with pytest.raises(SpectuneError, match="wide: concept 1 at r=12 needs 24 rows"):
        get_peft_model(small(), config)


def grouped(folder: Path, name: str, seed: int, **options: Any) -> PeftModel:
    """Save an adapter with r = 20 on q_proj (32x32) and k_proj (16x32), and get the model."""
    config = SpectralConfig(**{"r": 20, "target_modules": ["q_proj", "k_proj"], "task_type": "CAUSAL_LM", **options})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT's use of transformers, which `warns` says again
        with pytest.warns(UserWarning, match=r"r=\d+ is more than some weights have .* to \d+ in .*k_proj"):
            model = get_peft_model(LLAMA.fresh(), config)
    train(model, seed=seed)
    model.eval().save_pretrained(folder / name)
    return model


@pytest.mark.parametrize("method", ["spectral_a", "spectral_r"])
def test_lowered_ranks_are_exported_and_merged(method: str, tmp_path: Path) -> None:
    LLAMA.fresh().save_pretrained(tmp_path / "base")
    tuned = output(grouped(tmp_path, "adapter", 1, method=method), LLAMA.inputs())
    export = export_lora(tmp_path / "adapter", tmp_path / "lora", base_model=tmp_path / "base")
    assert set(export.exact_ranks.values()) == ({32, 16} if method == "spectral_a" else {20, 16})
    served = PeftModel.from_pretrained(LLAMA.fresh(), tmp_path / "lora")
    torch.testing.assert_close(output(served, LLAMA.inputs()), tuned, rtol=0, atol=1e-4)
    merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    merged = type(LLAMA.fresh()).from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(output(merged, LLAMA.inputs()), tuned, rtol=0, atol=1e-4)


def test_lowered_ranks_are_resident_in_a_bank(tmp_path: Path) -> None:
    tuned = [output(grouped(tmp_path, f"{seed}", seed, method="spectral_r"), LLAMA.inputs()) for seed in (1, 2)]
    model = PeftModel.from_pretrained(LLAMA.fresh(), tmp_path / "1").eval()
    bank = AdapterBank(model)
    for name in ("1", "2"):
        bank.load(name, tmp_path / name)
    with bank(["1", "2", "1"]):
        rows = output(model, LLAMA.inputs())
    torch.testing.assert_close(rows[0], tuned[0][0], rtol=0, atol=1e-4)
    torch.testing.assert_close(rows[1], tuned[1][1], rtol=0, atol=1e-4)


def test_lowered_ranks_are_fused_and_the_result_is_read_again(tmp_path: Path) -> None:
    LLAMA.fresh().save_pretrained(tmp_path / "base")
    grouped(tmp_path, "a", 1, r=6, columns=[0, 1, 2, 3, 20, 21])
    grouped(tmp_path, "b", 2, r=4, columns=[8, 9, 10, 24])
    parts = [tmp_path / "a", tmp_path / "b"]
    fused = fuse(parts, weights=1, base=tmp_path / "base")
    fused.save(tmp_path / "fused")
    read = PeftModel.from_pretrained(LLAMA.fresh(), tmp_path / "fused")
    widths = {path.rpartition(".")[2]: module.method.r for path, _, module in spectral_modules(read)}  # type: ignore[attr-defined]
    assert widths == {"q_proj": 10, "k_proj": 7}
    alone = [PeftModel.from_pretrained(LLAMA.fresh(), part) for part in parts]
    for path, _, module in spectral_modules(read):
        wanted = sum(model.get_submodule(path).get_delta_weight("default") for model in alone)
        torch.testing.assert_close(dense(module.delta()), wanted, rtol=0, atol=1e-5)
