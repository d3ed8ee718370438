"""`spectune decompose` and `spectune cache`, as a user runs them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from spectune.cli.app import app, main


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SPECTUNE_CACHE", str(tmp_path / "bases"))
    tensors = {f"layers.{i}.q.weight": torch.randn(40, 30) for i in range(3)} | {"embed.weight": torch.randn(9, 8)}
    save_file(tensors, tmp_path / "model.safetensors")
    return tmp_path


def run(*words: object) -> None:
    app([str(word) for word in words], standalone_mode=False)


def test_decompose_fills_the_default_cache_and_says_so(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("decompose", model, "--r", 4, "--json")
    first = json.loads(capsys.readouterr().out)
    assert (first["solved"], first["found"], first["skipped"]) == (3, 0, {"embeddings and heads": 1})
    run("decompose", model, "--r", 2)
    out = " ".join(capsys.readouterr().out.split())
    assert "0 weights decomposed, 3 already stored" in out and "left out: 1 (embeddings and heads)" in out
    assert str(model / "bases") in out


def test_more_directions_than_a_weight_has_are_all_of_them(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("decompose", model, "--r", 64)
    capsys.readouterr()
    run("cache", "ls", "--json")
    assert [e["directions"] for e in json.loads(capsys.readouterr().out)["entries"]] == [30] * 3


def test_the_cache_is_listed_and_cleared(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("decompose", model, "--r", 4)
    run("cache", "ls")
    out = " ".join(capsys.readouterr().out.split())
    assert "layers.0.q" in out and "40x30" in out and "3 entries" in out
    run("cache", "clear")
    assert "3 entries" in capsys.readouterr().out
    run("cache", "ls", "--json")
    assert json.loads(capsys.readouterr().out)["entries"] == []


@pytest.mark.parametrize(
    "words, complaint",
    [
        (["--dtype", "bfloat61"], "Did you mean 'bfloat16'"),
        (["--columns", "middle"], "must be top or bottom"),
        (["--max-memory", "few"], "'few' is not a size"),
        (["--max-memory", "1KB"], "more than --max-memory (0.00 GiB)"),
        (["--include", "("], "is not a regular expression"),
        (["--r", "0"], "at least 1"),
    ],
)
def test_a_wrong_request_is_one_line(
    model: Path, words: list[str], complaint: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["spectune", "decompose", str(model), *words])
    with pytest.raises(SystemExit) as stopped:
        main()
    err = capsys.readouterr().err
    assert stopped.value.code == 1 and complaint in err.strip().splitlines()[-1] and "Traceback" not in err
