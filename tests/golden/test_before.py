"""Folders that were made before 0.1.0 (its development, up to the new names of the rooms): what becomes of them."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from spectune.errors import AdapterError, OptionError, OutputError
from spectune.recipes import load_config
from spectune.runs import Run
from spectune.sweeps.record import read_record

BEFORE = Path(__file__).parent / "before"


def test_an_old_run_opens_with_its_configuration_and_its_figures(tmp_path: Path) -> None:
    run = Run.open(shutil.copytree(BEFORE / "text", tmp_path / "run"))
    assert run.is_finished and run.result.metrics["test"] == {"accuracy": 0.5} and run.result.steps == 6
    assert run.config().adapters[0]["method"] == "spectral_a" and run.result.seed == run.config().seed


def test_an_old_record_of_a_sweep_says_how_to_go_on() -> None:
    with pytest.raises(OutputError, match=r"written before 0\.1\.0\. Delete .*before and repeat the command: finished"):
        read_record(BEFORE / "record.json")


def test_an_old_concept_says_what_its_keys_are_called_and_what_still_loads(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"before 0\.1\.0.*pipeline is model, images is data\.train"):
        load_config(BEFORE / "concept.yaml")
    (tmp_path / "concept.json").touch()
    with pytest.raises(AdapterError, match=r"before 0\.1\.0\. Draw with it by .*load_concepts"):
        Run.open(tmp_path)
