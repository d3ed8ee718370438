"""Training a run: `run` for its result, `train_run` for the model as well."""

from __future__ import annotations

import gc
import sys
import warnings
from collections.abc import Callable, Collection
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..checkpoint import fresh_folder
from ..errors import DivergedError, OptionError, OutputError
from ..recipes.recipe import Recipe
from ..recipes.table import recipe_class
from ..training.checkpoints import Interrupted, StopWhenAsked, history, steps_done, stop_on_signal
from ..training.config import HEAD, RunConfig
from ..training.divergence import StopAtDivergence, remedies
from ..training.loop import OnStep, Watch, quiet_libraries
from ..training.processes import anywhere, join, on_main
from ..training.rates import head_learning_rate, learning_rate, method_of
from ..training.sharded import OPTIMIZER
from .building import build, numbers
from .folder import Run, opened_folder, refuse_other_run
from .load import reloaded
from .look import look
from .measuring import measured, refuse_unmeasured
from .overwrite import FirstStep, replace_run
from .provenance import machine, versions
from .remembered_pass import directions_said
from .result import Completion, Drawing, RunResult


@dataclass(frozen=True)
class Trained:
    """A finished run with its model still in memory."""

    result: RunResult
    model: Any = field(repr=False)
    recipe: Recipe = field(repr=False)


def run(
    config: RunConfig,
    output_dir: str | Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    on_step: OnStep | None = None,
    on_warning: Callable[[str], Any] = warnings.warn,
) -> RunResult:
    """Get the result of a run, trained into `output_dir`.

    With `resume` a finished run is read and not repeated, one that was stopped goes on from its last checkpoint, and
    one that does not exist is begun: call it again until it returns. Without, the folder must be new or
    empty; with `overwrite`, it may contain a run, which is replaced after the first step. `on_warning` gets possible
    mistakes in the examples, before the first step. Raises `OutputError` if the folder contains a run of another
    configuration, `DivergedError` if the loss becomes NaN or infinite, `Interrupted` after Ctrl-C.
    """
    found = Run(Path(output_dir))
    if resume and not overwrite and found.is_finished:
        refuse_other_run(config, found)
        if found.result.diverged:
            raise DivergedError(f"{found.folder}: {found.result.diverged}")
        return found.result
    return train_run(
        config, output_dir, resume=resume, overwrite=overwrite, on_step=on_step, on_warning=on_warning
    ).result


def train_run(
    config: RunConfig,
    output_dir: str | Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    on_step: OnStep | None = None,
    looks: bool = False,
    measures: Collection[str] | None = None,
    on_warning: Callable[[str], Any] = warnings.warn,
    on_validation: OnStep | None = None,
) -> Trained:
    """Get a trained model with its result; the folder is as after `run`.

    `on_warning` gets possible mistakes in the examples, before the first step. `on_validation` is called with (step,
    steps, loss) after each `training.validate_every` steps; of a run that goes on, with those of its first part, too.

    With `looks`, the result also has the page's spectra, updates and answers. `measures` are some of validation, test
    and lm_eval (default: all).
    """
    if resume and overwrite:
        raise OptionError("--resume goes on with a run and --overwrite replaces it. Give one of them.")
    found, processes = Run(Path(output_dir)), join()
    with ExitStack() as held:
        there: list[bool] = []  # of the main process alone
        on_main(lambda: there.append(held.enter_context(opened_folder(config, found, resume, overwrite))))
        old = partial(_replace, found, config, there) if overwrite else None
        watch = partial(Watch, on_step, on_validation=on_validation)
        trained = _train(config, found, watch, on_warning if processes.is_main_process else _silent, old, measures)
        _write(found, trained.result, processes)
        refuse_unmeasured(trained.result)
        if looks and trained.model is not None:  # the figures are already saved
            trained = replace(trained, result=look(trained.result, trained.recipe, trained.model))
            _write(found, trained.result, processes)
        if trained.result.diverged:
            raise DivergedError(f"{found.folder}: {trained.result.diverged}")
        return trained


def _silent(said: str) -> None:
    """Other processes have heard the same."""


def _write(found: Run, result: RunResult, processes: Any) -> None:
    """Let the main process write the result while the others wait."""
    if processes.is_main_process:
        found.write(result)
    processes.wait_for_everyone()


def _replace(found: Run, config: RunConfig, there: list[bool]) -> None:
    if there == [True]:
        replace_run(found.folder, config)


@dataclass(frozen=True)
class _Fitted:
    """What is left when the loop has ended and its model is given back to the memory."""

    watch: Watch
    counts: dict[str, int]
    parts: dict[str, int]
    directions: str
    size: int | None
    peak: int | None
    device: str
    diverged: str
    sharded: Any = None
    """The model, where no process could hold it whole."""


