"""`spectune inspect`: tables, JSON, the page, and one line for each failure."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig, get_peft_model

from spectune.cli.inspect import inspect
from spectune.errors import SpectuneError

from ..models import MODELS
from .test_commands import spectune


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("inspect")
    model = MODELS["llama"].fresh()
    model.save_pretrained(str(place / "model"))  # type: ignore[operator]
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    get_peft_model(model, config).save_pretrained(str(place / "lora"))  # type: ignore[arg-type]
    return place


def test_a_model_is_shown_as_tables_and_a_page(folder: Path) -> None:
    done = spectune(
        *("inspect", "model", "--r", "4", "--html", "model.html", "--sample", "1"), cwd=folder, COLUMNS="100"
    )
    assert done.returncode == 0, done.stderr
    for words in (
        "q_proj",
        "energy at 4",
        "spectral_a",
        "dora",
        "looked at 7 of 14",
        "2 matrices (embeddings and heads)",
    ):
        assert words in done.stdout, words
    assert "<svg" in (folder / "model.html").read_text("utf-8")


def test_an_adapter_is_shown_with_and_without_its_base(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    inspect(folder / "lora", base=folder / "model", r=4)
    said = capsys.readouterr().out
    assert "intruders" in said and "most changed (|dW| / |W|)" in said and "not known" not in said
    inspect(folder / "lora")
    said = capsys.readouterr().out
    assert "not known here" in said and "in top" not in said


def test_json_is_all_of_stdout(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    inspect(folder / "model", quick=True, as_json=True, include="down_proj", html=folder / "x.html")
    found = json.loads(capsys.readouterr().out)
    assert found["targets"] == 2 and found["left_out"] == {"not in --include": 14} and (folder / "x.html").exists()
    inspect(folder / "lora", as_json=True)
    assert json.loads(capsys.readouterr().out)["layer_count"] == 4


FAILURES: list[tuple[str, dict[str, Any], str]] = [
    ("nowhere", {}, "a model is needed, but there is no"),
    ("model", {"base": Path("model")}, "-base works only for an adapter"),
    ("lora", {"sample": 2, "include": "q"}, "-include, --sample works only for a model"),
    ("model", {"r": 0}, "--r 0 must be at least 1"),
    ("model", {"include": "q_prog"}, "has no weights for 'q_prog'"),
]


@pytest.mark.parametrize(("name", "options", "line"), FAILURES, ids=[f"{name} {list(o)}" for name, o, _ in FAILURES])
def test_failures_are_one_line(name: str, options: dict[str, Any], line: str, folder: Path) -> None:
    with pytest.raises(SpectuneError, match=line) as caught:
        inspect(folder / name, **options)
    assert "\n" not in str(caught.value)
