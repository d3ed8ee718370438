"""A run, a sweep, fused adapters and residents of a bank, as 0.1.0 wrote them: they load and give what is kept."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from spectune import AdapterBank
from spectune.runs import RunResult, load_run
from spectune.sweeps import load_sweep, summarise
from spectune.sweeps.record import read_record

from .make import HERE, Base
from .make_folders import FOLDERS, FUSED, IDS
from .test_golden import TOLERANCE, apart


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy that nothing else reads; the paths in the files are relative to it."""
    monkeypatch.chdir(shutil.copytree(FOLDERS, tmp_path / "folders"))
    return tmp_path / "folders"


def test_a_golden_run_gives_its_logits_and_its_figures(folders: Path) -> None:
    recipe, model = load_run(folders / "run")
    with torch.no_grad():
        logits = model(input_ids=IDS).logits
    assert apart(logits, load_file("logits.safetensors")["logits"]) < TOLERANCE
    result = RunResult.read(folders / "run")
    assert result.steps == 3 and result.metrics["test"]["accuracy"] == recipe.evaluate(model, "test")["accuracy"]


def test_a_golden_sweep_gives_its_summary(folders: Path) -> None:
    records = [read_record(path) for path in sorted(folders.glob("sweep/records/*.json"))]
    kept = json.loads((folders / "sweep" / "comparison.json").read_text())
    found = summarise(load_sweep(folders / "sweep.yaml"), records)
    assert len(records) == 3 and json.loads(json.dumps(found["rows"])) == kept["rows"]


@pytest.mark.parametrize("name", FUSED)
def test_a_golden_fused_adapter_gives_the_same_update(name: str) -> None:
    model = PeftModel.from_pretrained(Base(), str(FOLDERS / name))
    for layer, update_OI in load_file(FOLDERS / name / "updates.safetensors").items():
        found = model.get_submodule(f"base_model.model.{layer}").get_delta_weight("default")
        assert apart(found, update_OI) < TOLERANCE


@pytest.mark.parametrize("case", ["spectral_r", "svft", "svdiff"])
def test_a_golden_adapter_becomes_a_resident_of_a_bank(case: str) -> None:
    updates, base = load_file(HERE / case / "updates.safetensors"), Base()
    model = PeftModel.from_pretrained(Base(), str(HERE / case))
    bank = AdapterBank(model)
    bank.load("kept", HERE / case)
    x_NI = torch.eye(8)[:2]
    with torch.no_grad(), bank(["kept", "__base__"]):
        found = model(x_NI)
    with torch.no_grad():
        plain = base(x_NI)
        for name, update_OI in updates.items():
            base.get_submodule(name).weight += update_OI
        wanted = base(x_NI)
    assert apart(found[0], wanted[0]) < TOLERANCE and apart(found[1], plain[1]) < TOLERANCE
    assert apart(plain, wanted) > 0.01
