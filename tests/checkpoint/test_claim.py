"""A folder belongs to one process, until that process ends, however it ends."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from spectune.checkpoint import claim, fresh_folder, hold_folder, writer
from spectune.errors import OutputError

KILLED = """
import os, signal, sys
from spectune.checkpoint import fresh_folder, hold_folder
from pathlib import Path
with hold_folder(Path(sys.argv[1])), fresh_folder(Path(sys.argv[1], "out")) as partial:
    (partial / "half").write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


def old_folder(goal: Path) -> Path:
    goal.mkdir()
    (goal / "old").touch()
    return goal


def test_what_a_killed_process_left_is_deleted_by_the_next_and_its_lock_is_gone(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert [name.startswith(".out.partial-") for name in names(tmp_path) if name != ".lock"] == [True]
    with hold_folder(tmp_path), fresh_folder(tmp_path / "out") as partial:
        assert [name for name in names(tmp_path) if name != ".lock"] == [partial.name]


def test_what_a_living_process_writes_is_left_alone_and_the_second_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="another process has written into this folder meanwhile") as caught:
        with fresh_folder(tmp_path / "out") as first:
            (first / "first").touch()
            with fresh_folder(tmp_path / "out") as second:
                (second / "second").touch()
                assert first.is_dir()
            assert names(tmp_path / "out") == ["second"]
    assert "\n" not in str(caught.value)
    assert names(tmp_path) == ["out"] and names(tmp_path / "out") == ["second"]


@pytest.mark.parametrize("moment", ["another holds it", "another has deleted it"])
def test_a_folder_that_is_taken_for_an_abandoned_one_before_it_is_claimed_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    taken, claimed = [], claim._claim

    def late(folder: Path) -> int | None:
        if not taken:
            taken.append(folder)
            if moment == "another holds it":
                taken.append(claimed(folder))
            else:
                folder.rmdir()
        return claimed(folder)

    monkeypatch.setattr(claim, "_claim", late)
    with fresh_folder(tmp_path / "out") as partial:
        assert partial != taken[0] and partial.is_dir()
    assert (tmp_path / "out").is_dir()


def test_of_two_that_overwrite_the_last_one_stands_whole(tmp_path: Path) -> None:
    goal = old_folder(tmp_path / "out")
    with fresh_folder(goal, overwrite=True) as first:
        (first / "first").touch()
        with fresh_folder(goal, overwrite=True) as second:
            (second / "second").touch()
    assert names(tmp_path) == ["out"] and names(goal) == ["first"]


def test_while_a_folder_is_replaced_its_name_is_never_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    goal, seen = old_folder(tmp_path / "out"), []
    one, other = old_folder(tmp_path / "one"), tmp_path / "other"
    other.mkdir()
    if not claim.exchange(one, other):
        pytest.skip("this disk cannot swap folders")
    for name in ("rename", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *args, real=real, **more: seen.append(args) or real(*args, **more))
    with fresh_folder(goal, overwrite=True) as partial:
        (partial / "new").touch()
    assert names(goal) == ["new"] and seen == []


@pytest.mark.parametrize("finished", [False, True])
def test_what_a_kill_between_two_renames_left_is_put_back(tmp_path: Path, finished: bool) -> None:
    old_folder(tmp_path / ".out.replaced-0123abcd")
    if finished:
        (tmp_path / "out").mkdir()
    if finished:
        with fresh_folder(tmp_path / "out") as partial:
            (partial / "new").touch()
    else:
        with pytest.raises(OutputError, match="contains 1 entry"), fresh_folder(tmp_path / "out"):
            pass
    assert names(tmp_path) == ["out"] and names(tmp_path / "out") == ["new" if finished else "old"]


def test_hidden_things_of_another_name_are_not_touched(tmp_path: Path) -> None:
    kept = [".out.partial-mine", ".out.partial-0123abcde", ".out2.partial-0123abcd", ".o*t.partial-0123abcd"]
    for name in kept:
        (tmp_path / name).mkdir()
    (tmp_path / ".out.partial-01234567").symlink_to(tmp_path / kept[0])
    with fresh_folder(tmp_path / "out"):
        pass
    assert names(tmp_path) == sorted([*kept, ".out.partial-01234567", "out"])


def test_a_second_process_is_refused_in_one_line(tmp_path: Path) -> None:
    with hold_folder(tmp_path):
        with pytest.raises(OutputError, match="another process is writing into this folder") as caught:
            with hold_folder(tmp_path):
                pass
    assert "\n" not in str(caught.value)
    with hold_folder(tmp_path):
        pass


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_a_disk_that_is_full_only_when_it_is_synced_has_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def full(handle: int) -> None:
        raise OSError(number, os.strerror(number))

    goal = old_folder(tmp_path / "out")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match=os.strerror(number)), fresh_folder(goal, overwrite=True) as partial:
        (partial / "new").write_text("new")
    with pytest.raises(OutputError, match=os.strerror(number)):
        writer.write_atomically(goal / "old", "new")
    assert names(tmp_path) == ["out"] and names(goal) == ["old"] and (goal / "old").read_text() == ""


def test_a_disk_that_cannot_sync_at_all_is_written_nevertheless(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cannot(handle: int) -> None:
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(os, "fsync", cannot)
    with fresh_folder(tmp_path / "out") as partial:
        (partial / "new").touch()
    assert names(tmp_path / "out") == ["new"]
