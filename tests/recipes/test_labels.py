"""Labels as files write them: one class has one name, and what is not a label is refused with its row."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from spectune.errors import DataError
from spectune.recipes import parse_config
from spectune.recipes.labels import class_name, ordered
from spectune.recipes.table import recipe_class
from spectune.runs import dry_run, run

from . import tiny


def labelled(folder: Path, *labels: Any, **more: Any) -> Any:
    path = folder / "labels.jsonl"
    path.write_text("".join(json.dumps({"text": "w1", "label": label}) + "\n" for label in labels))
    return parse_config(tiny.text_run(folder, data={"train": str(path), "validation": None}, **more))


@pytest.mark.parametrize(
    ("label", "line"),
    [
        (None, "has no label"),
        (math.nan, "has no label"),
        ("", "has no label"),
        (" ", "has no label"),
        (["yes"], r"the label \['yes'\] \(list\) is neither"),
        ({"a": 1}, r"the label .* \(dict\) is neither"),
        (math.inf, r"the label inf \(float\)"),
    ],
)
def test_what_names_no_class_is_refused_with_its_row(label: Any, line: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=rf"labels.jsonl, row 3: {line}"):
        dry_run(labelled(tmp_path, "yes", "no", label))


@pytest.mark.parametrize("label", [None, math.nan, "", "nan", "inf", "1,5", True, [1.0]])
def test_what_is_no_score_is_refused_with_its_row(label: Any, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"labels.jsonl, row 3: (has no score|the score .* is not a number)"):
        dry_run(labelled(tmp_path, 1, "2.5", label, problem="regression"))


def test_true_beside_a_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="labels.jsonl, row 2: the label 'True' is text, but others are true or fal"):
        dry_run(labelled(tmp_path, True, "True", False))
    assert recipe_class("text_classification")(labelled(tmp_path, True, False)).labels == ["0", "1"]  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("labels", "names", "word"),
    [
        (["pos", "pos ", "neg"], {"neg": 1, "pos": 2}, "'pos' and 'pos ' are one class, 'pos'"),
        ([1, 1.0, "1", "1.0", 0], {"0": 1, "1": 4}, "1 and 1.0 and '1' and '1.0' are one class, '1'"),
        (["Pos", "pos", "neg"], {"Pos": 1, "neg": 1, "pos": 1}, "the classes ['Pos', 'pos'] differ only in case"),
        (["caf\u00e9", "cafe\u0301", "a"], {"a": 1, "caf\u00e9": 2}, "are one class"),
    ],
)
def test_one_class_has_one_name_and_that_is_said(
    labels: list[Any], names: dict[str, int], word: str, tmp_path: Path
) -> None:
    found = dry_run(labelled(tmp_path, *labels))
    assert found.classes == {"train": names}
    assert any(word in remark for remark in found.remarks)


def test_training_says_it_too(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="'pos' and 'pos ' are one class"):
        run(labelled(tmp_path, "pos", "pos ", "neg", training={"steps": 1}), tmp_path / "run")


def test_no_word_is_said_of_clean_labels(tmp_path: Path) -> None:
    assert recipe_class("text_classification")(labelled(tmp_path, "yes", "no")).warnings() == []


def test_letters_that_only_look_like_digits_are_texts() -> None:
    assert ordered(["\u00b2", "10", "9"]) == ["10", "9", "\u00b2"]
    assert ordered(["--5", "1"]) == ["--5", "1"] and ordered(["10", "9", "-1"]) == ["-1", "9", "10"]
    assert class_name("2.50") == "2.50" and class_name(2.5) == "2.5"


def test_check_prints_the_classes_of_each_split(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run.yaml").write_text(json.dumps(tiny.text_run(tmp_path)))
    from spectune.cli.check import check

    check(tmp_path / "run.yaml")
    said = capsys.readouterr().out
    assert "classes of train: no 12, yes 12" in said and "classes of validation: no 4, yes 4" in said


def test_a_class_that_the_limit_leaves_without_an_example_is_said(tmp_path: Path) -> None:
    config = labelled(tmp_path, "a", "b", "c")
    config = parse_config(config.plain() | {"data": config.plain()["data"] | {"limit": {"train": 2}}})
    assert any("no training example has the class" in remark for remark in dry_run(config).remarks)


@pytest.mark.parametrize(
    ("labels", "line"),
    [(np.array([[0], [1]]), r"squares.npz:train 0: the label \[0\]"), (np.array([0, math.nan]), "has no lab")],
)
def test_labels_of_arrays_are_read_alike(labels: Any, line: str, tmp_path: Path) -> None:
    values = tiny.image_run(tmp_path)
    np.savez(tmp_path / "squares.npz", x_train=np.zeros((2, 8, 8), np.uint8), y_train=labels)
    with pytest.raises(DataError, match=line):
        dry_run(parse_config(values))


def test_whole_numbers_of_arrays_are_written_alike(tmp_path: Path) -> None:
    values = tiny.image_run(tmp_path)
    pixels = np.zeros((2, 8, 8), np.uint8)
    np.savez(tmp_path / "squares.npz", x_train=pixels, y_train=[0, 1], x_test=pixels, y_test=[0.0, 1.0])
    assert dry_run(parse_config(values)).classes == {"train": {"0": 1, "1": 1}, "test": {"0": 1, "1": 1}}
