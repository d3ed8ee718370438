"""`fuzz/run.py` says by its exit status whether anything was found."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest

FUZZ = Path(__file__).parents[2] / "fuzz"


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(FUZZ))
    module = importlib.import_module("run")
    # The process that runs the tests keeps its own limits.
    monkeypatch.setattr(module.resource, "setrlimit", lambda *_: None)
    monkeypatch.setattr(module.signal, "signal", lambda *_: None)
    monkeypatch.setattr(module.signal, "setitimer", lambda *_: None)
    yield module
    sys.modules.pop("run")


def fuzzed(run: Any, out: Path, monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["run.py", *words, "--out", str(out)])
    status: int = run.main()
    return status


def test_a_run_without_findings_ends_with_zero(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert fuzzed(run, tmp_path, monkeypatch, "tensor_header", "--count", "20") == 0


def test_a_run_with_findings_ends_with_one(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def judge(target: Any, data: bytes) -> None:
        if data not in target.seeds:
            raise ZeroDivisionError

    monkeypatch.setattr(importlib.import_module("targets"), "judge", judge)
    assert fuzzed(run, tmp_path, monkeypatch, "tensor_header", "--count", "20") == 1
    assert json.loads((tmp_path / "tensor_header-mutate-1.json").read_text())["findings"]


def test_the_session_of_nox_runs_every_door(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fuzzed(run, tmp_path, monkeypatch, "--list") == 0
    assert capsys.readouterr().out.split() == list(importlib.import_module("targets").all_targets())
    assert '"--list"' in (FUZZ.parent / "noxfile.py").read_text()
