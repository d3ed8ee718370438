"""A disk that is full, read-only or not where it was said to be: one clear line, nothing lost, and a rerun goes on."""

from __future__ import annotations

import importlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from spectune import export_lora, fuse, merge_checkpoint
from spectune.checkpoint import fresh_folder, open_checkpoint
from spectune.errors import SpectuneError
from spectune.recipes import parse_config
from spectune.runs import run

FUZZ = Path(__file__).parents[2] / "fuzz"
# Action -> how many of its places are tried, spread over all of them.
TRIED = {"checkpoint": 6, "save": 4, "export_lora": 5, "merge": 5, "fuse": 5, "extract": 5, "decompose": 5, "train": 2}
SMALL_DISK = "4m"


@pytest.fixture(scope="module")
def fuzz() -> Iterator[Any]:
    sys.path.insert(0, str(FUZZ))
    try:
        yield importlib.import_module("actions"), importlib.import_module("places")
    finally:
        sys.path.remove(str(FUZZ))


@pytest.fixture(scope="module")
def world(fuzz: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    actions, _ = fuzz
    made = actions.make_world(tmp_path_factory.mktemp("disk") / "world")
    values = made.training()
    values["training"]["keep_checkpoints"] = 100
    run(parse_config(values), made.path / "kept")
    return made


def begin(actions: Any, world: Any, name: str, folder: Path) -> tuple[Any, dict[str, str]]:
    """Get the action and the old tree, with the folder as it stands before the action."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    action = actions.ACTIONS[name]
    action.before(world, folder)
    return action, actions.tree(folder / "out") if (folder / "out").exists() else {}


def all_there_ever_is(actions: Any, world: Any, name: str, out: Path) -> dict[str, str]:
    """Get what a finished action has left, with every checkpoint that there was on the way."""
    found: dict[str, str] = actions.tree(out)
    if name in ("train", "checkpoint"):
        found |= {n: d for n, d in actions.tree(world.path / "kept").items() if n.startswith("checkpoints/")}
    return found


def refused(work: Callable[[], object]) -> str | None:
    """Get the one line that something is refused with, None if it was done; other errors go through."""
    line = None
    try:
        work()
    except SpectuneError as error:
        line = str(error)
    assert line is None or line.isprintable()
    return line


@pytest.mark.parametrize("kind", ["full_at", "read_only_at"])
@pytest.mark.parametrize("name", list(TRIED))
def test_a_disk_that_gives_out_anywhere_is_one_line_and_loses_nothing(
    name: str, kind: str, fuzz: Any, world: Any, tmp_path: Path
) -> None:
    actions, places = fuzz
    folder, events = tmp_path / "work", []
    action, old = begin(actions, world, name, folder)
    with places.watching(folder, lambda number, event, path: events.append(event)):
        action.act(world, folder)
    new = all_there_ever_is(actions, world, name, folder / "out")
    growing = [place for place, event in enumerate(events, 1) if event in places.GROWS]
    assert len(growing) >= 4
    for place in growing[:: -(-len(growing) // TRIED[name])]:
        begin(actions, world, name, folder)
        with places.watching(folder, getattr(places, kind)(place)):
            line = refused(lambda: action.act(world, folder))
        assert line is not None and ("No space left" in line or "Read-only" in line or "all bytes" in line), line
        out = folder / "out"
        if out.exists() or old:
            assert actions.broken(action, out, old, new) is None, (place, line)
            actions.readable(out)
        action.act(world, folder)  # there is room again
        assert actions.broken(action, out, new if action.whole else old, new) is None
        assert set(actions.tree(out)) == {n for n in new if (out / n).exists()} and actions.hidden(folder) == 0


def test_a_real_small_disk_fills_up_and_works_again_once_there_is_room(fuzz: Any, world: Any, tmp_path: Path) -> None:
    actions, _ = fuzz
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={SMALL_DISK}", "none", str(disk)]
    if not shutil.which("mount") or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("this user may not mount a disk")
    try:
        for name in ("save", "export_lora", "merge", "fuse", "extract", "decompose", "train"):
            _fill_up(actions, world, name, disk / "work")
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def _fill_up(actions: Any, world: Any, name: str, folder: Path) -> None:
    action, old = begin(actions, world, name, folder)
    ballast = folder.with_name("ballast")
    handle, size = os.open(ballast, os.O_WRONLY | os.O_CREAT), 0
    with suppress(OSError):
        while True:
            size += os.write(handle, bytes(4096))
    os.ftruncate(handle, max(size - 4096, 0))  # room for a small file
    os.close(handle)
    line = refused(lambda: action.act(world, folder))
    assert line is not None and ("No space left" in line or "all bytes" in line), line
    if action.whole and old:
        assert actions.tree(folder / "out") == old
    ballast.unlink()
    action.act(world, folder)
    actions.readable(folder / "out")
    assert actions.hidden(folder) == 0
    shutil.rmtree(folder)


@pytest.mark.parametrize("place", ["a file", "below a file", "a missing base"])
def test_an_output_or_input_that_cannot_be_is_one_line(place: str, world: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("kept")
    out = {"a file": tmp_path / "file", "below a file": tmp_path / "file" / "out"}.get(place, tmp_path / "out")
    base, adapter = (tmp_path / "gone" if place == "a missing base" else world.base), world.adapter("new")
    values = world.training() | ({"model": str(base)} if place == "a missing base" else {})
    works: dict[str, Callable[[], object]] = {
        "export": lambda: export_lora(adapter, out, base_model=str(base), overwrite=True),
        "merge": lambda: merge_checkpoint(base, adapter, out, overwrite=True),
        "fuse": lambda: fuse([adapter], base=base).save(out, overwrite=True),
        "train": lambda: run(parse_config(values), out),
    }
    for name, work in works.items():
        assert refused(work), name
    assert (tmp_path / "file").read_text() == "kept"


def test_a_missing_cache_and_one_that_is_a_file_are_one_line(fuzz: Any, world: Any, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("kept")
    line = refused(lambda: fuzz[0].ACTIONS["decompose"].act(world, tmp_path))
    assert line is not None and "cannot write to the cache" in line
    assert (tmp_path / "out").read_text() == "kept"


def test_whoever_writes_into_the_folder_a_full_disk_is_an_output_error(tmp_path: Path, fuzz: Any) -> None:
    import torch
    from safetensors.torch import save_file

    _, places = fuzz
    writers: list[Callable[[Path], object]] = [
        lambda folder: save_file({"x": torch.ones(2)}, folder / "a.safetensors"),
        lambda folder: torch.save(torch.ones(2), folder / "a.pt"),
        lambda folder: (folder / "a.json").write_text("{}"),
    ]

    def fill(write: Callable[[Path], object]) -> None:
        with fresh_folder(tmp_path / "new" / "out") as folder, places.watching(tmp_path, places.full_at(1)):
            write(folder)

    for write in writers:
        line = refused(lambda write=write: fill(write))
        assert line is not None and str(tmp_path / "new" / "out") in line and ".partial-" not in line
        assert os.listdir(tmp_path) == []


def test_an_unreadable_input_is_no_full_disk(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), fresh_folder(tmp_path / "out"):
        open(tmp_path / "missing")
    with pytest.raises(SpectuneError, match="no such model folder"), fresh_folder(tmp_path / "out"):
        open_checkpoint(tmp_path / "missing")
    assert os.listdir(tmp_path) == []
