"""What stands under its real name is complete; everything else is gone."""

import json
import os
import signal
import stat
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from spectune.checkpoint import fresh_folder, save_tensors, write_atomically
from spectune.checkpoint import writer as writer_file
from spectune.errors import OutputError


def test_the_folder_appears_when_the_block_ends_and_not_before(tmp_path):
    goal = tmp_path / "new" / "deep" / "out"
    with fresh_folder(goal) as partial:
        (partial / "a.txt").write_text("done")
        assert not goal.exists()
        assert partial.parent == goal.parent
    assert (goal / "a.txt").read_text() == "done"
    assert os.listdir(goal.parent) == ["out"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_an_exception_leaves_nothing_behind_not_even_parents(tmp_path, error):
    with pytest.raises(error), fresh_folder(tmp_path / "new" / "out") as partial:
        (partial / "a.txt").write_text("half")
        raise error
    assert os.listdir(tmp_path) == []


def test_a_killed_process_never_leaves_half_a_folder_under_the_real_name(tmp_path):
    script = """
        import os, signal, sys
        from spectune.checkpoint import fresh_folder
        with fresh_folder(sys.argv[1]) as partial:
            (partial / "a.txt").write_text("half")
            os.kill(os.getpid(), signal.SIGKILL)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script), str(tmp_path / "out")], check=False)
    assert done.returncode == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    assert [name.startswith(".out.partial-") for name in os.listdir(tmp_path)] == [True]


@pytest.mark.parametrize("kind", ["folder", "file", "link"])
def test_an_occupied_path_is_refused_before_any_work(tmp_path, kind):
    goal = tmp_path / "out"
    if kind == "folder":
        goal.mkdir()
        (goal / "precious").write_text("kept")
    else:
        (tmp_path / "file").write_text("kept")
        goal.write_text("kept") if kind == "file" else goal.symlink_to(tmp_path / "file")
    before = sorted(os.listdir(tmp_path))
    worked = False
    with pytest.raises(OutputError, match="contains 1 entry" if kind == "folder" else "this is a file") as caught:
        with fresh_folder(goal):
            worked = True
    assert not worked
    assert "\n" not in str(caught.value)
    assert sorted(os.listdir(tmp_path)) == before


def test_an_empty_folder_may_be_used(tmp_path):
    (tmp_path / "out").mkdir()
    with fresh_folder(tmp_path / "out") as partial:
        (partial / "a").touch()
    assert os.listdir(tmp_path / "out") == ["a"]


def test_overwrite_replaces_the_old_folder_only_once_the_new_one_is_complete(tmp_path):
    goal = tmp_path / "out"
    goal.mkdir()
    (goal / "old").touch()
    with pytest.raises(ValueError), fresh_folder(goal, overwrite=True):
        assert os.listdir(goal) == ["old"]
        raise ValueError
    assert os.listdir(goal) == ["old"]
    with fresh_folder(goal, overwrite=True) as partial:
        (partial / "new").touch()
    assert os.listdir(goal) == ["new"]
    assert os.listdir(tmp_path) == ["out"]


def test_the_old_folder_comes_back_when_the_last_rename_fails(tmp_path, monkeypatch):
    goal = tmp_path / "out"
    goal.mkdir()
    (goal / "old").touch()
    rename = Path.rename

    def fail_for_the_new(self, target):
        if ".partial-" in self.name:
            raise OSError(5, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail_for_the_new)
    monkeypatch.setattr(writer_file, "exchange", lambda one, other: False)  # a disk that cannot swap folders
    with pytest.raises(OutputError, match="Input/output error"), fresh_folder(goal, overwrite=True):
        pass
    assert os.listdir(goal) == ["old"]
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("precious", ["cwd", "home"])
def test_the_working_and_the_home_directory_are_never_replaced(tmp_path, monkeypatch, precious):
    inner = tmp_path / "out" / "inner"
    inner.mkdir(parents=True)
    monkeypatch.chdir(inner) if precious == "cwd" else monkeypatch.setenv("HOME", str(inner))
    with pytest.raises(OutputError, match="would delete"), fresh_folder(tmp_path / "out", overwrite=True):
        pass


def test_a_link_to_a_folder_stays_a_link(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk")
    with fresh_folder(tmp_path / "out") as partial:
        (partial / "a").touch()
    assert (tmp_path / "out").is_symlink()
    assert os.listdir(tmp_path / "disk") == ["a"]


def test_a_place_where_nothing_can_be_created_is_one_clear_line(tmp_path):
    (tmp_path / "file").write_text("")
    for goal in (tmp_path / "file" / "out", Path("/proc/spectune/out"), Path("/proc/out")):
        with pytest.raises(OutputError, match="cannot create this folder") as caught, fresh_folder(goal):
            pass
        assert str(goal) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("content", ["grüße", b"\x00\xff"])
def test_a_file_is_written_whole(tmp_path, content):
    write_atomically(tmp_path / "a", content)
    assert (tmp_path / "a").read_bytes() == (content.encode() if isinstance(content, str) else content)
    assert os.listdir(tmp_path) == ["a"]


def test_a_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    (tmp_path / "a").write_text("old")

    def full(path, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OutputError, match="cannot write 3 bytes: No space left on device"):
        write_atomically(tmp_path / "a", "new")
    assert (tmp_path / "a").read_text() == "old"
    assert os.listdir(tmp_path) == ["a"]


def test_an_interrupted_tensor_file_keeps_the_old_one(tmp_path, monkeypatch):
    save_tensors(tmp_path / "a.safetensors", {"x": torch.ones(2)})

    def interrupted(tensors, path, metadata):
        Path(path).write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(writer_file, "save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_tensors(tmp_path / "a.safetensors", {"x": torch.zeros(2)})
    assert torch.equal(load_file(tmp_path / "a.safetensors")["x"], torch.ones(2))
    assert os.listdir(tmp_path) == ["a.safetensors"]


def test_views_and_tied_tensors_are_written_as_their_values(tmp_path):
    whole = torch.arange(12.0).reshape(3, 4)
    tensors = {
        "whole": whole,
        "tied": whole,
        "turned": whole.T,
        "row": whole[1],
        "p": torch.nn.Parameter(whole),
    }
    save_tensors(tmp_path / "a.safetensors", tensors, {"made": "here"})
    read = load_file(tmp_path / "a.safetensors")
    assert all(torch.equal(read[name], tensors[name]) for name in tensors)
    header = (tmp_path / "a.safetensors").read_bytes()
    length = int.from_bytes(header[:8], "little")
    assert json.loads(header[8 : 8 + length])["__metadata__"] == {"format": "pt", "made": "here"}


def test_files_have_the_permissions_that_open_would_give(tmp_path):
    save_tensors(tmp_path / "a.safetensors", {"x": torch.ones(2)})
    (tmp_path / "plain").touch()
    modes = {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("a.safetensors", "plain")}
    assert len(modes) == 1


def test_tensors_into_a_missing_folder_are_an_output_error(tmp_path):
    with pytest.raises(OutputError, match="cannot write 8 bytes"):
        save_tensors(tmp_path / "missing" / "a.safetensors", {"x": torch.ones(2)})
