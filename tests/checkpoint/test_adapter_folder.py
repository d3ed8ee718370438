"""A saved adapter is checked before anything is done with it, and says what it is."""

import json
import os

import pytest
import torch
from safetensors.torch import save_file

from spectune.checkpoint import read_adapter_folder
from spectune.errors import AdapterError

KEY = "base_model.model.q.spectune_adapter.A_U"


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "adapter"
    path.mkdir()
    (path / "adapter_config.json").write_text(json.dumps({"peft_type": "SPECTUNE", "r": 2}))
    save_file({KEY: torch.ones(3, 2)}, path / "adapter_model.safetensors")
    return path


def refused(path):
    with pytest.raises(AdapterError) as caught:
        read_adapter_folder(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_saved_adapter_says_what_it_holds(folder):
    adapter = read_adapter_folder(folder)
    assert (adapter.peft_type, adapter.config["r"]) == ("SPECTUNE", 2)
    assert (adapter.names, adapter.shapes) == ((KEY,), {KEY: (3, 2)})
    assert torch.equal(adapter.tensor(KEY), torch.ones(3, 2))
    assert adapter.require("LORA", "SPECTUNE") is adapter


def test_an_adapter_of_another_kind_is_named(folder):
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "IA3"}))
    with pytest.raises(AdapterError, match="a SPECTUNE adapter is needed, but this is a IA3 one"):
        read_adapter_folder(folder).require("SPECTUNE")


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ("{", "not valid JSON"),
        ("[]", "this is a list"),
        ("{}", "no peft_type"),
        ('{"peft_type": 3}', "no peft_type"),
    ],
)
def test_a_config_that_is_none_is_refused(folder, content, found):
    (folder / "adapter_config.json").write_text(content)
    assert found in refused(folder)


def test_a_config_larger_than_a_mebibyte_is_refused_unread(folder):
    (folder / "adapter_config.json").write_text(" " * (2**20 + 1))
    assert "1,048,577 bytes" in refused(folder)


def test_what_is_missing_is_said(folder, tmp_path):
    assert "there is nothing here" in refused(tmp_path / "nowhere")
    assert "this is a file" in refused(folder / "adapter_config.json")
    assert "Its subfolders have one: adapter" in refused(tmp_path)
    (folder / "adapter_model.safetensors").unlink()
    assert "there is no such file" in refused(folder)
    (folder / "adapter_model.bin").touch()
    assert "is a pickle" in refused(folder)
    (folder / "adapter_config.json").rename(folder / "config.json")
    assert "It is a whole model" in refused(folder)


def test_links_as_in_the_hugging_face_cache_are_followed(folder, tmp_path):
    (tmp_path / "snapshot").mkdir()
    for file in folder.iterdir():
        (tmp_path / "snapshot" / file.name).symlink_to(file)
    assert read_adapter_folder(tmp_path / "snapshot").names == (KEY,)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_pipe_in_place_of_a_file_is_refused_and_not_waited_for(folder, name):
    (folder / name).unlink()
    os.mkfifo(folder / name)
    assert "not a regular file" in refused(folder)
