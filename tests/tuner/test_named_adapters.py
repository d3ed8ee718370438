"""Calls that name adapters: names that do not exist are refused, all of them in one line, and nothing is changed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from spectune import AdapterBank, SpectralConfig
from spectune.errors import AdapterError, OptionError

from ..models import MODELS, output
from .conftest import adapted

LLAMA = MODELS["llama"]
UNKNOWN = ["ghost", "default", "phantom"]
CALLS: dict[str, Callable[[PeftModel], Any]] = {
    "set_adapter": lambda model: model.base_model.set_adapter(UNKNOWN),
    "merge_adapter": lambda model: model.merge_adapter(UNKNOWN),
    "merge_and_unload": lambda model: model.merge_and_unload(adapter_names=UNKNOWN),
    "add_weighted_adapter": lambda model: model.base_model.add_weighted_adapter(UNKNOWN, [1.0] * 3, "sum"),
    "set_requires_grad": lambda model: model.set_requires_grad(UNKNOWN),
    "forward": lambda model: output(model, {**LLAMA.inputs(), "adapter_names": UNKNOWN}),
}


@pytest.mark.parametrize("call", list(CALLS))
def test_every_unknown_name_is_listed(call: str) -> None:
    model = adapted(LLAMA, "svft")
    before = output(model, LLAMA.inputs())
    with pytest.raises(
        AdapterError, match=r"non-existing adapter\(s\): ghost, phantom\. Choose from: default"
    ) as refused:
        CALLS[call](model)
    assert "\n" not in str(refused.value)
    assert list(model.peft_config) == ["default"] and model.active_adapters == ["default"]
    assert torch.equal(output(model, LLAMA.inputs()), before)


def test_a_scale_for_an_unknown_adapter_is_refused() -> None:
    with pytest.raises(AdapterError, match=r"non-existing adapter\(s\): defualt\. Did you mean 'default'"):
        adapted(LLAMA, "svft").base_model.set_scale("defualt", 0.5)


def test_a_bank_lists_every_name_that_is_not_resident() -> None:
    bank = AdapterBank(adapted(LLAMA, "svft"))
    with pytest.raises(AdapterError, match="'anna', 'ben' are not resident"), bank(["anna", "ben", "anna"]):
        pass


@pytest.mark.parametrize("selected", [None, ["default"]])
def test_an_adapter_is_not_saved_as_a_pickle(selected: list[str] | None, tmp_path: Path) -> None:
    model = adapted(LLAMA, "svft")
    with pytest.raises(OptionError, match="safe_serialization=False"):
        model.save_pretrained(tmp_path, safe_serialization=False, selected_adapters=selected)
    assert not list(tmp_path.rglob("adapter_*"))
    model.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").exists()


def test_an_option_of_another_method_is_refused_where_it_is_set() -> None:
    config = SpectralConfig(method="spectral_a", r=2)
    with pytest.raises(OptionError, match="has no option 'weight_dropout'"):
        config.weight_dropout = 0.5
    config.r, config.gate = 3, None
    assert config.build_method() == SpectralConfig(method="spectral_a", r=3).build_method()
