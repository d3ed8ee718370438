"""`share: kind`: one set of numbers for the layers whose paths differ only in indices."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from safetensors.torch import load_file
from torch import nn

from spectune import AdapterBank, SpectralConfig
from spectune.adapter import spectral_modules
from spectune.errors import AdapterError, OptionError

from ..models import MODELS
from .conftest import assert_travels, train

LLAMA = MODELS["llama"]
OPTIONS: dict[str, dict[str, Any]] = {
    "one_sided": {"method": "one_sided", "r": 3},
    "svft": {"method": "svft", "pattern": "dense", "core": [3, 4]},
    "svft-gate": {"method": "svft", "pattern": "banded", "basis_rank": 6, "gate": True, "save_basis": "always"},
    "spectral_r": {"method": "spectral_r", "r": 3},
    "svdiff": {"method": "svdiff"},
}


def config(form: str, **more: Any) -> SpectralConfig:
    return SpectralConfig(**{**OPTIONS[form], "share": "kind", "target_modules": list(LLAMA.targets), **more})


@pytest.mark.parametrize("form", OPTIONS)
def test_layers_of_a_kind_train_one_set_of_numbers_which_the_file_holds_once(form: str, tmp_path: Path) -> None:
    inputs = LLAMA.inputs()
    tuned = get_peft_model(LLAMA.fresh(), config(form)).eval()
    assert torch.equal(tuned(**inputs).logits, LLAMA.fresh()(**inputs).logits)
    alone = get_peft_model(LLAMA.fresh(), config(form, share="none"))
    counts = [sum(p.numel() for p in model.parameters() if p.requires_grad) for model in (tuned, alone)]
    assert 2 * counts[0] == counts[1]  # two layers of each kind
    train(tuned)
    updates = {name: module.delta() for name, _, module in spectral_modules(tuned)}
    assert len(updates) == 6 and all(bool(delta.core_matrix().any()) for delta in updates.values())
    tuned(**inputs).logits.square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in tuned.parameters() if p.requires_grad)

    assert_travels(tuned, LLAMA, tmp_path)
    held = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    name = "skew_U" if form == "spectral_r" else "shift" if form == "svdiff" else "M"
    assert sum(key.endswith(f".{name}") for key in held) == 3


def test_a_kind_is_a_path_without_its_indices_and_not_a_name() -> None:
    """Bert has a `dense` at three places of a block."""
    tuned = get_peft_model(
        MODELS["bert"].fresh(), config("one_sided", target_modules=["attention.output.dense", "query"])
    )
    owners = [name for name, _, module in spectral_modules(tuned) if module.own_names]
    assert [name.partition("layer.")[2] for name in owners] == ["0.attention.self.query", "0.attention.output.dense"]


def test_unequal_shapes_are_one_line_and_leave_the_model_as_it_was() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 5))
    said = r"^1: share='kind' gives the layers of a kind one M, but here it is 5x3, and in 0 8x3\. Exclude one of the"
    with pytest.raises(OptionError, match=said):
        get_peft_model(model, config("one_sided", target_modules=["0", "1"]))
    assert all(isinstance(layer, nn.Linear) for layer in model)


def test_rules_for_single_directions_are_refused_and_norms_work() -> None:
    tuned = get_peft_model(LLAMA.fresh(), config("one_sided", singular_decay=0.1, grad_norm="rms"))
    (before, *_), inputs = [p.detach().clone() for p in tuned.parameters() if p.requires_grad], LLAMA.inputs()
    optimizer = torch.optim.AdamW(tuned.parameters(), lr=0.1, weight_decay=0.0)
    tuned(**inputs).logits.square().sum().backward()
    with pytest.raises(OptionError, match="goes by the directions of one weight, and with share='kind'"):
        optimizer.step()
    for _, _, module in spectral_modules(tuned):
        module.dynamics = type(module.dynamics)(grad_norm="rms")
    optimizer.step()
    after = next(p for p in tuned.parameters() if p.requires_grad)
    assert not torch.equal(after, before)


def test_a_file_without_the_shared_numbers_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    get_peft_model(LLAMA.fresh(), config("one_sided")).save_pretrained(tmp_path)
    held = load_file(tmp_path / "adapter_model.safetensors")
    save_file(
        {n: t for n, t in held.items() if not n.endswith("0.self_attn.q_proj.spectune_adapter.M")},
        tmp_path / "adapter_model.safetensors",
    )
    with pytest.raises(AdapterError, match="q_proj: the adapter file has no tensor"):
        PeftModel.from_pretrained(LLAMA.fresh(), tmp_path)


def test_what_cannot_be_shared_is_refused() -> None:
    with pytest.raises(OptionError, match="share='layer' does not exist. Use 'none' or 'kind'"):
        config("svdiff", share="layer")
    with pytest.raises(OptionError, match="share='kind' does not go with pattern='top_k'"):
        SpectralConfig(method="svft", pattern="top_k", share="kind")
    with pytest.raises(OptionError, match="shares it between layers"):
        AdapterBank(get_peft_model(LLAMA.fresh(), config("spectral_r")))


SPECADAPT = {"method": "specadapt", "r": 2, "basis_rank": 4}


@pytest.mark.parametrize("wrapped", [False, True], ids=["plain", "a PeftModel"])
@pytest.mark.parametrize("low", [False, True], ids=["", "low memory"])
@pytest.mark.parametrize("form", [*OPTIONS, "specadapt"])
def test_an_adapter_that_is_injected_twice_under_one_name_begins_anew(form: str, low: bool, wrapped: bool) -> None:

    def asked() -> SpectralConfig:
        return SpectralConfig(**SPECADAPT, target_modules=list(LLAMA.targets)) if form == "specadapt" else config(form)

    def adapted() -> Any:
        model: Any = LLAMA.fresh()
        return get_peft_model(model, asked()) if wrapped else inject_adapter_in_model(asked(), model)

    first, second = adapted(), adapted()
    for _, _, module in spectral_modules(first):
        for number in module.parameters():
            number.data = 0.1 * torch.randn(number.shape)
    saved = get_peft_model_state_dict(first)
    inject_adapter_in_model(asked(), second, low_cpu_mem_usage=low)
    set_peft_model_state_dict(second, saved, low_cpu_mem_usage=low)
    inputs = LLAMA.inputs()
    torch.testing.assert_close(second(**inputs).logits, first(**inputs).logits)
    assert not torch.allclose(first(**inputs).logits, LLAMA.fresh()(**inputs).logits)


def test_a_weight_whose_shared_numbers_would_be_replaced_is_not_left_behind() -> None:
    model = LLAMA.fresh()
    inject_adapter_in_model(SpectralConfig(target_modules=["q_proj", "k_proj"], **SPECADAPT), model)
    before = get_peft_model_state_dict(model)
    with pytest.raises(OptionError, match="_proj: trains the numbers of model.layers.0.self_attn.q_proj, which would"):
        inject_adapter_in_model(SpectralConfig(target_modules=["q_proj"], **SPECADAPT), model)
    assert get_peft_model_state_dict(model).keys() == before.keys()
    inject_adapter_in_model(SpectralConfig(target_modules=["v_proj"], **SPECADAPT), model)  # only more of it
    assert len(get_peft_model_state_dict(model)) > len(before)
