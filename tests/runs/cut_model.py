"""What adapters do on a model that `zero.Init` has cut; every process of a launch calls `compare`."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.utils import gather_object
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from transformers import AutoModelForImageClassification

from spectune import SpectralConfig
from spectune.adapter import gathered, spectral_modules
from spectune.algebra import dense
from spectune.errors import OptionError, WeightError
from spectune.recipes import parse_config
from spectune.recipes.table import recipe_class
from spectune.runs.building import build
from spectune.spectrum import engine
from spectune.training.zero import cut_while_loading

from ..recipes import tiny


def compare(config: Any, adapter: Path, texts: Path) -> None:
    """Compare adapters on a cut model, a saved one and a new one, with the saved one on a whole model."""
    recipe = recipe_class(config.recipe)(config)
    with cut_while_loading():
        base = recipe.build_model()
    assert not any(parameter.numel() for parameter in base.parameters())
    loaded, whole = PeftModel.from_pretrained(base, adapter), PeftModel.from_pretrained(recipe.build_model(), adapter)
    for (path, _, one), (_, _, other) in _pairs(loaded, whole):
        assert torch.allclose(dense(one.delta()), dense(other.delta()), rtol=0, atol=1e-6)
        with pytest.raises(WeightError, match="a merged one would be whole on every process"):
            loaded.get_submodule(path).merge()
    with recorded() as solved:
        new, _ = build(recipe)
    first, second = gather_object([set(solved)])
    assert first and second and not first & second and len(first | second) == len(list(spectral_modules(new)))
    for (path, _, one), (_, _, other) in _pairs(new, whole):
        assert not one.U_OR.numel() and not one.Vh_RI.numel() and not one.U_OR.requires_grad
        with gathered(one.U_OR, one.Vh_RI):
            for mine, theirs in ((one.U_OR, other.U_OR), (one.Vh_RI, other.Vh_RI)):
                assert torch.allclose(mine, theirs, rtol=0, atol=1e-4), path
    kept = SpectralConfig(method="spectral_a", r=2, target_modules=["q_proj"], save_basis="always")
    with cut_while_loading():
        base = recipe.build_model()
    several = get_peft_model(base, kept)
    with pytest.raises(OptionError, match=r"U_OR: DeepSpeed ZeRO-3 has partitioned this adapter"):
        get_peft_model_state_dict(several)
    several.add_adapter("twin", kept)
    several.add_adapter(
        "other", SpectralConfig(method="svft", target_modules=["q_proj", "v_proj"], svd={"share": False})
    )
    assert not any(one.Vh_RI.numel() for _, _, one in spectral_modules(several))
    _finds_the_basis_of_a_convolution(json.loads((texts / "runs.json").read_text())["image"]["model"])
    _refuses_what_needs_examples(texts)


def _finds_the_basis_of_a_convolution(folder: str) -> None:
    adapter = SpectralConfig(method="spectral_a", r=2, target_modules=["projection"])
    with cut_while_loading():
        base = AutoModelForImageClassification.from_pretrained(folder)
    whole = get_peft_model(AutoModelForImageClassification.from_pretrained(folder), adapter)
    (((_, _, one), (_, _, other)),) = _pairs(get_peft_model(base, adapter), whole)
    assert not one.U_OR.numel() and not one.Vh_RI.numel()
    with gathered(one.U_OR, one.Vh_RI):
        assert torch.allclose(one.U_OR, other.U_OR, rtol=0, atol=1e-5)
        assert torch.allclose(one.Vh_RI, other.Vh_RI, rtol=0, atol=1e-5)


@contextmanager
def recorded() -> Iterator[list[str]]:
    """Get the names of the weights that this process decomposes in the block."""
    solved: list[str] = []
    solve = engine._decompose_alike
    engine._decompose_alike = lambda weights, asked: solved.extend(w.name for w in weights) or solve(weights, asked)
    try:
        yield solved
    finally:
        engine._decompose_alike = solve


def _pairs(one: Any, other: Any) -> Any:
    return zip(spectral_modules(one), spectral_modules(other), strict=True)


def _refuses_what_needs_examples(texts: Path) -> None:
    values = json.loads((texts / "runs.json").read_text())["text"]
    data = {"method": "svft", "pattern": "dense", "basis_rank": 4, "target_modules": ["query"]}
    for changes, asked in (
        ({"adapter": data, "training": {"head_first": True}}, "training.head_first"),
        ({"adapter": data | {"directions": "gradient"}}, "adapter.directions='gradient'"),
        ({"adapter": data | {"pattern": "chosen", "places": 4}}, "adapter.pattern='chosen'"),
        ({"adapter": data | {"budget": 100}}, "adapter.budget=100"),
    ):
        config = parse_config(tiny.merged(values, changes))
        with pytest.raises(OptionError, match=f"{re.escape(asked)} runs the model before the first step"):
            build(recipe_class("text_classification")(config))
