"""Every form of an update that conftest's one form of each method leaves out: saved, loaded, merged, on every model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from ..models import MODELS, Tiny, output
from .conftest import adapted

FORMS: dict[str, dict[str, Any]] = {
    "svft dense": {"method": "svft", "pattern": "dense", "off_diagonals": None, "basis_rank": 5},
    "svft dense, rectangular": {"method": "svft", "pattern": "dense", "off_diagonals": None, "core": [5, 3]},
    "one_sided, left": {"method": "one_sided", "side": "left"},
}


@pytest.fixture(params=list(FORMS))
def options(request: pytest.FixtureRequest) -> dict[str, Any]:
    return FORMS[request.param]


def test_a_form_is_loaded_as_it_was_saved_and_merges(options: dict[str, Any], tiny: Tiny, tmp_path: Path) -> None:
    model = adapted(tiny, **options)
    tuned, plain = output(model, tiny.inputs()), output(tiny.fresh(), tiny.inputs())
    assert not torch.equal(tuned, plain)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny.fresh(), tmp_path).eval()
    assert torch.equal(output(loaded, tiny.inputs()), tuned)
    model.merge_adapter()
    torch.testing.assert_close(output(model, tiny.inputs()), tuned, rtol=1e-4, atol=1e-4)
    model.unmerge_adapter()
    with model.disable_adapter():
        assert torch.equal(output(model, tiny.inputs()), plain)


def test_a_form_of_half_precision_has_the_same_update(options: dict[str, Any], tmp_path: Path) -> None:
    tiny = MODELS["mlp"]
    adapted(tiny, **options).save_pretrained(tmp_path)
    whole = PeftModel.from_pretrained(tiny.fresh(), tmp_path)
    half = PeftModel.from_pretrained(tiny.fresh().bfloat16(), tmp_path)
    for layer in ("lin0", "lin1"):
        one, other = (m.base_model.model.get_submodule(layer).get_delta_weight("default") for m in (whole, half))
        # 2^-8, bfloat16's rounding of the base, turns the directions by as much over the gaps between them.
        assert torch.linalg.vector_norm(one - other) <= 0.05 * torch.linalg.vector_norm(one)
