"""Rewards: each rule scores what it says, a run learns from them alone, and no file starts code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from spectune.errors import DataError, OptionError
from spectune.pages.run_page import render
from spectune.recipes import commented_yaml, parse_config
from spectune.recipes.own_reward import own_reward
from spectune.recipes.reward_config import RewardConfig
from spectune.recipes.rewards import NAMED, name_of
from spectune.recipes.table import recipe_class
from spectune.runs import dry_run, load_run, measure, range_test, run
from spectune.runs.building import build

from . import tiny

pytest.importorskip("trl")
SHARED = {"method": "spectral_r", "r": 4, "share": "kind", "target_modules": ["q_proj", "v_proj"]}


def reward_of(**options: Any) -> Any:
    config = RewardConfig.model_validate(
        {"recipe": "reward", "model": "m", "adapter": SHARED, "data": {"train": "t"}, "training": {"steps": 1}}
        | {"rewards": [options]}
    )
    return config.rewards[0]


@pytest.mark.parametrize(
    ("options", "written", "answer", "score"),
    [
        ({"reward": "gsm8k"}, "so #### 1,000", "2 #### 1000", 1),
        ({"reward": "gsm8k"}, "so 1000", "2 #### 1000", 0),
        ({"reward": "exact_match"}, " a b\n", "a b", 1),
        ({"reward": "exact_match"}, "A b", "a b", 0),
        ({"reward": "exact_match", "ignore_case": True}, "A b", "a b", 1),
        ({"reward": "regex", "pattern": "b+"}, "abb", "", 1),
        ({"reward": "regex", "pattern": "b+"}, "a", "", 0),
        ({"reward": "regex", "pattern": "b+", "whole": True}, "abb", "", 0),
        ({"reward": "regex", "pattern": "ab+", "whole": True}, " abb\n", "", 1),
        ({"reward": "regex", "pattern": "(a|aa)+b"}, "a" * 200, "", 0),  # `re` would need years
        ({"reward": "length", "least": 2, "most": 3}, "a b", "", 1),
        ({"reward": "length", "least": 2, "most": 4}, "a b c d e", "", 0.75),
        ({"reward": "length", "least": 4}, "a b c", "", 0.75),
        ({"reward": "length", "most": 2}, "a b c d e f", "", 0),
        ({"reward": "length", "most": 4, "unit": "characters"}, "a b c", "", 0.75),
        ({"reward": "length", "most": 2, "unit": "tokens"}, "one", "", 0.5),  # three letters, here one token each
        ({"reward": "ends_with", "text": "the end."}, "It was the end. \n", "", 1),
        ({"reward": "ends_with", "text": "the end."}, "It was The End.", "", 0),
        ({"reward": "ends_with", "text": "the end.", "ignore_case": True}, "It was The End.", "", 1),
    ],
)
def test_a_reward_scores_what_it_says(options: Any, written: str, answer: str, score: float) -> None:
    assert reward_of(**options).score(written, answer, len) == score


def test_json_schema_rewards_json_that_fits() -> None:
    pytest.importorskip("jsonschema")
    schema = {"type": "object", "required": ["a"], "properties": {"a": {"type": "integer"}}}
    reward = reward_of(reward="json_schema", definition=schema, valid_json=0.25)
    reward.ready()
    assert [reward.score(text, "", len) for text in ('{"a": 1}', '{"a": "x"}', "{a: 1}", "[" * 9999)] == [1, 0.25, 0, 0]
    for wrong in ({"type": "objekt"}, {"$ref": "https://example.com/schema.json"}):
        with pytest.raises(OptionError, match="definition"):
            reward_of(reward="json_schema", definition=wrong).ready()


def test_every_reward_is_in_the_commented_yaml() -> None:
    text = commented_yaml("reward")
    for kind in NAMED:
        assert all(word in text for word in (name_of(kind), *kind.model_fields) if word != "reward")


def test_a_run_learns_from_rewards_alone_and_shows_what_it_wrote(tmp_path: Path) -> None:
    more = {"training": {"steps": 40, "learning_rate": 0.03}, "evaluation": {"samples": 16}}
    found = run(parse_config(tiny.reward_run(tmp_path, **more)), tmp_path / "run")
    base = measure(*load_base_run(tmp_path / "run"))["test"]["reward"]
    # 0.53 to 0.89 and 0.23 to 0.25 with two seeds, trl 1.14 and 1.16
    assert found.metrics["test"]["reward"] > base + 0.15
    assert measure(*load_run(tmp_path / "run")) == found.metrics
    lines = [json.loads(line) for line in (tmp_path / "run" / "completions.jsonl").read_text().splitlines()]
    assert len(lines) == 40 * 8 and {line["step"] for line in lines} == set(range(1, 41))
    assert found.curves["mean reward"] == pytest.approx(
        [sum(line["reward"] for line in lines if line["step"] == step) / 8 for step in range(1, 41)]
    )
    assert 'id="completions"' in render(found) and {text.step for text in found.completions} == {1, 40}


def load_base_run(folder: Path) -> Any:
    from spectune.runs import load_base

    return load_base(folder)


def test_the_model_is_asked_what_generate_asks(tmp_path: Path) -> None:
    config = parse_config(tiny.reward_run(tmp_path))
    recipe = recipe_class("reward")(config)
    recipe.prepare()
    trainer = recipe.trainer(*build(recipe), tmp_path / "out")
    ids, _, _ = trainer._tokenize_prompts(["3"])
    asked = recipe.as_prompt("w3 w4")
    assert recipe.processing.decode(ids[0]) == "Question : w3 w4 Answer :" == asked


def test_check_shows_the_prompt_and_a_range_test_is_refused(tmp_path: Path) -> None:
    config = parse_config(tiny.reward_run(tmp_path, data={"answer": "{answer}"}, rewards=[{"reward": "gsm8k"}]))
    found = dry_run(config)
    assert found.shown.answer.startswith("w0 ####") and not any(carries for _, carries in found.shown.pieces)
    assert any("8 answers, 4 to each of 2 prompts" in said for said in found.remarks)
    with pytest.raises(OptionError, match="lr: the loss of a reward run"):
        range_test(config, steps=10)


@pytest.mark.parametrize(
    ("rows", "more", "line"),
    [
        ([{"question": "w1"}, {"question": None}], {}, r"row 2: column 'question' is null"),
        ([{"question": "w1"}, {"questoin": "w1"}], {}, r"row 2: the template's column 'question' does not exist"),
        ([{"prompt": "w1"}, {"prompt": " "}], {"data": {"prompt": None}}, "row 2: the prompt is empty"),
        ([{"question": "w1"}], {"rewards": [{"reward": "gsm8k"}]}, "row 1: reward gsm8k compares with a reference"),
        (
            [{"question": "w1", "answer": "#### 1"}, {"question": "w1", "answer": "1"}],
            {"rewards": [{"reward": "gsm8k"}], "data": {"answer": "{answer}"}},
            "row 2: reward gsm8k needs '#### '",
        ),
        ([{"question": "w1 w2 w3"}], {"data": {"max_tokens": 4}}, "no prompt fits into max_tokens=4"),
    ],
)  # fmt: skip
def test_a_bad_row_is_named_with_its_file(rows: Any, more: dict[str, Any], line: str, tmp_path: Path) -> None:
    data = {"test": tiny.lines(tmp_path / "rows.jsonl", rows)} | more.get("data", {})
    values = tiny.reward_run(tmp_path, **(more | {"data": data | {"train": data["test"]}}))
    with pytest.raises(DataError, match=line) as refused:
        recipe_class("reward")(parse_config(values)).prepare()
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("more", "line"),
    [
        ({"rewards": [{"reward": "score.py:f"}]}, "score.py:f is Python code, and no YAML file may start code"),
        ({"rewards": ["score.py:f"]}, "score.py:f is Python code, and no YAML file may start code"),
        ({"rewards": [{"reward": "regx", "pattern": "a"}]}, "'regx' is not a reward.*Did you mean 'regex'"),
        ({"rewards": [{"pattern": "a"}]}, "None is not a reward"),
        ({"rewards": [{"reward": "regex", "pattern": "("}]}, "is not a regular expression"),
        ({"rewards": [{"reward": "regex", "patern": "a"}]}, "patern: unknown key. Did you mean 'pattern'"),
        ({"rewards": [{"reward": "length"}]}, "give least or most"),
        ({"rewards": [{"reward": "length", "least": 3, "most": 2}]}, "most=2 is below least=3"),
        ({"group_size": 3}, "group_size: 3 must divide the 8 answers"),
        ({"training": {"validate_every": 2}}, "validate_every: the loss of rewards says nothing"),
        ({"adapter": "none", "beta": 0.1}, "beta needs an adapter"),
        ({"adapter": {"peft_type": "LORA", "lora_dropout": 0.1}}, "lora_dropout=0.1 would change the model"),
    ],
)
def test_options_that_do_not_fit_are_refused(more: dict[str, Any], line: str, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=line) as refused:
        parse_config(tiny.reward_run(tmp_path, **more))
    assert "\n" not in str(refused.value)


def test_a_run_without_rewards_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="rewards: none is given"):
        recipe_class("reward")(parse_config(tiny.reward_run(tmp_path, rewards=[]))).prepare()


CODE = "def score(prompts, completions, question, **more):\n    return [float('w1' in text) for text in completions]\n"


def with_own(folder: Path, code: str = CODE) -> tuple[Any, dict[str, Any]]:
    (folder / "mine.py").write_text(code)
    entry = own_reward(f"{folder / 'mine.py'}:score").model_dump()
    return parse_config(tiny.reward_run(folder, rewards=[entry], training={"steps": 1})), entry


def test_a_function_of_the_users_is_a_reward(tmp_path: Path) -> None:
    config, _ = with_own(tmp_path)
    found = run(config, tmp_path / "run")
    assert set(found.metrics["test"]) == {"reward", "mine.py:score"}
    said = (tmp_path / "run" / "run.yaml").read_text()
    assert "mine.py:score" in said and str(tmp_path / "mine.py") not in said  # which it was, and not where


def test_a_file_that_names_a_function_runs_nothing(tmp_path: Path) -> None:
    _, entry = with_own(tmp_path, CODE + "open('ran', 'w').close()\n".replace("ran", str(tmp_path / "ran")))
    (tmp_path / "ran").unlink()
    config = parse_config(tiny.reward_run(tmp_path, rewards=[entry | {"sha256": "0" * 64}]))
    with pytest.raises(OptionError, match="mine.py:score is Python code, which no file of a run can start"):
        run(config, tmp_path / "run")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("scores", ["[1.0]", "[float('nan')] * len(completions)", "['x'] * len(completions)"])
def test_scores_that_do_not_fit_are_refused(scores: str, tmp_path: Path) -> None:
    config, _ = with_own(tmp_path, f"def score(completions, **more):\n    return {scores}\n")
    with pytest.raises(DataError, match="mine.py:score: "):
        run(config, tmp_path / "run")


@pytest.mark.parametrize(
    ("asked", "line"),
    [
        ("mine.py", "expected FILE.py:function"),
        ("nowhere.py:f", "the file nowhere.py does not exist"),
        ("{folder}/mine.py:other", "has no function 'other'"),
        ("{folder}/broken.py:f", "cannot run"),
        ("{folder}/text.txt:f", "is not a Python file"),
    ],
)
def test_a_function_that_is_not_there_is_one_line(asked: str, line: str, tmp_path: Path) -> None:
    for name, code in (("mine.py", CODE), ("broken.py", "1 / 0"), ("text.txt", "x")):
        (tmp_path / name).write_text(code)
    with pytest.raises(OptionError, match=line):
        own_reward(asked.format(folder=tmp_path))
