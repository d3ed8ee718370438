"""Runs survive: an interrupted run ends in the weights of an uninterrupted one, and nothing saved is ever lost."""

from __future__ import annotations

import errno
import os
import re
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainingArguments

from spectune.checkpoint import hold_folder
from spectune.errors import OptionError, OutputError
from spectune.recipes import parse_config
from spectune.runs import RunResult, run
from spectune.training import Interrupted
from spectune.training.arguments import checked_arguments
from spectune.training.checkpoints import checkpoints

from ..recipes import tiny

LORA = {"peft_type": "LORA", "r": 2, "target_modules": ["query"], "lora_dropout": 0.5}
ADALORA = {"peft_type": "ADALORA", "init_r": 4, "target_r": 2, "total_step": 6, "tinit": 1, "tfinal": 2, "deltaT": 1}
RUNS = {
    "spectral_a": (tiny.text_run, {}),
    "lora with dropout, accumulating": (tiny.text_run, {"adapter": LORA, "training": {"gradient_accumulation": 2}}),
    "specadapt with dropout": (
        tiny.text_run,
        {"adapter": {"method": "specadapt", "r": 2, "weight_dropout": 0.3, "target_modules": ["query"]}},
    ),
    "directions of the data": (
        tiny.text_run,
        {
            "adapter": {"method": "svft", "pattern": "banded", "basis_rank": 4, "directions": "gradient"}
            | {"target_modules": ["query", "value"]},
            "training": {"head_first": True},
        },
    ),
    "muon": (
        tiny.text_run,
        {
            "adapter": {"method": "specadapt", "target_modules": ["query", "value"], "singular_decay": 0.5},
            "training": {"optimizer": "muon", "gradient_accumulation": 2},
        },
    ),
    "AdaLoRA": (tiny.text_run, {"adapter": ADALORA | {"target_modules": ["query", "value"]}}),
    "full fine-tuning": (tiny.text_run, {"adapter": "none"}),
    "augmented images": (tiny.image_run, {}),
    "full tuning of a model whose files bear other names": (tiny.image_run, {"adapter": "none"}),
    "language model": (tiny.lm_run, {"training": {"steps": 6, "save_every": 2}}),
    "rewards": (tiny.reward_run, {"training": {"gradient_accumulation": 2}, "beta": 0.1}),
    "preferences, accumulating": (tiny.preference_run, {"training": {"gradient_accumulation": 2}}),
    "labelled preferences": (tiny.preference_run, {"loss": "kto"}),
    "preferences without a reference": (tiny.preference_run, {"loss": "orpo"}),
    "preferences of a whole model": (tiny.preference_run, {"adapter": "none"}),
}


def stop_after(step: int) -> Any:
    def on_step(done: int, steps: int, loss: float) -> None:
        if done == step:
            os.kill(os.getpid(), signal.SIGINT)

    return on_step


def weights(folder: Path) -> bytes:
    return next(folder.glob("*/*.safetensors")).read_bytes()


@pytest.mark.filterwarnings("ignore:The following rank_pattern keys:RuntimeWarning")  # PEFT's, on loading what it saved
@pytest.mark.parametrize("name", list(RUNS))
def test_a_resumed_run_ends_in_the_same_weights(name: str, tmp_path: Path) -> None:
    make, more = RUNS[name]
    config = parse_config(make(tmp_path, **more))
    whole = run(config, tmp_path / "whole")
    with pytest.raises(Interrupted, match="stopped at step 4"):
        run(config, tmp_path / "parts", on_step=stop_after(3))
    assert not (tmp_path / "parts" / "result.json").exists()
    resumed = run(config, tmp_path / "parts", resume=True)
    assert resumed.losses == whole.losses and len(whole.losses) == 6
    assert resumed.metrics == whole.metrics and resumed.curves == whole.curves
    assert weights(tmp_path / "parts") == weights(tmp_path / "whole")


