"""Every field of every config with values of every wrong kind: one line, and never a traceback."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from peft import PeftModel, get_peft_model

from spectune import SpectralConfig, merge_checkpoint
from spectune.errors import SpectuneError
from spectune.tuner import SVDOptions, load_attached
from tests.golden.make import HERE, Base
from tests.hostile.test_adapters import changed, with_config

VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 3, 2**70, -(2**70), 0.5, -0.5, 1e400, float("nan"), "", "x", "\x1b[2J", "9" * 400,
    [], ["x"], [0], [[]], [{}], [None], [1e400], {}, {"x": 1}, {"x": []}, {"": {}}, {"x": None},
]  # fmt: skip
METHODS = ("spectral_a", "spectral_r", "svft", "specadapt", "svdiff", "lidb", "orthogonal_adaptation")
FIELDS = [field.name for field in fields(SpectralConfig)]


def tried(action: Any) -> None:
    """Do something that either goes well or is refused in one line."""
    with suppress(SpectuneError):  # whose line is printable by its class
        action()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [*FIELDS, *(f"svd.{field.name}" for field in fields(SVDOptions))])
def test_a_field_of_a_wrong_kind_is_one_line_in_code(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # a folder for the cache may be named, and is the user's own wish here
    for method in METHODS:
        for value in VALUES:
            asked = {"method": method, "target_modules": ["lin0"]}
            asked |= {"svd": {name[4:]: value}} if name.startswith("svd.") else {name: value}
            tried(lambda asked=asked: get_peft_model(Base(), SpectralConfig(**asked)))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [*FIELDS, *(f"svd.{field.name}" for field in fields(SVDOptions))])
def test_a_field_of_a_wrong_kind_is_one_line_in_a_file(name: str, tmp_path: Path) -> None:
    folder = changed("spectral_a", tmp_path / "adapter", with_config())
    place = folder / "adapter_config.json"
    honest = json.loads(place.read_text())
    for value in VALUES:
        change = {"svd": {name[4:]: value}} if name.startswith("svd.") else {name: value}
        place.write_text(json.dumps({**honest, **change}))
        tried(lambda: load_attached(Base(), folder))
        tried(lambda: merge_checkpoint(HERE / "base.safetensors", folder, tmp_path / "merged", overwrite=True))
        if name != "peft_type":  # which decides whether PEFT asks us at all
            tried(lambda: PeftModel.from_pretrained(Base(), str(folder)))
