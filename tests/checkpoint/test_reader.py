"""Names and shapes without loading; a damaged or foreign file is one clear error, never a crash later."""

import json
import struct

import pytest
import torch
from safetensors.torch import save_file

from spectune.checkpoint import TensorFile, open_checkpoint
from spectune.errors import AdapterError

TENSORS = {"a.weight": torch.arange(6.0).reshape(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)}


@pytest.fixture
def model(tmp_path):
    save_file(TENSORS, tmp_path / "model.safetensors", metadata={"format": "pt"})
    return tmp_path


@pytest.fixture
def sharded(tmp_path):
    for number, (name, tensor) in enumerate(TENSORS.items()):
        save_file({name: tensor}, tmp_path / f"part{number}.safetensors")
    write_index(tmp_path, {"a.weight": "part0.safetensors", "b": "part1.safetensors"})
    return tmp_path


def write_index(folder, weight_map):
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def refused(path):
    with pytest.raises(AdapterError) as caught:
        open_checkpoint(path)
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message
    return message


@pytest.mark.parametrize("kind", ["model", "sharded"])
def test_names_shapes_and_dtypes_come_without_reading_a_tensor(kind, request, monkeypatch):
    folder = request.getfixturevalue(kind)
    opened = []
    original = TensorFile._bytes
    monkeypatch.setattr(TensorFile, "_bytes", lambda *a, **k: opened.append(a) or original(*a, **k))
    checkpoint = open_checkpoint(folder)
    assert checkpoint.names == ("a.weight", "b")
    assert checkpoint.shapes == {"a.weight": (2, 3), "b": (4,)}
    assert checkpoint.dtypes == {"a.weight": torch.float32, "b": torch.bfloat16}
    assert not opened
    assert torch.equal(checkpoint.tensor("a.weight"), TENSORS["a.weight"])
    assert len(opened) == 1
    assert all(torch.equal(tensor, TENSORS[name]) for name, tensor in checkpoint)


def test_one_file_may_be_opened_by_its_own_name(model):
    (model / "model.safetensors").rename(model / "other.safetensors")
    assert open_checkpoint(model / "other.safetensors").names == ("a.weight", "b")
    assert open_checkpoint(model).names == ("a.weight", "b")
    assert TensorFile.open(model / "other.safetensors").metadata == {"format": "pt"}


def test_a_wrong_name_lists_the_near_misses(model, sharded):
    for checkpoint in (open_checkpoint(model), open_checkpoint(sharded / "part0.safetensors")):
        with pytest.raises(AdapterError, match=r"Did you mean 'a\.weight'"):
            checkpoint.tensor("a.weigth")


def test_a_truncated_file_says_how_many_bytes_are_missing(model):
    file = model / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-3])
    assert f"the file has {len(whole) - 3:,} bytes, but its header promises {len(whole):,}" in refused(model)
    file.write_bytes(whole[:20])
    assert "the file has 20 bytes, but its header alone would be" in refused(model)


def raw(header: bytes) -> bytes:
    return struct.pack("<Q", len(header)) + header


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"hello, this is text and no tensors",
        raw(b"not json"),
        raw(b"[1, 2]"),
        raw(b'{"x": 1}'),
        raw(b'{"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}'),
        raw(b'{"x": {"dtype": "F32", "shape": [-1, -2], "data_offsets": [0, 8]}}'),
        raw(b'{"x": {"dtype": "F32", "shape": "ab", "data_offsets": [0, 8]}}'),
        b"\x80\x02}q\x00." * 10,
    ],
)
def test_a_file_that_is_no_safetensors_is_refused(model, content):
    (model / "model.safetensors").write_bytes(content)
    assert "not a safetensors file" in refused(model)


def test_a_git_lfs_pointer_is_recognised(model):
    (model / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:12\n")
    assert "git lfs pull" in refused(model)


def test_an_unknown_dtype_is_named(model):
    header = b'{"x": {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}}'
    (model / "model.safetensors").write_bytes(raw(header) + b"\0")
    assert "stored as F4" in refused(model)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt"])
def test_a_pickle_is_refused_in_a_folder_and_by_name(tmp_path, name):
    torch.save(TENSORS, tmp_path / name)
    assert "is a pickle" in refused(tmp_path)
    assert "is a pickle" in refused(tmp_path / name)


def test_what_is_missing_is_said(tmp_path):
    assert "contains no safetensors file" in refused(tmp_path)
    assert "no such model folder" in refused(tmp_path / "nowhere")
    (tmp_path / "model.safetensors").mkdir()
    assert "not a regular file" in refused(tmp_path)


def test_several_files_without_an_index_are_refused(sharded):
    (sharded / "model.safetensors.index.json").unlink()
    assert "2 safetensors files and no index" in refused(sharded)


def test_an_index_that_promises_too_much_is_refused(sharded):
    write_index(sharded, {"a.weight": "part0.safetensors", "c": "part1.safetensors"})
    assert "lists the tensor 'c' in part1.safetensors" in refused(sharded)
    write_index(sharded, {"a.weight": "part7.safetensors"})
    assert "part7.safetensors: a safetensors file is needed, but there is no such file" in refused(sharded)


@pytest.mark.parametrize("shard", ["../model.safetensors", "/etc/passwd", "x/../../y", "..\\y", "C:\\y", ""])
def test_an_index_cannot_lead_out_of_its_folder(sharded, shard):
    write_index(sharded, {"a.weight": shard})
    assert "outside its folder" in refused(sharded)


@pytest.mark.parametrize("content", ["[]", "{}", '{"weight_map": [1]}', '{"weight_map": {"a": 1}}', "{"])
def test_an_index_that_is_none_is_refused(sharded, content):
    (sharded / "model.safetensors.index.json").write_text(content)
    refused(sharded)