def test_validation_losses_are_kept_with_their_steps_over_a_stop(tmp_path: Path) -> None:
    config = parse_config(tiny.text_run(tmp_path, training={"validate_every": 2}))
    whole = run(config, tmp_path / "whole")
    assert [step for step, _ in whole.validation_losses] == [2, 4, 6]
    assert len({loss for _, loss in whole.validation_losses}) == 3
    with pytest.raises(Interrupted):
        run(config, tmp_path / "run", on_step=stop_after(3))
    assert run(config, tmp_path / "run", resume=True).validation_losses == whole.validation_losses
    assert RunResult.read(tmp_path / "run").validation_losses == whole.validation_losses


def test_a_process_trains_on_one_device() -> None:
    """transformers would spread a batch over all that it sees, and a step would have so many times the examples."""

    class Several(TrainingArguments):
        def __post_init__(self) -> None:
            super().__post_init__()
            self._n_gpu = 8

    assert checked_arguments(Several, {"output_dir": "nowhere"}).n_gpu == 1


def test_a_finished_run_is_read_and_not_repeated(tmp_path: Path) -> None:
    config = parse_config(tiny.text_run(tmp_path))
    first = run(config, tmp_path / "run")
    again = run(config, tmp_path / "run", resume=True, on_step=lambda *step: pytest.fail("it trained again"))
    assert again == first == RunResult.read(tmp_path / "run")


def test_a_run_stopped_after_its_last_step_is_only_evaluated(tmp_path: Path) -> None:
    config = parse_config(tiny.text_run(tmp_path))
    first = run(config, tmp_path / "run")
    (tmp_path / "run" / "result.json").unlink()
    again = run(config, tmp_path / "run", resume=True, on_step=lambda *step: pytest.fail("it trained again"))
    assert again.metrics == first.metrics and again.losses == first.losses and again.step_seconds is None


def test_an_interrupt_at_the_last_step_stops_the_run_too(tmp_path: Path) -> None:
    """Whoever started it, such as the demo, must not go on with what comes next."""
    config = parse_config(tiny.text_run(tmp_path))
    first = run(config, tmp_path / "whole")
    with pytest.raises(Interrupted, match="stopped at step 6"):
        run(config, tmp_path / "run", on_step=stop_after(6))
    assert weights(tmp_path / "run") == weights(tmp_path / "whole")
    again = run(config, tmp_path / "run", resume=True, on_step=lambda *step: pytest.fail("it trained again"))
    assert again.metrics == first.metrics and again.losses == first.losses


def test_an_unfinished_checkpoint_is_not_resumed_from(tmp_path: Path) -> None:
    config = parse_config(tiny.text_run(tmp_path))
    whole = run(config, tmp_path / "whole")
    with pytest.raises(Interrupted):
        run(config, tmp_path / "run", on_step=stop_after(3))
    half = tmp_path / "run" / "checkpoints" / ".partial" / "checkpoint-5"
    half.mkdir(parents=True)
    (half / "adapter_model.safetensors").write_bytes(b"half")
    assert run(config, tmp_path / "run", resume=True).losses == whole.losses
    assert not half.exists()


def test_a_full_disk_loses_nothing_that_was_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = parse_config(tiny.text_run(tmp_path, training={"keep_checkpoints": 1}))
    whole = run(config, tmp_path / "whole")
    save, calls = torch.save, []

    def full(*args: Any, **kwargs: Any) -> None:
        calls.append(args)
        if len(calls) > 4:  # the first checkpoint fits: optimizer, scheduler and random state
            raise OSError(errno.ENOSPC, "No space left on device")
        save(*args, **kwargs)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(
        OutputError, match=r"checkpoint-4: .*No space left on device; the last complete one is checkpoint-2"
    ):
        run(config, tmp_path / "run")
    folder = tmp_path / "run" / "checkpoints"
    assert [path.name for path in checkpoints(folder)] == ["checkpoint-2"] == [p.name for p in folder.iterdir()]
    monkeypatch.setattr(torch, "save", save)
    assert run(config, tmp_path / "run", resume=True).losses == whole.losses


