"""`budget`: trained numbers shared out over the layers, from the examples to the file and back."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model

from spectune import SpectralConfig, prepare
from spectune.adapter import spectral_modules
from spectune.errors import OptionError
from spectune.tuner.budget import allot

from ..models import MODELS
from .conftest import assert_travels, train
from .test_prepare import Two, batches, gradients

LLAMA = MODELS["llama"]
# What shares out a budget, with the most for one layer.
FORMS: dict[str, dict[str, Any]] = {
    "dense": {"method": "svft", "pattern": "dense", "basis_rank": 16},
    "plain": {"method": "svft"},
    "chosen": {"method": "svft", "pattern": "chosen", "basis_rank": 16, "gate": True},
    "spectral_a": {"method": "spectral_a", "r": 12},
    "spectral_r": {"method": "spectral_r", "r": 12, "train_singular_values": True},
    "one_sided": {"method": "one_sided", "r": 12},
    "one_sided-left": {"method": "one_sided", "r": 12, "side": "left"},
    "svdiff": {"method": "svdiff"},
}
BUDGETS = {"spectral_a": 1200, "one_sided": 900, "one_sided-left": 900, "plain": 70, "svdiff": 70}


def config(form: str, **more: Any) -> SpectralConfig:
    return SpectralConfig(
        **{**FORMS[form], "budget": BUDGETS.get(form, 300), "target_modules": list(LLAMA.targets), **more}
    )


def prepared(given: SpectralConfig) -> SpectralConfig:
    inputs = LLAMA.inputs()
    texts = [{"input_ids": inputs["input_ids"][i : i + 1]} for i in range(3)]
    return prepare(LLAMA.fresh(), given, [text | {"labels": text["input_ids"]} for text in texts])


def counts(model: PeftModel) -> list[int]:
    return [sum(p.numel() for p in module.parameters()) for _, _, module in spectral_modules(model)]


@pytest.mark.parametrize("form", FORMS)
def test_layers_get_sizes_of_their_own_which_the_file_keeps(
    form: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    given = config(form)
    found = prepared(given)
    assert given.rank_pattern == {} and found.rank_pattern
    told = capsys.readouterr().err
    tuned = get_peft_model(LLAMA.fresh(), found).eval()
    # Not more than the budget, and less by at most one step of the largest layer.
    largest_step = {"spectral_a": 80, "one_sided": 32, "one_sided-left": 48, "dense": 31, "spectral_r": 23}.get(form, 1)
    assert given.budget is not None and given.budget - largest_step < sum(counts(tuned)) <= given.budget
    assert f"by fisher: {sum(counts(tuned)):,} numbers in 6 layers" in told
    assert re.search(r"model\.layers\.\*\.self_attn\.q_proj +│ +2 ", told)
    assert len(set(counts(tuned))) > 1

    train(tuned)
    assert_travels(tuned, LLAMA, tmp_path, 1e-4)


@pytest.mark.parametrize("by", ["fisher", "gradient"])
def test_the_sizes_are_the_best_for_the_score_of_the_definition(by: str) -> None:
    """Against all divisions of a budget, with the gradients from autograd, in directions of the data."""
    given = SpectralConfig(
        method="one_sided", r=5, directions="gradient", budget=40, budget_by=by, target_modules=["first", "second"]
    )
    found = prepare(Two(), given, batches())
    tuned, gained, width = get_peft_model(Two(), found), {}, {"first": 9, "second": 7}
    whole = prepare(
        Two(),
        SpectralConfig(method="one_sided", r=5, directions="gradient", target_modules=["first", "second"]),
        batches(),
    )
    for name in width:
        V_I5 = whole.spectra[name].Vh_RI.double().mT  # type: ignore[index]
        seen = torch.stack([G @ V_I5 for G in gradients(Two(), name)])
        gained[name] = (seen.square().sum(0) if by == "fisher" else seen.sum(0).square()).sum(0)
    divisions = [
        sizes
        for sizes in itertools.product(range(1, 6), repeat=2)
        if 40 - 9 < sum(n * w for n, w in zip(sizes, width.values(), strict=True)) <= 40
    ]
    best = max(divisions, key=lambda sizes: sum(float(gained[n][:k].sum()) for n, k in zip(width, sizes, strict=True)))
    sizes = [module.U_OR.shape[1] for _, _, module in spectral_modules(tuned)]
    assert sizes == list(best)


def test_a_later_size_that_scores_more_carries_the_earlier_ones() -> None:
    ones = torch.ones(3, dtype=torch.long)
    offers = {"late": (torch.tensor([1.0, 0.0, 9.0]), ones), "even": (torch.tensor([5.0, 4.0, 3.0]), ones)}
    assert allot(5, offers, 1, "r=3") == {"late": 3, "even": 2}
    assert allot(4, offers, 1, "r=3") == {"late": 3, "even": 1}
    assert allot(2, offers, 1, "r=3") == {"late": 1, "even": 1}
    assert allot(6, offers, 1, "r=3") == {"late": 3, "even": 3}


def test_what_is_left_over_goes_to_the_next_that_fits() -> None:
    offers = {
        "wide": (torch.tensor([9.0, 8.0]), torch.tensor([4, 4])),
        "thin": (torch.tensor([1.0, 1.0]), torch.tensor([1, 1])),
    }
    assert allot(8, offers, 1, "r=2") == {"wide": 1, "thin": 2}


@pytest.mark.parametrize(
    ("form", "more", "said"),
    [
        ("one_sided", {"budget": 100}, r"budget=100 is less than 6 layers need at least \(160\)"),
        ("one_sided", {"budget": 10**6}, r"budget=1,000,000 is more than all layers can train with r=12 \(1,920\)"),
        ("one_sided", {"rank_pattern": {"q_proj": 3}}, "rank_pattern={'q_proj': 3} does not go with budget=900"),
        ("chosen", {"places": 9}, "places=9 does not go with budget=300"),
    ],
)
def test_budgets_that_cannot_be_kept_are_refused(form: str, more: dict[str, Any], said: str) -> None:
    with pytest.raises(OptionError, match=said):
        prepared(config(form, **more))


@pytest.mark.parametrize(
    ("form", "more", "said"),
    [
        ("plain", {"pattern": "banded"}, "cannot be shared out with these options of svft"),
        ("dense", {"basis_rank": None, "core": [3, 4]}, "cannot be shared out"),
        ("one_sided", {"share": "kind"}, "cannot be shared out"),
        ("spectral_a", {"columns": "bottom"}, "cannot be shared out with these options of spectral_a"),
        ("one_sided", {"budget_by": "loss"}, "budget_by='loss' does not exist"),
        ("one_sided", {"budget": 0}, "budget=0 must be at least 1"),
    ],
)
def test_options_that_do_not_go_with_a_budget_are_refused(form: str, more: dict[str, Any], said: str) -> None:
    with pytest.raises(OptionError, match=said):
        config(form, **more)


def test_a_score_without_a_budget_is_refused() -> None:
    with pytest.raises(OptionError, match="budget_by='gradient' shares out a budget, and there is none"):
        SpectralConfig(method="spectral_a", budget_by="gradient")


def test_without_examples_a_budget_is_refused() -> None:
    with pytest.raises(OptionError, match=r"budget=900 needs examples\. Call config = spectune\.prepare"):
        get_peft_model(LLAMA.fresh(), config("one_sided"))


def test_a_size_of_its_own_is_kept_or_refused() -> None:
    given: dict[str, Any] = {
        "method": "svft",
        "pattern": "dense",
        "basis_rank": 4,
        "target_modules": ["q_proj", "v_proj"],
    }
    tuned = get_peft_model(LLAMA.fresh(), SpectralConfig(**given, rank_pattern={"v_proj": 2}))
    assert {tuple(module.trained["M"].shape) for _, _, module in spectral_modules(tuned)} == {(4, 4), (2, 2)}
    with pytest.raises(
        ValueError, match=r"v_proj: rank_pattern gives this layer basis_rank=99, but a 16x32 weight has 16"
    ):
        get_peft_model(LLAMA.fresh(), SpectralConfig(**given, rank_pattern={"v_proj": 99}))
