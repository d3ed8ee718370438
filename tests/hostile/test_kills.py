"""A slice of the kills: every place of a checkpoint, an export and a fusion; two processes on one folder."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

FUZZ = Path(__file__).parents[2] / "fuzz"
ACTIONS = ("checkpoint", "export_lora", "fuse")
RACES = ("train", "fuse")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not hasattr(os, "fork") or sys.platform != "linux", reason="needs fork and /proc"),
]


@pytest.fixture(scope="module")
def slice_(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The campaign runs in a process of its own: nobody may have computed anything in the one that forks."""
    folder = tmp_path_factory.mktemp("kills")
    command = [sys.executable, str(FUZZ / "kills.py"), "--folder", str(folder), "--out", str(folder / "kills.json")]
    command += [
        "--actions",
        *ACTIONS,
        "--random",
        "0",
        "--torn-every",
        "3",
        "--rerun-every",
        "40",
        "--races",
        "1",
        "--race-verbs",
        *RACES,
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads((folder / "kills.json").read_text())
    return found


def kills_table(recorded: dict[str, Any]) -> str:
    sys.path.insert(0, str(FUZZ))
    try:
        table: str = importlib.import_module("kills_table").table(recorded)
        return table
    finally:
        sys.path.remove(str(FUZZ))


def _judge(found: dict[str, Any]) -> None:
    for tally in found["actions"]:
        assert tally["findings"] == [], tally["action"]
        assert tally["lost"] == tally["input_changed"] == 0
        assert tally["reruns"] == tally["reruns_to_the_same"] >= 1


def test_a_kill_in_any_place_loses_nothing_and_a_rerun_ends_in_the_same_bits(slice_: dict[str, Any]) -> None:
    assert [tally["action"] for tally in slice_["actions"]] == list(ACTIONS)
    for tally in slice_["actions"]:
        assert tally["kills_at_places"] == tally["places"] >= 10 and tally["kills_in_files"] >= 1
        assert tally["left_something_hidden"] >= 1 and tally["hidden_after_rerun"] == 0
    _judge(slice_)


def test_of_two_processes_on_one_folder_one_stands_whole(slice_: dict[str, Any]) -> None:
    races = {race["name"]: race for race in slice_["races"]}
    assert races.keys() == {"train", "fuse", "fuse, overwriting"}
    for race in races.values():
        assert race["findings"] == [] and race["mixtures"] == 0 and race["rounds"] == 1
    assert races["fuse"]["one_refused"] == 1


def test_the_page_has_the_table_of_the_recorded_kills() -> None:
    recorded = json.loads((FUZZ / "kills.json").read_text())
    page = (FUZZ.parent / "docs" / "reliability.md").read_text("utf-8")
    assert kills_table(recorded) in page and f"{recorded['kills']:,} kills" in page
