"""A run that diverges ends with a page, a sentence and its last good checkpoint; empty texts end no evaluation."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from spectune.errors import DivergedError
from spectune.recipes import parse_config
from spectune.runs import RunResult, load_run, measure, run
from spectune.training.loop import Loop
from tests.cli.test_runs import spectune

from ..recipes import tiny


@contextmanager
def loss_at(step: int, value: float) -> Iterator[None]:
    """The loss of one step is another one, and so are the numbers that it leaves."""
    right = Loop.compute_loss

    def wrong(self: Any, *args: Any, **more: Any) -> Any:
        loss = right(self, *args, **more)
        return loss * value if self.state.global_step + 1 == step and self.model.training else loss

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Loop, "compute_loss", wrong)
        yield


@pytest.mark.parametrize("make", [tiny.text_run, tiny.lm_run, tiny.image_run])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_run_that_diverges_leaves_its_last_good_checkpoint(make: Any, value: float, tmp_path: Path) -> None:
    config = parse_config(make(tmp_path, training={"steps": 6, "save_every": 2}))
    with loss_at(5, value), pytest.raises(DivergedError) as said:
        run(config, tmp_path / "run")
    for words in ("at step 5 of 6", "peak learning rate 0.01", "holds step 4, the last good checkpoint", "0.001 with"):
        assert words in str(said.value), words
    result = RunResult.read(tmp_path / "run")
    assert len(result.losses) == 5 and not math.isfinite(result.losses[-1])
    kept = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    saved = load_file(tmp_path / "run" / "checkpoints" / "checkpoint-4" / "adapter_model.safetensors")
    assert kept.keys() == saved.keys() and all(torch.equal(kept[name], saved[name]) for name in kept)
    assert measure(*load_run(tmp_path / "run")) == result.metrics
    with pytest.raises(DivergedError, match="at step 5 of 6"):
        run(config, tmp_path / "run", resume=True)


def test_numbers_that_overflow_in_the_last_step_are_not_saved(tmp_path: Path) -> None:
    """The loss of the last step is still finite: what it did shows in the numbers alone."""
    config = parse_config(tiny.text_run(tmp_path, training={"steps": 4, "save_every": 2, "learning_rate": 1e38}))
    steps = torch.optim.AdamW.step
    done: list[int] = []

    def last(self: Any, *args: Any, **more: Any) -> Any:
        done.append(1)
        found = steps(self, *args, **more) if len(done) == 4 else None
        for group in self.param_groups if len(done) == 4 else []:
            for p in group["params"]:
                p.data *= math.inf
        return found

    with pytest.MonkeyPatch.context() as patch, pytest.raises(DivergedError, match="infinite after step 4 of 4"):
        patch.setattr(torch.optim.AdamW, "step", last)
        run(config, tmp_path / "run")
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["checkpoint-2"]


def test_the_command_ends_with_a_page_a_sentence_and_a_failure(tmp_path: Path) -> None:
    values = tiny.text_run(tmp_path, training={"steps": 6, "save_every": 100})
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    with loss_at(3, math.nan):
        done = spectune("train", "run.yaml", "-o", "run", "--json", cwd=tmp_path)
    assert done.returncode == 1 and "the loss is NaN at step 3 of 6" in done.stderr and not done.stdout
    assert "no checkpoint was saved before" in done.stderr and "Traceback" not in done.stderr
    page = (tmp_path / "run" / "report.html").read_text()
    assert "The run diverged: the loss is NaN at step 3 of 6" in page and "<svg" in page
    assert json.loads((tmp_path / "run" / "result.json").read_text())["losses"][2] == "NaN"
    for verb in ("evaluate", "report"):
        again = spectune(verb, "run", cwd=tmp_path)
        assert again.returncode == (1 if verb == "evaluate" else 0) and "unexpected" not in again.stderr
    assert "the run diverged" in spectune("evaluate", "run", cwd=tmp_path).stderr
    again = spectune("train", "run.yaml", "-o", "run", "--resume", cwd=tmp_path)
    assert again.returncode == 1 and "at step 3 of 6" in again.stderr
    mended = spectune("train", "run.yaml", "training.learning_rate=1e-3", "-o", "run", "--overwrite", cwd=tmp_path)
    assert mended.returncode == 0, mended.stderr


def test_a_loss_that_is_nan_before_anything_was_learned_is_not_blamed_on_the_rate(tmp_path: Path) -> None:
    with loss_at(1, math.nan), pytest.raises(DivergedError, match="the rate is not the cause: look at the examples"):
        run(parse_config(tiny.text_run(tmp_path)), tmp_path / "run")


@pytest.mark.parametrize("pooling", ["model", "mean"])
def test_empty_texts_end_neither_training_nor_evaluation(pooling: str, tmp_path: Path) -> None:
    """A tokenizer that adds nothing to a text, and more empty texts than a batch holds."""
    values = tiny.text_run(tmp_path, training={"steps": 2}, data={"text": "text"})
    tokens = tiny.tokenizer(pairs=True)
    tokens.save_pretrained(values["model"])
    for name in ("train", "validation"):
        rows = [{"text": "" if i < 20 else "good", "label": ("no", "yes")[i % 2]} for i in range(24)]
        Path(values["data"][name]).write_text("".join(json.dumps(row) + "\n" for row in rows))
    said = list[str]()
    found = run(parse_config(values | {"pooling": pooling}), tmp_path / "run", on_warning=said.append)
    assert len(said) == 2 and "20 of 24 texts of train are empty" in said[0]
    assert all(map(math.isfinite, found.losses)) and found.metrics["validation"]["accuracy"] >= 0


def test_empty_prompts_and_answers_end_neither_training_nor_evaluation(tmp_path: Path) -> None:
    pytest.importorskip("trl")
    values = tiny.lm_run(tmp_path, training={"steps": 2}, evaluation={"metrics": ["loss", "exact_match"]})
    rows = [{"question": "", "answer": "" if i < 8 else "w1"} for i in range(16)]
    for name in ("train", "test"):
        Path(values["data"][name]).write_text("".join(json.dumps(row) + "\n" for row in rows))
    values["data"] |= {"prompt": "{question}", "completion": "{answer}"}
    found = run(parse_config(values), tmp_path / "run", on_warning=lambda said: None)
    assert all(map(math.isfinite, [*found.losses, found.metrics["test"]["loss"]]))
