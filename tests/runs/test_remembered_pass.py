"""The pass over a run's examples is spared by a cache or a basis file, and the run says so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from spectune.adapter import spectral_modules
from spectune.checkpoint import TensorFile
from spectune.recipes import parse_config
from spectune.runs import load_run, measure, run
from spectune.runs.remembered_pass import directions_said
from spectune.spectrum import BasisCache

from ..recipes import tiny
from .test_examples_first import HEAD_FIRST, OF_TEXT, built


def test_a_second_run_reads_what_the_first_has_collected_and_another_collects_its_own(tmp_path: Path) -> None:
    svd = {"svd": {"cache_dir": str(tmp_path / "cache")}}
    values = tiny.text_run(tmp_path, adapter=OF_TEXT | svd, **HEAD_FIRST)
    first, again = (built(values)[1] for _ in range(2))
    seeded, wider = (built(values | more)[1] for more in ({"seed": 1}, {"adapter": OF_TEXT | svd | {"basis_rank": 5}}))
    assert directions_said(again) == "gradient (read from the cache)"
    assert all(directions_said(model).startswith("gradient (found in ") for model in (first, seeded, wider))
    bases = [{path: module.U_OR for path, _, module in spectral_modules(model)} for model in (first, again)]
    assert all(torch.equal(U_OR, bases[1][path]) for path, U_OR in bases[0].items())
    assert {entry.solver for entry in BasisCache(tmp_path / "cache").entries()} == {"gradient"}


def test_another_model_under_the_same_name_is_gone_through_again(tmp_path: Path) -> None:
    values = tiny.text_run(tmp_path, adapter=OF_TEXT | {"svd": {"cache_dir": str(tmp_path / "cache")}}, **HEAD_FIRST)
    built(values)
    file = Path(values["model"]) / "model.safetensors"
    tensors, noted = load_file(file), TensorFile.open(file).metadata
    save_file({name: tensor * 1.25 if tensor.ndim == 2 else tensor for name, tensor in tensors.items()}, file, noted)
    assert "found in" in directions_said(built(values)[1])


def test_a_damaged_entry_is_collected_again(tmp_path: Path) -> None:
    values = tiny.text_run(tmp_path, adapter=OF_TEXT | {"svd": {"cache_dir": str(tmp_path / "cache")}}, **HEAD_FIRST)
    built(values)
    (entry,) = (tmp_path / "cache").glob("*/*.safetensors")
    tensors, noted = load_file(entry), TensorFile.open(entry).metadata
    save_file({name: -tensor if name.endswith("U_OR") else tensor for name, tensor in tensors.items()}, entry, noted)
    with pytest.warns(UserWarning, match="damaged cache entry ignored: its contents are not those that its name says"):
        assert BasisCache(tmp_path / "cache").find_data(entry.name[:64]) is None
    assert "found in" in directions_said(built(values)[1])


def test_a_run_reads_its_basis_file_and_finds_it_again_when_it_is_measured(tmp_path: Path) -> None:
    values = tiny.text_run(tmp_path, adapter=OF_TEXT, **HEAD_FIRST)
    config: Any = built(values)[1].peft_config["default"]
    basis = config.spectra.save(tmp_path / "named.safetensors")
    result = run(parse_config(values | {"adapter": OF_TEXT | {"basis": str(basis)}}), tmp_path / "run")
    assert result.directions == f"gradient (read from {basis})"
    saved = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    assert not [name for name in saved if name.endswith("U_OR")]
    recipe, model = load_run(tmp_path / "run")
    assert result.metrics["validation"] == pytest.approx(measure(recipe, model)["validation"], rel=1e-4)
