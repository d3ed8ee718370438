from __future__ import annotations

import pytest
import torch
from torch import nn

from spectune.errors import OptionError
from spectune.runs import layer_spectra

from ..models import MODELS
from ..tuner.conftest import adapted

METHODS = ["spectral_a", "spectral_r", "svft", "svdiff", "specadapt"]


@pytest.mark.parametrize("method", METHODS)
def test_the_values_are_those_of_the_base_and_of_the_merged_weight(method: str) -> None:
    model = adapted(MODELS["mlp"], method)
    base = MODELS["mlp"].fresh()
    merged = adapted(MODELS["mlp"], method).merge_and_unload()
    found = layer_spectra(model)
    assert [layer.name for layer in found] == ["lin0", "lin1"]
    for layer in found:
        for values, source in ((layer.before, base), (layer.after, merged)):
            oracle = torch.linalg.svdvals(source.get_submodule(layer.name).weight.detach())
            torch.testing.assert_close(torch.tensor(values), oracle, atol=1e-5, rtol=1e-5)
        assert layer.before != layer.after


def test_looking_changes_nothing_and_works_while_merged() -> None:
    model = adapted(MODELS["mlp"], "spectral_a")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    loose = layer_spectra(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    model.merge_adapter()
    assert layer_spectra(model) == loose


def test_the_first_the_middle_and_the_last_layer_are_taken() -> None:
    model = adapted(MODELS["llama"], "svdiff")
    every = [layer.name for layer in layer_spectra(model, count=99)]
    assert len(every) == 6
    assert [layer.name for layer in layer_spectra(model)] == [every[0], every[2], every[5]]
    assert [layer.name for layer in layer_spectra(model, count=1)] == every[:1]


def test_layers_are_taken_by_name() -> None:
    model = adapted(MODELS["mlp"], "svft")
    assert [layer.name for layer in layer_spectra(model, ["lin1"])] == ["lin1"]
    with pytest.raises(OptionError, match="Did you mean 'lin1' or 'lin0'"):
        layer_spectra(model, ["linO"])
    with pytest.raises(OptionError, match="count=0: must be at least 1"):
        layer_spectra(model, count=0)


def test_a_model_without_an_adapter_is_refused() -> None:
    with pytest.raises(OptionError, match="no spectral adapter"):
        layer_spectra(nn.Linear(2, 2))