def test_what_a_process_left_that_was_killed_as_it_began_is_no_obstacle(tmp_path: Path) -> None:
    config = parse_config(tiny.text_run(tmp_path))
    left = [tmp_path / "run" / name for name in (".lock", ".run.yaml.partial-0123abcd")]
    left[0].parent.mkdir()
    for path in left:
        path.write_bytes(b"half")
    (tmp_path / "run" / "checkpoints" / ".partial").mkdir(parents=True)
    with pytest.raises(OutputError, match="contains other files"):
        run(config, tmp_path / "run")
    (tmp_path / "run" / "checkpoints" / ".partial").rmdir()
    (tmp_path / "run" / "checkpoints").rmdir()
    run(config, tmp_path / "run")
    assert {path.name for path in (tmp_path / "run").iterdir()} - {".lock"} == {
        "run.yaml", "result.json", "adapter", "checkpoints",
    }  # fmt: skip


@pytest.mark.parametrize("name", [".lock", "adapter", "checkpoints", "checkpoints/.partial", "report.html"])
def test_nothing_is_written_or_deleted_through_a_link_in_a_run_from_somebody_else(tmp_path: Path, name: str) -> None:
    config = parse_config(tiny.text_run(tmp_path))
    with pytest.raises(Interrupted):
        run(config, tmp_path / "run", on_step=stop_after(4))
    mine = tmp_path / "mine"
    if name in (".lock", "report.html"):
        mine.write_text("mine")
    else:
        mine.mkdir()
        (mine / ".partial").mkdir()
        (mine / ".partial" / "kept").write_text("mine")
    link = tmp_path / "run" / name
    if link.is_dir():
        shutil.rmtree(link)
    link.unlink(missing_ok=True)
    link.symlink_to(mine)
    with pytest.raises(OutputError, match=f"run: {re.escape(name)} is a link, and nothing is written or deleted"):
        run(config, tmp_path / "run", resume=True)
    assert (mine if mine.is_file() else mine / ".partial" / "kept").read_text() == "mine"


@pytest.mark.parametrize("resume", [False, True])
def test_a_folder_in_which_another_process_trains_is_refused_at_once(tmp_path: Path, resume: bool) -> None:
    config = parse_config(tiny.text_run(tmp_path))
    (tmp_path / "run").mkdir()
    with hold_folder(tmp_path / "run"), pytest.raises(OutputError, match="another process is writing into this"):
        run(config, tmp_path / "run", resume=resume)
    assert not (tmp_path / "run" / "run.yaml").exists()


def test_old_checkpoints_are_deleted_and_no_pickled_arguments_are_written(tmp_path: Path) -> None:
    run(parse_config(tiny.text_run(tmp_path, training={"keep_checkpoints": 2})), tmp_path / "run")
    folder = tmp_path / "run" / "checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == ["checkpoint-4", "checkpoint-6"]
    assert not list(folder.rglob("training_args.bin"))


def test_another_configuration_does_not_go_on_with_this_run(tmp_path: Path) -> None:
    values = tiny.text_run(tmp_path)
    run(parse_config(values), tmp_path / "run")
    with pytest.raises(OutputError, match="contains a finished run"):
        run(parse_config(values), tmp_path / "run")
    with pytest.raises(OutputError, match="seed was 0, is 1"):
        run(parse_config(values | {"seed": 1}), tmp_path / "run", resume=True)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    with pytest.raises(OutputError, match="contains other files"):
        run(parse_config(values), tmp_path / "full", resume=True)


def test_a_refused_run_leaves_nothing_behind(tmp_path: Path) -> None:
    values = tiny.text_run(tmp_path)
    wrong = parse_config(values | {"adapter": {"method": "spectral_a", "target_modules": ["nowhere"]}})
    with pytest.raises(OptionError, match="nowhere"):
        run(wrong, tmp_path / "run")
    assert {path.name for path in (tmp_path / "run").iterdir()} <= {".lock"}
    (tmp_path / "mine").mkdir()
    with pytest.raises(OptionError, match="nowhere"):
        run(wrong, tmp_path / "mine")
    assert {path.name for path in (tmp_path / "mine").iterdir()} <= {".lock"}
    assert run(parse_config(values), tmp_path / "mine").steps == 6
    with pytest.raises(OutputError, match="another configuration"):
        run(wrong, tmp_path / "mine", resume=True)
    assert (tmp_path / "mine" / "run.yaml").is_file() and (tmp_path / "mine" / "adapter").is_dir()
