"""A swap happens whole or not at all."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from spectune.adapter import spectral_modules
from spectune.errors import AdapterError
from spectune.tuner import swap_adapter

from ..models import MODELS, output
from .conftest import adapted, config_for, train

LLAMA, BERT = MODELS["llama"], MODELS["bert"]
Change = Callable[[dict[str, torch.Tensor]], None]


def everything(model: nn.Module) -> dict[str, torch.Tensor]:
    """Every number of a model, and those of the bases, which its state dict leaves out."""
    found = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {name: tensor.detach().clone() for name, tensor in found.items()}


def assert_untouched(model: nn.Module, before: dict[str, torch.Tensor]) -> None:
    after = everything(model)
    assert [name for name in before if not torch.equal(before[name], after[name])] == []
    assert after.keys() == before.keys()


def changed(model: PeftModel, folder: Path, change: Change) -> Path:
    """Save an adapter and do something to its tensors."""
    model.save_pretrained(folder)
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "adapter_model.safetensors")
    return folder


def last(tensors: dict[str, torch.Tensor], name: str) -> str:
    return [key for key in tensors if key.endswith(f".spectune_adapter.{name}")][-1]


def foreign(name: str) -> Change:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        key = last(tensors, name)
        tensors[key] = torch.randn(tensors[key].shape, generator=torch.Generator().manual_seed(3))

    return change


@pytest.mark.parametrize(
    ("tiny", "options", "tensor"),
    [
        (LLAMA, {"method": "spectral_r"}, "sketch"),
        (LLAMA, {"method": "svft"}, "sketch"),
        (LLAMA, {"method": "spectral_a", "save_basis": "always"}, "U_OR"),
        (LLAMA, {"method": "spectral_a", "save_basis": "always"}, "Vh_RI"),
        (BERT, {"method": "spectral_a", "modules_to_save": ["classifier"]}, "sketch"),
        (BERT, {"method": "spectral_a", "bias": "all"}, "sketch"),
    ],
)
def test_one_foreign_layer_leaves_every_layer_as_it_was(
    tiny: Any, options: dict[str, Any], tensor: str, tmp_path: Path
) -> None:
    live = adapted(tiny, **options)
    other = get_peft_model(tiny.fresh(), config_for(tiny, **options))
    train(other, seed=9)
    changed(other, tmp_path / "mixed", foreign(tensor))
    before, answer = everything(live), output(live, tiny.inputs())
    objects = {id(t) for t in (*live.parameters(), *live.buffers())}
    with pytest.raises(AdapterError, match="another base weight"):
        swap_adapter(live, tmp_path / "mixed")
    assert_untouched(live, before)
    assert {id(t) for t in (*live.parameters(), *live.buffers())} == objects
    assert torch.equal(output(live, tiny.inputs()), answer)
    # What was put back still takes a good file, biases and classifier with it.
    other.save_pretrained(tmp_path / "good")
    swap_adapter(live, tmp_path / "good")
    torch.testing.assert_close(output(live, tiny.inputs()), output(other.eval(), tiny.inputs()), rtol=0, atol=1e-5)


def test_numbers_too_large_for_the_live_dtype_are_refused(tmp_path: Path) -> None:
    config = config_for(LLAMA, "spectral_a")
    live = get_peft_model(LLAMA.fresh().half(), config, autocast_adapter_dtype=False).eval()

    def large(tensors: dict[str, torch.Tensor]) -> None:
        tensors[last(tensors, "A_U")] = torch.full_like(tensors[last(tensors, "A_U")], 1e6, dtype=torch.float32)

    folder = changed(live, tmp_path, large)
    before = everything(live)
    with pytest.raises(AdapterError, match="NaN or infinity"):
        swap_adapter(live, folder)
    assert_untouched(live, before)


def base_weight(tensors: dict[str, torch.Tensor]) -> None:
    tensors["base_model.model.lm_head.weight"] = torch.ones(64, 32)


def integers(tensors: dict[str, torch.Tensor]) -> None:
    tensors[last(tensors, "A_U")] = tensors[last(tensors, "A_U")].long()


@pytest.mark.parametrize("change", [base_weight, integers])
def test_tensors_that_are_not_the_adapters_are_refused(change: Change, tmp_path: Path) -> None:
    live = adapted(LLAMA, "spectral_a")
    folder = changed(live, tmp_path, change)
    before = everything(live)
    with pytest.raises(AdapterError, match="1 tensors differ"):
        swap_adapter(live, folder)
    assert_untouched(live, before)


def test_an_interrupted_swap_is_undone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    live = adapted(LLAMA, "spectral_r")
    train(live, seed=5)
    live.save_pretrained(tmp_path)
    train(live, seed=6)
    before = everything(live)
    modules = [module for _, _, module in spectral_modules(live)]

    def interrupted() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(modules[-1], "settle", interrupted)
    with pytest.raises(KeyboardInterrupt):
        swap_adapter(live, tmp_path)
    assert_untouched(live, before)


def test_a_merged_or_missing_adapter_is_refused(tmp_path: Path) -> None:
    live = adapted(LLAMA, "spectral_r")
    live.save_pretrained(tmp_path)
    with pytest.raises(AdapterError, match="no adapter 'defualt'. Did you mean 'default'"):
        swap_adapter(live, tmp_path, "defualt")
    live.merge_adapter()
    with pytest.raises(AdapterError, match="merged. Unmerge it first"):
        swap_adapter(live, tmp_path)


def test_an_embedding_that_peft_saves_beside_its_adapter_is_no_other_tensor(tmp_path: Path) -> None:
    config = config_for(LLAMA, "svdiff", target_modules=["embed_tokens"])
    live = get_peft_model(LLAMA.fresh(), config).eval()
    train(live)
    with pytest.warns(UserWarning, match="embedding layers found"):
        live.save_pretrained(tmp_path)
    answer = output(live, LLAMA.inputs())
    train(live, seed=4)
    swap_adapter(live, tmp_path)
    torch.testing.assert_close(output(live, LLAMA.inputs()), answer, rtol=0, atol=1e-5)
