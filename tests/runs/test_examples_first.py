"""Before the first step: a new head is fitted, and directions of the data are found, by every recipe that asks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from spectune.adapter import spectral_modules
from spectune.errors import OptionError
from spectune.recipes import parse_config
from spectune.recipes.table import recipe_class
from spectune.runs import dry_run, load_run, measure, run
from spectune.runs.building import build
from spectune.runs.examples_first import A_BATCH, _Batches

from ..recipes import tiny

SVFT = {"method": "svft", "pattern": "banded", "off_diagonals": 3, "basis_rank": 4, "directions": "gradient"}
CHOSEN = {"method": "svft", "pattern": "chosen", "places": 9, "basis_rank": 4, "directions": "gradient"}
OF_TEXT = SVFT | {"target_modules": ["query", "value"]}
HEAD_FIRST: dict[str, Any] = {"training": {"head_first": True}}
CLASSIFIERS: dict[str, tuple[Callable[..., dict[str, Any]], dict[str, Any]]] = {
    "pooled texts": (tiny.text_run, {}),
    "mean of tokens, no validation examples": (tiny.text_run, {"pooling": "mean", "data": {"validation": None}}),
    "images": (tiny.image_run, {}),
}


def built(values: dict[str, Any]) -> tuple[Any, Any]:
    recipe = recipe_class(values["recipe"])(parse_config(values))
    return recipe, build(recipe)[0]


@torch.no_grad()
def training_loss(recipe: Any, model: nn.Module) -> float:
    model.eval()
    batch = recipe.collate([recipe.plain_rows("train")[i] for i in range(16)])
    loss = recipe.loss(model, batch) if recipe.loss is not None else model(**batch).loss
    return float(loss)


@pytest.mark.parametrize("name", list(CLASSIFIERS))
def test_a_fitted_head_is_where_the_loss_falls_no_further_with_the_body_frozen(name: str, tmp_path: Path) -> None:
    make, more = CLASSIFIERS[name]
    values = make(tmp_path, **more)
    random, fitted = (
        built(values | {"training": values["training"] | {"head_first": first}}) for first in (False, True)
    )
    assert training_loss(*fitted) < 0.6 * training_loss(*random)  # tasks that a linear head solves
    body = [{n: t for n, t in model.state_dict().items() if "classifier" not in n} for _, model in (random, fitted)]
    assert all(torch.equal(t, body[1][n]) for n, t in body[0].items())
    again = built(values | {"training": values["training"] | {"head_first": True}})[1].state_dict()
    assert all(torch.equal(t, again[n]) for n, t in fitted[1].state_dict().items())


def test_scores_are_fitted_by_least_squares(tmp_path: Path) -> None:
    rows = [f'{{"text": "w{i % 7} good", "label": {i % 7 / 2}}}\n' for i in range(28)]
    (tmp_path / "scores.jsonl").write_text("".join(rows))
    data = {"train": str(tmp_path / "scores.jsonl"), "validation": None}
    values = tiny.text_run(tmp_path, data=data, problem="regression", **HEAD_FIRST)
    recipe, model = built(values)
    assert training_loss(recipe, model) < 0.3  # the variance of these scores is 1


@pytest.mark.parametrize("name", ["text", "images", "language model", "chosen places"])
def test_a_run_finds_directions_of_its_examples_trains_in_them_and_is_read_back(name: str, tmp_path: Path) -> None:
    values = {
        "text": lambda: tiny.text_run(tmp_path, adapter=OF_TEXT, **HEAD_FIRST),
        "images": lambda: tiny.image_run(
            tmp_path, adapter=SVFT | {"target_modules": list(tiny.vit_targets()[:2])}, **HEAD_FIRST
        ),
        "language model": lambda: tiny.lm_run(tmp_path, adapter=SVFT | {"target_modules": ["q_proj", "v_proj"]}),
        "chosen places": lambda: tiny.lm_run(tmp_path, adapter=CHOSEN | {"target_modules": ["q_proj", "v_proj"]}),
    }[name]()
    config = parse_config(values)
    assert dry_run(config).trainable > 0
    result = run(config, tmp_path / "run")
    recipe, model = load_run(tmp_path / "run")
    modules = [module for _, _, module in spectral_modules(model)]
    assert {module.source for module in modules} == {"gradient"} and all(bool(m.M.any()) for m in modules)
    for split, figures in measure(recipe, model).items():
        assert result.metrics[split] == pytest.approx(figures, rel=1e-4)


def test_the_pass_takes_texts_of_like_length_in_one_batch_and_the_same_again(tmp_path: Path) -> None:
    values = tiny.text_run(tmp_path, adapter=OF_TEXT, **HEAD_FIRST)
    words = [f'{{"text": "{"good " * (1 + 5 * i % 7)}", "label": "{i % 2}"}}\n' for i in range(40)]
    Path(values["data"]["train"]).write_text("".join(words))
    recipe = recipe_class(values["recipe"])(parse_config(values))
    lengths = [batch["attention_mask"].sum(1) for batch in _Batches(recipe)]
    assert max(len(part) for part in lengths) <= A_BATCH and sum(len(part) for part in lengths) == 40
    together = torch.cat(lengths)
    assert torch.equal(together, together.sort().values) and len(together.unique()) > 3
    assert all(torch.equal(a, b["attention_mask"].sum(1)) for a, b in zip(lengths, _Batches(recipe), strict=True))


@pytest.mark.parametrize(
    ("make", "more", "said"),
    [
        (tiny.text_run, {"adapter": OF_TEXT}, "Set training.head_first: true"),
        (
            tiny.text_run,
            {"adapter": CHOSEN | {"directions": "weight"}},
            "adapter.pattern='chosen': the gradients of a new",
        ),
        (tiny.lm_run, HEAD_FIRST, "training.head_first: this run has no new head"),
    ],
)
def test_what_cannot_be_done_first_is_refused(make: Any, more: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=said):
        built(make(tmp_path, **more))
