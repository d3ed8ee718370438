"""Concepts that were trained apart are merged by what their UNets see."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from spectune.cli.app import app
from spectune.concepts.pipeline import load_concepts, open_pipeline
from spectune.fusion import fuse
from spectune.runs import examples_of, pipeline_base, run

from .concepts import concept_home, config_of

LORA = {"peft_type": "LORA", "r": 2, "lora_alpha": 16, "target_modules": ["to_k", "conv2"]}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    home = concept_home(tmp_path_factory.mktemp("fused"))
    for seed in (0, 1):
        off = {"text_encoder_learning_rate": None, "batch_size": 8}
        told: dict[str, Any] = {"adapter": {"unet": LORA}, "drawings": {"prompts": [], "steps": 2}, "training": off}
        run(config_of(home, seed=seed, **told), home / f"run-{seed}")
    return [home / "run-0", home / "run-1"]


@torch.no_grad()
def off(merged: Path, runs: list[Path]) -> float:
    """Get how far the merged UNet is from each run's own on that run's examples."""
    total, base = 0.0, runs[0].parent / "base"
    for folder in runs:
        own, both = load_concepts(open_pipeline(base), [folder]), load_concepts(open_pipeline(base), [merged])
        for call in examples_of(folder):
            total += float((own.unet(**call).sample - both.unet(**call).sample).square().mean())
    return total


def test_match_looks_at_what_the_unets_are_called_with(runs: list[Path], tmp_path: Path) -> None:
    parts = [str(folder / "adapter" / "unet") for folder in runs]
    neutral = tmp_path / "neutral.txt"
    neutral.write_text("a red star on the right\n", encoding="utf-8")
    command = ["fuse", *parts, "--rule", "match", "--examples", str(runs[0]), "--examples", str(runs[1])]
    for more, output in ([], "matched"), (["--keep", str(neutral)], "keeping"):
        done = CliRunner().invoke(app, [*command, *more, "-o", str(tmp_path / output / "unet")])
        assert done.exit_code == 0, done.output
    fuse(parts, rule="average").save(tmp_path / "mean" / "unet")
    far = {name: off(tmp_path / name, runs) for name in ("matched", "keeping", "mean")}
    assert far["matched"] < 0.95 * far["mean"] and far["matched"] < far["keeping"], far


def test_neutral_prompts_are_seen_at_every_step_of_drawing(runs: list[Path]) -> None:
    found = pipeline_base(runs[0], ["a red star on the right", "a blue ring on the left"])
    assert found is not None
    unet, calls = found
    assert len(calls) == 2  # steps, both prompts in one batch, with guidance twice
    assert not hasattr(unet, "peft_config") and calls[0]["sample"].shape[0] == 4


def test_texts_beside_a_run_of_a_pipeline_are_refused(runs: list[Path], tmp_path: Path) -> None:
    texts = tmp_path / "texts.txt"
    texts.write_text("a red star\n", encoding="utf-8")
    parts = [str(folder / "adapter" / "unet") for folder in runs]
    done = CliRunner().invoke(
        app, ["fuse", *parts, "--rule", "match", "--examples", str(runs[0]), "--examples", str(texts)]
    )
    assert done.exit_code == 1 and "Name a run for each." in str(done.exception)
