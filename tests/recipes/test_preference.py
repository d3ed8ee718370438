"""Preferences: the reference is the base, what is learned is what is asked, and bad rows are one line."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, get_args

import pytest

from spectune import METHODS
from spectune.errors import DataError, OptionError
from spectune.pages.run_page import render
from spectune.recipes import parse_config
from spectune.recipes.preference_config import LabelLoss, PairLoss
from spectune.recipes.table import recipe_class
from spectune.runs import dry_run, load_run, measure, run
from spectune.runs.building import build
from tests.tuner.conftest import OPTIONS

from ..abilities import refuses_an_adapted_lm_head
from . import tiny

pytest.importorskip("trl")
LABELLED = get_args(LabelLoss)
LORA = {"peft_type": "LORA", "r": 2, "target_modules": ["q_proj"]}


def made(values: dict[str, Any], folder: Path) -> tuple[Any, Any]:
    """Get the recipe of a run and its trainer before the first step."""
    config = parse_config(values)
    recipe = recipe_class(config.recipe)(config)
    recipe.prepare()
    return recipe, recipe.trainer(*build(recipe), folder / "out")


def first_loss(trainer: Any) -> float:
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    return float(trainer.compute_loss(trainer.model, batch).detach())


@pytest.mark.parametrize("method", list(METHODS))
def test_the_first_dpo_loss_is_ln_2(method: str, tmp_path: Path) -> None:
    adapter = {"method": method, "target_modules": ["q_proj", "v_proj"], **OPTIONS[method]}
    _, trainer = made(tiny.preference_run(tmp_path, adapter=adapter), tmp_path)
    assert first_loss(trainer) == pytest.approx(math.log(2), abs=1e-4)
    assert list(trainer.model.peft_config) == ["default"]  # no copy of the adapter is the reference


@pytest.mark.parametrize("adapter", ["none", LORA])
def test_the_first_loss_is_ln_2_also_for_other_ways_of_tuning(adapter: Any, tmp_path: Path) -> None:
    _, trainer = made(tiny.preference_run(tmp_path, adapter=adapter), tmp_path)
    assert first_loss(trainer) == pytest.approx(math.log(2), abs=1e-4)


@pytest.mark.parametrize("loss", [*get_args(PairLoss), *LABELLED, "orpo"])
def test_every_loss_of_trl_prefers_the_chosen_answers(loss: str, tmp_path: Path) -> None:
    more = {"label_smoothing": 0.01} if loss == "exo_pair" else {}
    recipe, trainer = made(tiny.preference_run(tmp_path, loss=loss, **more), tmp_path)
    before = recipe.evaluate(trainer.model, "test")
    trainer.train()
    after = recipe.evaluate(trainer.model, "test")
    # DiscoPOP's loss has a hill at zero (arXiv 2406.08414, figure 5): from there it may go to either side.
    assert after["reward_margin"] > before["reward_margin"] or loss == "discopop"
    assert after["reward_margin"] != before["reward_margin"]
    assert ("reward_accuracy" in after) == (loss not in LABELLED)


def test_the_figures_do_not_depend_on_the_batches(tmp_path: Path) -> None:
    run(parse_config(tiny.preference_run(tmp_path)), tmp_path / "run")
    found = [measure(*load_run(tmp_path / "run", [f"evaluation.batch_size={size}"]))["test"] for size in (1, 4, 5)]
    assert found[0]["reward_margin"] != 0
    for other in found[1:]:
        assert other == pytest.approx(found[0], abs=1e-5)


def test_a_run_is_measured_shown_and_generates(tmp_path: Path) -> None:
    config = parse_config(tiny.preference_run(tmp_path))
    found = run(config, tmp_path / "run")
    recipe, model = load_run(tmp_path / "run")
    assert measure(recipe, model) == found.metrics and found.metrics["test"]["reward_accuracy"] == 1.0
    assert list(found.curves) == ["chosen", "rejected"] and len(found.curves["chosen"]) == 6
    page = render(found)
    assert 'id="rewards"' in page and "chosen</li>" in page
    assert len(recipe.generate(model, [recipe.as_prompt("Question : w1 Answer :")])) == 1
    shown = "".join(piece for piece, _ in dry_run(config).shown.pieces)
    assert "[chosen]" in shown and "[rejected]" in shown


PAIR = {"prompt": "w1", "chosen": "good", "rejected": "bad"}
ONE = {"prompt": "w1", "completion": "good", "label": True}


@pytest.mark.parametrize(
    ("loss", "row", "line"),
    [
        ("sigmoid", PAIR | {"chosen": None}, "chosen is null"),
        ("sigmoid", PAIR | {"chosen": float("nan")}, "chosen is null"),
        ("sigmoid", PAIR | {"rejected": "  "}, "rejected is empty"),
        ("sigmoid", PAIR | {"prompt": ""}, "prompt is empty"),
        ("sigmoid", PAIR | {"rejected": "good"}, "chosen and rejected are equal"),
        ("sigmoid", PAIR | {"chosen": [{"role": "assistant", "content": "x"}]}, "give data.format: messages"),
        ("sigmoid", {"prompt": "w1", "chosen": "good"}, "the column 'rejected'"),
        (
            "orpo",
            {"prompt": "w1", "choosen": "good", "rejected": "bad"},
            "a preference needs the column 'chosen'. Did you mean 'choosen'",
        ),
        ("kto", ONE | {"label": "maybe"}, "label must be true or false, not 'maybe'"),
        ("kto", ONE | {"label": 1}, "label must be true or false, not 1"),
        ("kto", ONE | {"label": None}, "label must be true or false, not None"),
        ("kto", {"prompt": "w1", "completion": "good"}, "a labelled answer needs the column 'label'"),
        ("kto", ONE | {"completion": ""}, "completion is empty"),
    ],
)
@pytest.mark.parametrize("split", ["train", "test"])
def test_a_bad_row_is_named_with_its_file(split: str, loss: str, row: Any, line: str, tmp_path: Path) -> None:
    good = ONE if loss == "kto" else PAIR
    data = {split: tiny.lines(tmp_path / "rows.jsonl", [good, row])}
    config = parse_config(tiny.preference_run(tmp_path, loss=loss, data=data))
    with pytest.raises(DataError, match="rows.jsonl, row 2: ") as refused:
        recipe_class("preference")(config).prepare()
    assert line in str(refused.value) and "\n" not in str(refused.value)


USER, GOOD, BAD = ({"role": r, "content": c} for r, c in (("user", "w1"), ("assistant", "good"), ("assistant", "bad")))


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
        {"prompt": "w1", "chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"prompt": "w1", "chosen": [GOOD], "rejected": "bad"},
    ],
)
def test_conversations_are_read_in_every_form(row: dict[str, Any], tmp_path: Path) -> None:
    more = {"format": "messages", "chat_template": "plain", "train": tiny.lines(tmp_path / "rows.jsonl", [row])}
    recipe, _ = made(tiny.preference_run(tmp_path, data=more | {"test": None}), tmp_path)
    (found,) = recipe.rows("train")
    words = {name: recipe.processing.decode(found[f"{name}_ids"]) for name in ("prompt", "chosen", "rejected")}
    assert words == {"prompt": "User : w1 Assistant :", "chosen": "good [SEP]", "rejected": "bad [SEP]"}
    assert found["prompt_ids"] == recipe.asked(recipe.splits["train"][0])  # what it is asked later


def test_conversations_that_part_before_the_answer_are_refused(tmp_path: Path) -> None:
    row = {"chosen": [USER, GOOD], "rejected": [USER | {"content": "w2"}, BAD]}
    more = {"format": "messages", "chat_template": "plain", "train": tiny.lines(tmp_path / "rows.jsonl", [row])}
    with pytest.raises(DataError, match="row 1: chosen and rejected answer different prompts"):
        made(tiny.preference_run(tmp_path, data=more), tmp_path)


def test_templates_put_prompt_and_answers_together(tmp_path: Path) -> None:
    train = tiny.lines(tmp_path / "rows.jsonl", [{"q": "w1", "a": "w2", "b": "w3"}])
    more = {"prompt": "Question : {q}", "chosen": " good {a}", "rejected": " bad {b}", "train": train, "test": None}
    recipe, _ = made(tiny.preference_run(tmp_path, data=more), tmp_path)
    assert recipe.processing.decode(recipe.rows("train")[0]["chosen_ids"]) == "good w2 [SEP]"


def test_answers_that_max_tokens_makes_equal_are_left_out(tmp_path: Path) -> None:
    rows = [PAIR, {"prompt": "w1", "chosen": "w2 w3 w4", "rejected": "w2 w3 w5"}]
    data = {"train": tiny.lines(tmp_path / "rows.jsonl", rows), "max_tokens": 3, "test": None}
    recipe, _ = made(tiny.preference_run(tmp_path, data=data), tmp_path)
    assert len(recipe.splits["train"]) == 2 and len(recipe.rows("train")) == 1


@pytest.mark.parametrize(
    ("more", "line"),
    [
        ({"loss": "exo_pair"}, "exo_pair needs label_smoothing"),
        ({"label_smoothing": 0.1}, "label_smoothing has no effect with loss: sigmoid"),
        ({"desirable_weight": 2.0}, "desirable_weight has no effect with loss: sigmoid"),
        ({"data": {"completion": "{a}"}}, "data.completion is not read with loss: sigmoid"),
        ({"loss": "kto", "data": {"chosen": "{a}"}}, "data.chosen is not read with loss: kto"),
        ({"loss": "kto", "training": {"batch_size": 1}}, "batch_size of at least 2"),
        ({"adapter": {"peft_type": "LORA", "lora_dropout": 0.1}}, "lora_dropout=0.1 would change the comparison"),
        ({"loss": "dpo"}, "sigmoid"),
        ({"data": {"format": "messages", "chosen": "{a}"}}, "chosen is a template for format prompt_completion"),
    ],
)
def test_options_that_would_have_no_effect_are_refused(more: dict[str, Any], line: str, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=line):
        parse_config(tiny.preference_run(tmp_path, **more))


@pytest.mark.parametrize(
    ("adapter", "line"),
    [
        (LORA | {"init_lora_weights": "pissa"}, "does not start at its base"),
        ({"method": "spectral_a", "r": 2, "target_modules": ["q_proj", "lm_head"]}, "adapter to `lm_head`"),
    ],
)  # fmt: skip
def test_adapters_that_cannot_be_compared_with_the_base_are_refused(adapter: Any, line: str, tmp_path: Path) -> None:
    if "lm_head" in line and not refuses_an_adapted_lm_head():
        pytest.skip("this trl trains an adapter of lm_head")
    with pytest.raises(OptionError, match=line) as refused:
        made(tiny.preference_run(tmp_path, adapter=adapter), tmp_path)
    assert "\n" not in str(refused.value)


def test_labels_of_one_kind_are_warned_of(tmp_path: Path) -> None:
    train = tiny.lines(tmp_path / "rows.jsonl", [ONE | {"label": "TRUE"}] * 4)
    recipe, _ = made(tiny.preference_run(tmp_path, loss="kto", data={"train": train}), tmp_path)
    assert any("every label of train is True" in said for said in recipe.warnings())


def test_rows_sorted_by_label_are_mixed(tmp_path: Path) -> None:
    train = tiny.lines(tmp_path / "rows.jsonl", [ONE | {"prompt": f"w{i}", "label": i < 8} for i in range(16)])
    recipe, _ = made(tiny.preference_run(tmp_path, loss="kto", data={"train": train}), tmp_path)
    labels = [row["label"] for row in recipe.splits["train"]]
    assert sum(labels) == 8 and labels != sorted(labels, reverse=True)


def test_an_adapter_exports_to_a_lora(tmp_path: Path) -> None:
    from spectune import export_lora

    run(parse_config(tiny.preference_run(tmp_path)), tmp_path / "run")
    export_lora(tmp_path / "run" / "adapter", tmp_path / "lora")
    assert json.loads((tmp_path / "lora" / "adapter_config.json").read_text())["peft_type"] == "LORA"
