"""GGUF headers that lie about their counts end at once, before a foreign parser believes them."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from spectune.checkpoint import open_checkpoint
from spectune.checkpoint.gguf_header import check_gguf_header
from spectune.errors import AdapterError

from ..abilities import needs_gguf
from ..effort import at_most


def header(tensors: int = 0, keys: int = 0, body: bytes = b"", version: int = 3, order: str = "<") -> bytes:
    return b"GGUF" + struct.pack(f"{order}IQQ", version, tensors, keys) + body + b"\0" * 64


def text(words: bytes) -> bytes:
    return struct.pack("<Q", len(words)) + words


LIES: dict[str, bytes] = {
    "no magic": b"GGML" + b"\0" * 100,
    "empty": b"",
    "tensors": header(tensors=2**60),
    "keys": header(keys=2**60),
    "a key without end": header(keys=1, body=struct.pack("<Q", 2**62)),
    "an array of 2^60 bytes": header(keys=1, body=text(b"k") + struct.pack("<IIQ", 9, 0, 2**60)),
    "an array of 2^60 texts": header(keys=1, body=text(b"k") + struct.pack("<IIQ", 9, 8, 2**60)),
    "an array of arrays": header(keys=1, body=text(b"k") + struct.pack("<IIQ", 9, 9, 1)),
    "an unknown kind": header(keys=1, body=text(b"k") + struct.pack("<I", 77)),
    "ten thousand sides": header(tensors=1, body=text(b"t") + struct.pack("<I", 10_000)),
    "big-endian": header(tensors=2**60, order=">"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_lying_header_is_refused_at_once(lie: str, tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    path.write_bytes(LIES[lie])
    with at_most(30), pytest.raises(AdapterError, match="transformers cannot read this GGUF file"):
        check_gguf_header(path)


def test_an_array_without_end_does_not_reach_the_foreign_parser(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    path = tmp_path / "a.gguf"
    path.write_bytes(LIES["an array of 2^60 bytes"])
    with pytest.raises(AdapterError, match="promises"):
        open_checkpoint(path)


@needs_gguf
def test_a_tower_of_layers_is_refused_before_it_is_built(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    writer.add_block_count(10**9)
    writer.add_embedding_length(8)
    writer.add_head_count(2)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(AdapterError, match=r"num_hidden_layers=1e\+09 is more than any model has"):
        open_checkpoint(tmp_path / "a.gguf")
