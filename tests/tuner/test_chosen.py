"""`pattern: chosen`: places out of examples, in any directions, from the pass to the file and back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model

from spectune import SpectralConfig, prepare
from spectune.adapter import spectral_modules
from spectune.errors import AdapterError, OptionError, WeightError

from ..models import MODELS
from .conftest import assert_travels, train
from .test_kinds import quantised
from .test_prepare import Two, batches, gradients

PLACES = 7


def config(directions: str = "weight", **more: Any) -> SpectralConfig:
    options: dict[str, Any] = {"method": "svft", "pattern": "chosen", "basis_rank": 5, "places": PLACES}
    return SpectralConfig(**{**options, "target_modules": ["first", "second"], "directions": directions, **more})


@pytest.mark.parametrize("directions", ["weight", "gradient", "activation"])
def test_the_places_are_those_with_the_largest_fisher_information(directions: str) -> None:
    found = prepare(Two(), config(directions), batches())
    tuned = get_peft_model(Two(), found)
    for layer, _, module in spectral_modules(tuned):
        basis = module.spectrum
        fisher_PQ = sum(
            (basis.U_OR.double().mT @ G @ basis.Vh_RI.double().mT).square()
            for G in gradients(Two(), layer.removeprefix("base_model.model."))
        )
        assert isinstance(fisher_PQ, torch.Tensor) and fisher_PQ.shape == (5, 5)
        wanted = fisher_PQ.flatten().argsort(descending=True)[:PLACES].sort().values
        assert torch.equal(module.frozen["rows"] * 5 + module.frozen["cols"], wanted.to(torch.int32))


@pytest.mark.parametrize("directions", ["weight", "gradient"])
def test_such_an_adapter_starts_at_nothing_comes_back_from_its_file_and_is_an_exact_lora(
    tmp_path: Path, directions: str
) -> None:
    tiny = MODELS["llama"]
    inputs, given = tiny.inputs(), config(directions, target_modules=list(tiny.targets))
    found = prepare(tiny.fresh(), given, [inputs | {"labels": inputs["input_ids"]}])
    tuned = get_peft_model(tiny.fresh(), found).eval()
    assert torch.equal(tuned(**inputs).logits, tiny.fresh()(**inputs).logits)
    train(tuned)
    assert_travels(tuned, tiny, tmp_path)


def test_without_examples_it_is_refused_before_anything_is_changed() -> None:
    model = Two()
    with pytest.raises(OptionError, match="pattern='chosen' needs examples. Call config"):
        get_peft_model(model, config())
    assert isinstance(model.first, torch.nn.Linear)


def test_a_saved_config_alone_brings_no_places(tmp_path: Path) -> None:
    get_peft_model(Two(), prepare(Two(), config(), batches())).save_pretrained(tmp_path)
    tuned = get_peft_model(Two(), SpectralConfig.from_pretrained(str(tmp_path)))
    with pytest.raises(AdapterError, match="places outside of the 5x5 core"):
        tuned(**batches()[0])


def test_directions_of_data_need_batches_that_can_be_read_twice() -> None:
    prepare(Two(), config("weight"), iter(batches()))
    with pytest.raises(OptionError, match="reads them twice, and this iterator ends after once. Pass a list"):
        prepare(Two(), config("gradient"), iter(batches()))


def test_a_quantised_base_gives_places_in_its_own_directions() -> None:
    model = quantised("bnb-4bit")
    x = torch.randn(20, 64, generator=torch.Generator().manual_seed(0))
    square = lambda model, batch: model(batch["x"]).square().sum()  # noqa: E731
    found = prepare(model, config(target_modules=["0"]), [{"x": x}], loss=square)
    (module,) = [module for _, _, module in spectral_modules(get_peft_model(model, found))]
    x_NI = x.to(module.S_R)
    g_NO = _gradient_at(model, x)
    fisher_PQ = (module.U_OR.mT @ g_NO.mT @ x_NI @ module.Vh_RI.mT).square()
    wanted = fisher_PQ.flatten().argsort(descending=True)[:PLACES].sort().values
    assert torch.equal(module.frozen["rows"] * 5 + module.frozen["cols"], wanted.to(torch.int32))


def _gradient_at(model: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Get the gradient of the summed squares with respect to the output of the first layer."""
    seen: list[torch.Tensor] = []

    def report(_: torch.nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        output = output.detach().requires_grad_(True)
        output.register_hook(seen.append)
        return output.clone()

    handle = model.get_submodule("0").register_forward_hook(report)
    model(x).square().sum().backward()
    handle.remove()
    return seen[0]


def test_more_places_than_a_core_has_are_refused() -> None:
    with pytest.raises(WeightError, match=r"places=26 is more than this \d+x\d+ weight has with 5 directions \(25\)"):
        prepare(Two(), config(places=26), batches())


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (
            {"pattern": "banded"},
            "places=7 only goes with pattern='chosen', without off_diagonals, and there is pattern",
        ),
        ({"off_diagonals": 2}, "and there is off_diagonals=2"),
        ({"basis_rank": None, "full_basis": True}, "full_basis does not go with pattern='chosen'"),
    ],
)
def test_options_that_do_not_go_together_are_refused(more: dict[str, Any], said: str) -> None:
    with pytest.raises(OptionError, match=said):
        config(**more)
