"""The experiments for PEFT's method comparison: PEFT reads them, and they are what the script writes."""

from __future__ import annotations

import importlib.util
import json

import pytest
from peft import PeftConfig

from spectune import SpectralConfig

from .conftest import BENCHMARKS

FILE = BENCHMARKS / "peft_method_comparison" / "make_experiments.py"
spec = importlib.util.spec_from_file_location("make_experiments", FILE)
assert spec is not None and spec.loader is not None
experiments = importlib.util.module_from_spec(spec)
spec.loader.exec_module(experiments)


@pytest.mark.parametrize("name", experiments.METHODS)
def test_peft_reads_the_experiment_that_the_script_writes(name: str) -> None:
    config = PeftConfig.from_pretrained(str(experiments.EXPERIMENTS / name))
    assert isinstance(config, SpectralConfig) and config.task_type == "CAUSAL_LM"
    options = experiments.METHODS[name]
    assert {option: getattr(config, option) for option in options} == options
    changed = json.loads((experiments.EXPERIMENTS / name / "training_params.json").read_text())
    assert changed["optimizer_kwargs"]["lr"] == experiments.rate(options)


def test_the_page_has_their_sizes() -> None:
    assert (experiments.HERE / "README.md").read_text(encoding="utf-8") == experiments.readme()
    assert experiments.trained({"method": "spectral_a", "r": 32}) == 28 * 32 * (3072 + 3072 + 1024 + 3072)
    shared = experiments.trained({"method": "specadapt", "r": 2, "basis_rank": 10, "shared_core": True})
    assert shared == 28 * 2 * 2 * 10 * 2 + 2 * 2
