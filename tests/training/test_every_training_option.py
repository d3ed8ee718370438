"""Every option of `training:` changes what the loop is told, and the Trainer of every recipe is told all of it."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest

from spectune.errors import OptionError
from spectune.recipes import RECIPES, parse_config
from spectune.recipes.table import recipe_class
from spectune.runs.building import build
from spectune.training.arguments import loop_arguments
from spectune.training.config import RunConfig, Training
from tests.concepts.concepts import concept_run
from tests.recipes import tiny
from tests.recipes.other_values import other_values

# An option is tried on each of them that allows it: one is as long as a number of steps, the other as one of epochs.
BASES: tuple[dict[str, Any], ...] = ({"steps": 4}, {"epochs": 7.0})
RUNS = {
    "text_classification": tiny.text_run, "causal_lm": tiny.lm_run, "image_classification": tiny.image_run,
    "text_to_image": concept_run, "preference": tiny.preference_run, "reward": partial(tiny.reward_run, group_size=2),
}  # fmt: skip
# What a recipe has its own mind about: trl names the columns itself.
OWN = {"causal_lm": {"remove_unused_columns"}}
# They need runs and directions of data: tests/runs/test_away_from.py.
OF_DIRECTIONS = {"away_from", "away_share"}


@pytest.fixture(scope="module")
def values(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return tiny.text_run(tmp_path_factory.mktemp("run"))


def others(name: str) -> list[Any]:
    field = Training.model_fields[name]
    return list(other_values(field.annotation, field.default))


def differ(one: RunConfig, other: RunConfig) -> bool:
    """Ask whether the loop is told another thing: in transformers' arguments, in the rates, or in what they train."""
    first, second = (loop_arguments(config, Path("out")) for config in (one, other))
    return first != second or _plan(one) != _plan(other)


def _plan(config: RunConfig) -> list[tuple[float, list[float]]]:
    _, plan = build(recipe_class(config.recipe)(config))
    return [(rate, [float(p.detach().sum()) for p in group]) for group, rate in plan.rates]


@pytest.mark.parametrize("name", [name for name in Training.model_fields if name not in OF_DIRECTIONS])
def test_an_option_of_training_changes_what_the_loop_is_told(name: str, values: dict[str, Any]) -> None:
    changed = []
    for base in BASES:
        plain = parse_config(values | {"training": base})
        for value in others(name):
            try:
                told = parse_config(values | {"training": base | {name: value}})
            except OptionError:
                continue  # steps beside epochs
            changed.append(differ(plain, told))
    assert changed and all(changed), f"training.{name} changes nothing, or cannot be given: {changed}"


@pytest.mark.parametrize("recipe", list(RECIPES))
def test_the_trainer_is_told_all_that_the_loop_is_told(recipe: str, tmp_path: Path) -> None:
    assert recipe in RUNS, f"{recipe}: give a tiny run in RUNS"
    # Rates go to the plan; a tracker would have to be installed; of names only an optimizer's own are taken.
    asked = {
        name: others(name)[0] for name in Training.model_fields if name not in {"epochs", "report_to"} | OF_DIRECTIONS
    }
    del asked["head_learning_rate"], asked["head_first"]  # the head is fitted before there is a Trainer
    asked["optimizer"] = "adafactor"
    if recipe == "reward":
        del asked["validate_every"]  # it refuses that
    held_out = {"validation": None, "validation_share": 0.5}
    config = parse_config(RUNS[recipe](tmp_path, data=held_out) | {"training": asked})
    made = recipe_class(recipe)(config)
    found, wanted = made.trainer(*build(made), tmp_path / "out").args, loop_arguments(config, tmp_path / "out")
    assert {key for key, value in wanted.items() if getattr(found, key) != value} == OWN.get(recipe, set())


@pytest.mark.parametrize(
    ("recipe", "training", "line"),
    [
        ("causal_lm", {"head_learning_rate": 0.1}, "this run has no new head"),
        ("causal_lm", {"schedule": "constant", "warmup": 5}, "schedule constant has no warmup"),
        ("causal_lm", {"optimizer": "adamw_tortch"}, "adamw_tortch.* is not a valid OptimizerNames"),
        ("text_classification", {"precision": "float16"}, "autocast needs an accelerator"),
    ],
)
def test_what_would_have_no_effect_is_refused(
    recipe: str, training: dict[str, Any], line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)
    with pytest.raises(OptionError, match=line):
        config = parse_config(RUNS[recipe](tmp_path, training=training))
        made = recipe_class(recipe)(config)
        made.trainer(*build(made), tmp_path / "out")
