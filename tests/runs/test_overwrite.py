"""--overwrite: only a run of ours is replaced, whole, by a run that has done its first step."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from spectune.checkpoint import hold_folder
from spectune.errors import OptionError, OutputError
from spectune.recipes import parse_config
from spectune.runs import RunResult, run
from spectune.training import Interrupted

from ..recipes import tiny


def files(folder: Path) -> dict[str, bytes]:
    kept = [path for path in folder.rglob("*") if path.is_file() and path.name != ".lock"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in kept}


@pytest.fixture
def old(tmp_path: Path) -> tuple[dict[str, Any], Path]:
    values = tiny.text_run(tmp_path)
    run(parse_config(values), tmp_path / "run")
    return values, tmp_path / "run"


def test_a_run_is_replaced_whole_when_its_first_step_is_done(old: tuple[dict[str, Any], Path]) -> None:
    values, folder = old
    other = parse_config(values | {"seed": 1, "training": values["training"] | {"steps": 3}})
    before, seen = files(folder), dict[int, bool]()
    found = run(
        other, folder, overwrite=True, on_step=lambda step, steps, loss: seen.setdefault(step, files(folder) == before)
    )
    assert found.seed == 1 and RunResult.read(folder) == found and not any(seen.values())
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["checkpoint-2", "checkpoint-3"]
    assert {path.name for path in folder.parent.iterdir()} == {"bert", "train.jsonl", "validation.jsonl", "run"}
    with hold_folder(folder):
        pass  # its lock was given back
    assert run(other, folder, resume=True) == found


def test_a_run_that_fails_before_its_first_step_leaves_the_old_one(
    old: tuple[dict[str, Any], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    values, folder = old
    before = files(folder)
    wrong = values | {"adapter": {"method": "spectral_a", "target_modules": ["nowhere"]}}
    with pytest.raises(OptionError, match="nowhere"):
        run(parse_config(wrong), folder, overwrite=True)
    assert files(folder) == before

    def fails(*told: Any, **more: Any) -> None:
        raise MemoryError("no room")

    monkeypatch.setattr("transformers.Trainer.training_step", fails)
    with pytest.raises(MemoryError):
        run(parse_config(values | {"seed": 1}), folder, overwrite=True)
    assert files(folder) == before


def test_the_folder_stays_locked_while_its_run_is_replaced(old: tuple[dict[str, Any], Path]) -> None:
    values, folder = old
    refused = list[int]()

    def another(step: int, steps: int, loss: float) -> None:
        with pytest.raises(OutputError, match="another process is writing into this folder"), hold_folder(folder):
            pass
        refused.append(step)

    run(parse_config(values | {"seed": 1}), folder, overwrite=True, on_step=another)
    assert refused == [1, 2, 3, 4, 5, 6]


def test_a_stopped_run_may_be_replaced_and_an_overwriting_run_may_be_stopped(tmp_path: Path) -> None:
    config = parse_config(tiny.text_run(tmp_path))

    def stop(step: int, steps: int, loss: float) -> None:
        if step == 3:
            os.kill(os.getpid(), 2)

    whole = run(config, tmp_path / "whole")
    with pytest.raises(Interrupted):
        run(parse_config(tiny.text_run(tmp_path, seed=1)), tmp_path / "run", on_step=stop)
    with pytest.raises(Interrupted):
        run(config, tmp_path / "run", overwrite=True, on_step=stop)
    assert run(config, tmp_path / "run", resume=True).losses == whole.losses
    assert run(config, tmp_path / "new", overwrite=True).losses == whole.losses  # there is nothing to replace


FOREIGN = {
    "a file of somebody's": "notes.txt in it is not part of a run",
    "a link in it": "is a link, and nothing is written or deleted through links",
    "a link to it": "this is a link, and nothing is deleted through links",
    "another run.yaml": "run.yaml in it is not the file of a run",
    "no run": "contains other files",
    "where we are": "replacing this folder would delete",
    "with --resume": "--resume goes on with a run and --overwrite replaces it",
}


@pytest.mark.parametrize("case", FOREIGN)
def test_nothing_but_a_run_is_replaced(
    case: str, old: tuple[dict[str, Any], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    values, folder = old
    asked, resume = folder, case == "with --resume"
    if case == "a file of somebody's":
        (folder / "notes.txt").write_text("mine")
    elif case == "a link in it":
        (folder / "report.html").symlink_to(folder.parent / "train.jsonl")
    elif case == "a link to it":
        asked = folder.with_name("link")
        asked.symlink_to(folder, target_is_directory=True)
    elif case == "another run.yaml":
        (folder / "run.yaml").write_text("steps: [build, deploy]\n")
    elif case == "no run":
        (folder / "run.yaml").unlink()
    elif case == "where we are":
        monkeypatch.chdir(folder)
    before = files(folder)
    with pytest.raises((OutputError, OptionError), match=FOREIGN[case]):
        run(parse_config(values | {"seed": 1}), asked, overwrite=True, resume=resume)
    assert files(folder) == before