def _train(
    config: RunConfig,
    found: Run,
    watch: Callable[..., Watch],
    on_warning: Callable[[str], Any],
    replace_old: Callable[[], None] | None,
    measures: Collection[str] | None,
) -> Trained:
    quiet_libraries()
    recipe = recipe_class(config.recipe)(config)
    recipe.prepare()
    for said in recipe.warnings():
        on_warning(said)
    fitted = _fitted(recipe, found, watch(curves=recipe.curves), replace_old)
    _give_back_memory()
    model = None
    if fitted.size is not None:
        model = reloaded(recipe, found) if fitted.sharded is None else fitted.sharded
    metrics, unmeasured = ({}, {}) if model is None else measured(recipe, model, measures)
    result = RunResult(
        title=f"{recipe.title}: {found.folder.resolve().name}",
        task=f"{config.recipe} on {Path(config.model).name}",
        method=method_of(config),
        config=config.plain(),
        metrics=metrics,
        unmeasured=unmeasured,
        diverged=fitted.diverged,
        looked_at=model is None,  # nothing is left to look at
        losses=fitted.watch.losses,
        validation_losses=fitted.watch.validation,
        curves={recipe.curves[name]: values for name, values in fitted.watch.curves.items()},
        learning_rate=learning_rate(config),
        trainable=fitted.counts["trainable"],
        directions=fitted.directions,
        parts=fitted.parts,
        head=fitted.counts["head"],
        total=fitted.counts["total"],
        step_seconds=fitted.watch.step_seconds,
        peak_bytes=fitted.peak,
        device=fitted.device,
        file_bytes=fitted.size,
        drawings=[Drawing.of(caption, png) for caption, png in recipe.drawings(found.folder)],
        completions=[Completion(**vars(text)) for text in recipe.written(found.folder)],
        versions=versions("accelerate", "datasets", "trl", "timm", "diffusers"),
        machine=machine(device=fitted.device),
        folder=str(found.folder.resolve()),
    )
    return Trained(result, model, recipe)


def _fitted(recipe: Recipe, found: Run, watch: Watch, replace_old: Callable[[], None] | None) -> _Fitted:
    """Build the model, train it and save it; of a run that diverged the last good checkpoint."""
    config = recipe.config
    model, plan = build(recipe)
    counts = numbers(model, plan)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    last = found.last_checkpoint() if replace_old is None else None
    told = history(last) if last else []
    for entry in (entry for entry in told if "loss" in entry):
        watch.read(entry)
    watch.validation = [(entry["step"], float(entry["eval_loss"])) for entry in told if "eval_loss" in entry]
    first = FirstStep(lambda: None if replace_old is None else on_main(replace_old))
    divergence = StopAtDivergence([p for group, _ in plan.rates for p in group])
    with stop_on_signal() as request:
        callbacks = [first, watch, StopWhenAsked(request), divergence, *recipe.callbacks(model, found.folder)]
        trainer = recipe.trainer(model, plan, found.checkpoints, callbacks)
        if config.training.report_to:  # trackers open their files before the first step
            first.now()
        _fit(trainer, last)
    stopped = anywhere(request.asked) and not divergence.found
    if stopped and trainer.state.global_step < trainer.state.max_steps:
        raise Interrupted(found.checkpoints, trainer.state.global_step)
    good = found.last_checkpoint() if divergence.found else None
    if good is not None:
        trainer._load_from_checkpoint(str(good))
    size = None if divergence.found and good is None else _save(recipe, trainer, found)
    if stopped:  # after the last step, so that nothing of it is lost
        raise Interrupted(found.checkpoints, trainer.state.global_step)
    diverged = _diverged(divergence, config, good, found.tuned(config)) if divergence.found else ""
    sharded = trainer.model if trainer.is_fsdp_enabled or trainer.is_cut else None
    parts, directions = recipe.parts(model), directions_said(model)
    return _Fitted(watch, counts, parts, directions, size, *_memory(), diverged, sharded)


def _diverged(divergence: StopAtDivergence, config: RunConfig, good: Path | None, tuned: Path) -> str:
    """Get what happened, what is left and what to try."""
    left = "no checkpoint was saved before, so there is no adapter (training.save_every)"
    if good is not None:
        left = f"{tuned} holds step {steps_done(good)}, the last good checkpoint"
    rate = head_learning_rate(config) if config.adapter == HEAD else learning_rate(config)
    return (
        f"the run diverged: {divergence.found} (peak learning rate {rate:g}); {left}. "
        f"{remedies(config, divergence.step)}"
    )


def _give_back_memory() -> None:
    """Free the model that was trained: it and the Trainer hold each other."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _fit(trainer: Any, last: Path | None) -> None:
    if last is None:
        trainer.train()
        return
    if not (last / OPTIMIZER).is_file():
        raise OutputError(
            f"{last}: cannot continue: this checkpoint has no {OPTIMIZER}. Older versions saved runs under DeepSpeed "
            f"without it. Start the run again in another folder."
        )
    steps = trainer.args.max_steps
    total = steps if steps > 0 else _all_steps(trainer)
    if steps_done(last) < total:
        trainer.train(resume_from_checkpoint=str(last))
    else:  # it was stopped between the last step and the evaluation
        trainer._load_from_checkpoint(str(last))
        trainer.state.global_step = trainer.state.max_steps = total


def _all_steps(trainer: Any) -> int:
    found: int = trainer.set_initial_training_values(trainer.args, trainer.get_train_dataloader())[-1]
    return found


def _save(recipe: Recipe, trainer: Any, found: Run) -> int:
    """Save adapter (or model), tokenizer and template, all or nothing; get the tensors' bytes."""
    goal = found.tuned(recipe.config)
    model = trainer.accelerator.unwrap_model(trainer.model)
    whole = trainer.whole()
    if trainer.accelerator.is_main_process:
        with fresh_folder(goal, overwrite=True) as new:
            model.save_pretrained(str(new), **whole)
            if recipe.processing is not None:
                recipe.processing.save_pretrained(str(new))
            if recipe.config.adapter_options is not None and (task := recipe.task(model)) is not None:
                task.write(new)  # a whole model says it in its config.json
    trainer.accelerator.wait_for_everyone()
    return sum(path.stat().st_size for path in goal.rglob("*.safetensors"))


def _memory() -> tuple[int | None, str]:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated(), torch.cuda.get_device_name()
    try:
        import resource
    except ImportError:  # on Windows
        return None, "cpu"
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024), "cpu"
