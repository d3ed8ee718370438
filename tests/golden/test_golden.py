"""Adapters that were saved once, by the first release of their format: they load to the same update for good."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from spectune.adapter import saved_modules
from spectune.checkpoint import open_checkpoint, read_adapter_folder
from spectune.errors import AdapterError
from spectune.methods import METHODS

from .make import CASES, HERE, Base

# The files hold float32, and another LAPACK finds the basis to about 1e-6.
TOLERANCE = 2e-5


def expected(case: str) -> dict[str, torch.Tensor]:
    return load_file(HERE / case / "updates.safetensors")


def apart(found_OI: torch.Tensor, wanted_OI: torch.Tensor) -> float:
    return float(torch.linalg.norm(found_OI - wanted_OI) / torch.linalg.norm(wanted_OI))


def test_every_method_has_a_golden_file() -> None:
    assert {options["method"] for options in CASES.values()} == set(METHODS)
    assert {path.name for path in HERE.iterdir() if (path / "adapter_config.json").exists()} == set(CASES)
    assert sum(path.stat().st_size for path in HERE.rglob("*.*") if path.suffix not in (".py", ".pyc")) < 200_000


@pytest.mark.parametrize("case", CASES)
def test_a_golden_file_gives_the_same_update_without_a_model(case: str) -> None:
    wanted = expected(case)
    found = {
        layer: module.delta()
        for layer, _, _, module in saved_modules(
            read_adapter_folder(HERE / case), open_checkpoint(HERE / "base.safetensors")
        )
    }
    assert found.keys() == wanted.keys()
    for layer, delta in found.items():
        update_OI = delta.left_OP @ delta.core_matrix() @ delta.right_QI
        assert apart(update_OI.detach(), wanted[layer]) < TOLERANCE


@pytest.mark.parametrize("case", CASES)
def test_a_golden_file_gives_the_same_update_through_peft(case: str) -> None:
    model = PeftModel.from_pretrained(Base(), str(HERE / case))
    for layer, update_OI in expected(case).items():
        found = model.get_submodule(f"base_model.model.{layer}").get_delta_weight("default")
        assert apart(found, update_OI) < TOLERANCE


@pytest.mark.parametrize("version", [2, 0, -1, True, 1.0, "1", None])
def test_a_newer_or_senseless_format_is_refused_with_and_without_a_model(version: object, tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    shutil.copytree(HERE / "spectral_a", folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "format_version": version}))
    with pytest.raises(AdapterError, match=r"reads up to 1\. Upgrade"):
        list(saved_modules(read_adapter_folder(folder), open_checkpoint(HERE / "base.safetensors")))
    with pytest.raises(AdapterError, match=r"reads up to 1\. Upgrade"):
        PeftModel.from_pretrained(Base(), str(folder))
