"""Whatever is wrong with data, labels or metrics is said before the first step; what fails after it loses nothing."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from spectune.errors import DataError, MissingExtraError, OptionError
from spectune.recipes import parse_config
from spectune.recipes.text_classification import TextClassification
from spectune.runs import Run, dry_run, load_run, measure, run
from spectune.runs import train as training

from . import tiny


def write(path: Path, *rows: dict[str, Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def refused(values: dict[str, Any], line: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`check` and `train` say it in one line, and no step is taken."""
    monkeypatch.setattr(training, "_fit", lambda *_: pytest.fail("a step was taken"))
    config = parse_config(values)
    for tried in (lambda: dry_run(config), lambda: run(config, folder / "run")):
        with pytest.raises((DataError, OptionError, MissingExtraError), match=line) as caught:
            tried()
        assert "\n" not in str(caught.value)


GOOD = {"text": "good", "label": "yes"}


@pytest.mark.parametrize(
    ("rows", "more", "line"),
    [
        ([GOOD, {"text": "w1", "label": "maybe"}], {}, r"test.jsonl, row 2: the class 'maybe' does not occur in train"),
        ([GOOD, {"text": "w1", "label": None}], {}, r"test.jsonl, row 2: has no label"),
        ([GOOD, {"text": "w1"}], {}, r"test.jsonl, row 2: no column 'label'"),
        ([GOOD, {"label": "no"}], {}, r"test.jsonl, row 2: no column 'text'"),
        ([GOOD], {"metrics": ["pearson"]}, "'pearson' does not fit classes"),
    ],
)
def test_a_test_set_that_does_not_fit(
    rows: list[dict[str, Any]], more: dict[str, Any], line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = {"test": write(tmp_path / "test.jsonl", *rows)}
    refused(tiny.text_run(tmp_path, data=data, evaluation=more), line, tmp_path, monkeypatch)


def test_f1_of_three_classes_also_where_the_test_set_has_two(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train = write(tmp_path / "three.jsonl", *({"text": f"w{i}", "label": i % 3} for i in range(12)))
    test = write(tmp_path / "test.jsonl", {"text": "w1", "label": 0}, {"text": "w2", "label": 1})
    data = {"train": train, "validation": None, "test": test}
    values = tiny.text_run(tmp_path, data=data, evaluation={"metrics": ["f1"]})
    refused(values, "'f1' is only for two classes, but the data have 3. Use macro_f1", tmp_path, monkeypatch)


def test_a_class_that_only_the_held_out_share_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"text": f"w{i}", "label": f"class {i}"} for i in range(8)]
    data = {"train": write(tmp_path / "rare.jsonl", *rows), "validation": None, "validation_share": 0.25}
    line = r"rare.jsonl, row \d: the class 'class \d' does not occur in train \(2 such rows in validation\)"
    refused(tiny.text_run(tmp_path, data=data), line, tmp_path, monkeypatch)


def test_scores_that_are_no_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    test = write(tmp_path / "test.jsonl", {"text": "w1", "label": 1.5}, {"text": "w1", "label": "high"})
    train = write(tmp_path / "t.jsonl", {"text": "w1", "label": 1}, {"text": "w2", "label": 2})
    values = tiny.text_run(tmp_path, problem="regression", data={"train": train, "validation": None, "test": test})
    refused(values, "test.jsonl, row 2: the score .high. is not a number", tmp_path, monkeypatch)


@pytest.mark.parametrize(
    ("data", "evaluation", "line"),
    [
        ({"test": [{"question": "w1"}]}, {}, r"test.jsonl, row 1: the template's column 'answer'"),
        ({"validation": [{"question": "w1 " * 40, "answer": "w2"}]}, {}, "data.validation: no response fits into"),
        (
            {"test": [{"question": "w1", "answer": "#### 1"}, {"question": "w1", "answer": "one"}]},
            {"metrics": ["gsm8k"]},
            r"test.jsonl, row 2: gsm8k needs '#### ' and a number",
        ),
    ],
)
def test_held_out_prompts_and_answers(
    data: dict[str, Any], evaluation: dict[str, Any], line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {split: write(tmp_path / f"{split}.jsonl", *rows) for split, rows in data.items()}
    values = tiny.lm_run(tmp_path, evaluation=evaluation)
    values["data"] |= files
    for split, rows in data.items():
        write(tmp_path / f"{split}.jsonl", *rows)  # tiny writes its own over it
    refused(values, line, tmp_path, monkeypatch)


def test_answers_cannot_be_compared_where_there_are_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = {"format": "text", "prompt": "{question}", "completion": None}
    values = tiny.lm_run(tmp_path, data=data, evaluation={"metrics": ["exact_match"]})
    refused(values, "format=text has no prompts", tmp_path, monkeypatch)


def test_a_harness_that_is_missing_or_lacks_the_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = tiny.lm_run(tmp_path, evaluation={"lm_eval": {"tasks": ["gsm8kk"]}})
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    refused(values, r"cannot import lm-eval", tmp_path, monkeypatch)
    tasks = type(sys)("lm_eval.tasks")
    tasks.TaskManager = lambda: type("Tasks", (), {"all_tasks": ["gsm8k"]})  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "lm_eval", type(sys)("lm_eval"))
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", tasks)
    config = parse_config(values)
    with pytest.raises(OptionError, match="task 'gsm8kk' does not exist. Did you mean 'gsm8k'"):
        dry_run(config)


def pictures(folder: Path, *classes: str) -> Path:
    for name in classes:
        (folder / name).mkdir(parents=True)
        for i in range(3):
            Image.fromarray(np.full((8, 8, 3), 40 * i, np.uint8)).save(folder / name / f"{i}.png")
    return folder


def test_folders_of_a_class_that_training_has_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = {"train": str(pictures(tmp_path / "train", "cat", "dog"))}
    data["test"] = str(pictures(tmp_path / "test", "cat", "fox"))
    line = r"fox/0.png: the class 'fox' does not occur in train \(3 such pictures in test\)"
    refused(tiny.image_run(tmp_path, data=data), line, tmp_path, monkeypatch)


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_damaged_picture(split: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = {name: str(pictures(tmp_path / name, "cat", "dog")) for name in ("train", "test")}
    whole = (tmp_path / split / "dog" / "2.png").read_bytes()
    (tmp_path / split / "dog" / "2.png").write_bytes(whole[: len(whole) // 2])
    refused(tiny.image_run(tmp_path, data=data), r"dog/2.png: pillow cannot read this image", tmp_path, monkeypatch)


def test_a_metric_that_fails_after_training_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = parse_config(tiny.text_run(tmp_path))
    with monkeypatch.context() as patch:
        patch.setattr(TextClassification, "evaluate", lambda *_: 1 / 0)
        with pytest.raises(DataError, match=r"the training is saved, but the metrics of validation failed: ZeroDiv"):
            run(config, tmp_path / "run")
    found = Run(tmp_path / "run")
    assert found.result.losses and found.result.metrics == {} and not found.is_finished
    recipe, model = load_run(tmp_path / "run")
    figures = measure(recipe, model)
    again = run(config, tmp_path / "run", resume=True)
    assert again.metrics == figures and again.losses == found.result.losses and found.is_finished
