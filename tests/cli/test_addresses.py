"""An address as an output is refused, whatever writes: as a path it would be a folder named s3: on this machine."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from spectune.checkpoint import fresh_folder, save_tensors, write_atomically
from spectune.cli.reproduce import reproduce
from spectune.errors import OutputError
from spectune.recipes import parse_config
from spectune.runs import run
from spectune.spectrum import BasisCache, DataSpectra

from ..recipes import tiny

FOLDER = "s3://bucket/out"
REFUSED = "^s3:/{1,2}bucket/out.*: this is an address, and a path on this machine is needed. Write to a folder"


def folder_of(path: str | Path) -> None:
    with fresh_folder(path):
        pass


def cache_in(path: str) -> None:
    BasisCache(path).store_data("0" * 64, DataSpectra("gradient", {}, 1))


WRITERS = {
    "a folder": folder_of,
    "a folder as a Path": lambda path: folder_of(Path(path)),
    "a file": lambda path: write_atomically(f"{path}/a.json", "{}"),
    "tensors": lambda path: save_tensors(f"{path}/a.safetensors", {"a": torch.ones(1)}),
    "a cache": cache_in,
    "a published experiment": lambda path: reproduce("glue-deberta", output=Path(path), small=True),
}


@pytest.mark.parametrize("name", list(WRITERS))
def test_an_address_is_not_taken_for_a_path(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OutputError, match=REFUSED):
        WRITERS[name](FOLDER)
    assert not list(tmp_path.iterdir())


def test_a_run_is_refused_before_its_model_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = parse_config(tiny.text_run(tmp_path))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OutputError, match=REFUSED):
        run(config, FOLDER)
    assert not Path("s3:").exists()
