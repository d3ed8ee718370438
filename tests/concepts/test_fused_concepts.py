"""Concepts that were trained apart are merged by what their UNets see."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from spectune.cli.app import app
from spectune.concepts.loss import held_out_error
from spectune.concepts.pipeline import load_concepts, open_pipeline
from spectune.fusion import collect_grams, fuse
from spectune.runs import examples_of, load_run, pipeline_base, run

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


def test_the_rules_look_at_what_the_unets_are_called_with(runs: list[Path], tmp_path: Path) -> None:
    parts = [str(folder / "adapter" / "unet") for folder in runs]
    neutral = tmp_path / "neutral.txt"
    neutral.write_text("a red star on the right\n", encoding="utf-8")
    command = ["fuse", *parts, "--examples", str(runs[0]), "--examples", str(runs[1]), "--rule"]
    asked = {"matched": ["match"], "keeping": ["match", "--keep", str(neutral)], "gradient": ["gradient"]}
    for output, more in asked.items():
        done = CliRunner().invoke(app, [*command, *more, "-o", str(tmp_path / output / "unet")])
        assert done.exit_code == 0, done.output
    fuse(parts, rule="average").save(tmp_path / "mean" / "unet")
    base = runs[0].parent / "base"
    grams = [collect_grams(load_concepts(open_pipeline(base), [one]).unet, examples_of(one)) for one in runs]
    fuse(parts, rule="gradient", activations=grams).save(tmp_path / "by hand" / "unet")
    far = {name: off(tmp_path / name, runs) for name in (*asked, "mean", "by hand")}
    assert far["matched"] < 0.95 * far["mean"] and far["matched"] < far["keeping"], far
    assert far["gradient"] == pytest.approx(far["by hand"], rel=1e-5) != pytest.approx(far["mean"], rel=1e-5)


def test_examples_are_what_the_unet_sees_of_held_out_pictures(runs: list[Path]) -> None:
    loaded: Any = load_run(runs[0])
    recipe, model = loaded
    seen: list[torch.Tensor] = []
    model.unet.register_forward_pre_hook(lambda _, args, told: seen.append(told["sample"]), with_kwargs=True)
    held_out_error(model, [recipe.collate(recipe.plain_rows("train"))])
    given = torch.cat([call["sample"] for call in examples_of(runs[0])])
    assert len(given) == 24  # three pictures at eight levels of noise, in another order
    torch.testing.assert_close(*(rows.flatten(1).sum(1).sort().values for rows in (given, torch.cat(seen))))


def test_neutral_prompts_are_seen_at_every_step_of_drawing(runs: list[Path]) -> None:
    unet, calls = pipeline_base(runs[0], ["a red star on the right", "a blue ring on the left"])
    assert len(calls) == 2  # steps, both prompts in one batch, with guidance twice
    assert not hasattr(unet, "peft_config") and calls[0]["sample"].shape[0] == 4


def test_texts_beside_a_run_of_a_pipeline_are_refused(runs: list[Path], tmp_path: Path) -> None:
    texts = tmp_path / "texts.txt"
    texts.write_text("a red star\n", encoding="utf-8")
    parts = [str(folder / "adapter" / "unet") for folder in runs]
    done = CliRunner().invoke(
        app, ["fuse", *parts, "--rule", "match", "--examples", str(runs[0]), "--examples", str(texts)]
    )
    assert done.exit_code == 1 and "Name a run of text_to_image for each" in str(done.exception)
