"""A run from its configuration to its folder: `run` for its figures, `train_run` where the model is wanted too.

run.yaml      the configuration, defaults included      checkpoints/  whole ones only, for --resume
adapter/      the adapter, with tokenizer and template  result.json   `RunResult`: written last
model/        instead of adapter/, with adapter: none    .lock         empty; held while a process trains here
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import set_seed

from ..checkpoint import fresh_folder, hold_folder, write_atomically
from ..errors import AdapterError, OptionError, OutputError
from ..adapter import spectral_modules
from ..tuner import attach, build_adapter_config, load_attached
from ..training.checkpoints import (
    Interrupted,
    StopWhenAsked,
    checkpoints,
    clear_partial,
    examples_a_step,
    history,
    steps_done,
    stop_on_signal,
)
from ..training.processes import join, on_main
from ..training.rates import head_learning_rate, learning_rate
from ..recipes.recipe import Recipe
from ..training.config import RunConfig
from .result import RESULT_FILE, RunResult
from ..recipes.table import load_config, recipe_class
from ..training.loop import OnStep, Plan, Watch, quiet_libraries
from ..training.yaml_file import write_yaml

CONFIG_FILE = "run.yaml"
ADAPTER, MODEL, CHECKPOINTS = "adapter", "model", "checkpoints"
# Processes that read data ask every five seconds whether the run that began them still lives (torch's
# MP_STATUS_CHECK_INTERVAL), and hold its lock until then.
WORKERS_LINGER = 10.0
# What may differ when a run goes on: it does not change the weights.
HARMLESS = ("save_every", "keep_checkpoints", "report_to", "validate_every", "workers")
# What may differ as long as their product with the number of processes stays: a run moves to other machines so.
STEP_PARTS = ("batch_size", "gradient_accumulation")


@dataclass(frozen=True)
class Trained:
    """A finished run with its model still in memory."""

    result: RunResult
    model: Any = field(repr=False)
    recipe: Recipe = field(repr=False)


def run(config: RunConfig, output_dir: str | Path, *, resume: bool = False, on_step: OnStep | None = None) -> RunResult:
    """Get the result of a run, trained into `output_dir`.

    With `resume` a finished run is read and not repeated, one that was stopped goes on from its last checkpoint, and
    one that does not exist is begun: call it again and again until it returns. Without, the folder must be new or
    empty. Raises `OutputError` where the folder holds a run of another configuration, `Interrupted` after Ctrl-C.
    """
    folder = Path(output_dir)
    if resume and (folder / RESULT_FILE).is_file():
        _refuse_other_run(config, folder)
        return RunResult.read(folder)
    return train_run(config, folder, resume=resume, on_step=on_step).result


def train_run(
    config: RunConfig, output_dir: str | Path, *, resume: bool = False, on_step: OnStep | None = None
) -> Trained:
    """Get a trained model with its result; the folder is as after `run`."""
    folder = Path(output_dir)
    processes = join()
    with ExitStack() as held:
        on_main(lambda: held.enter_context(_opened_folder(config, folder, resume)))
        return _train(config, folder, on_step, processes)


def _train(config: RunConfig, folder: Path, on_step: OnStep | None, processes: Any) -> Trained:
    quiet_libraries()
    recipe = recipe_class(config.recipe)(config)
    model, plan = build(recipe)
    counts = numbers(model, plan)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    watch, last = Watch(on_step), next(iter(reversed(checkpoints(folder / CHECKPOINTS))), None)
    told = history(last) if last else []
    watch.losses = [float(entry["loss"]) for entry in told if "loss" in entry]
    watch.validation = [(entry["step"], float(entry["eval_loss"])) for entry in told if "eval_loss" in entry]
    with stop_on_signal() as request:
        trainer = recipe.trainer(model, plan, folder / CHECKPOINTS, [watch, StopWhenAsked(request)])
        _fit(trainer, last)
    if request.asked and trainer.state.global_step < trainer.state.max_steps:
        raise Interrupted(folder / CHECKPOINTS, trainer.state.global_step)
    size = _save(recipe, trainer, folder)
    peak, device = _memory()
    metrics = measure(recipe, model)
    result = RunResult(
        config=config.plain(),
        metrics=metrics,
        losses=watch.losses,
        validation_losses=watch.validation,
        learning_rate=learning_rate(config),
        **counts,
        step_seconds=watch.step_seconds,
        peak_bytes=peak,
        device=device,
        file_bytes=size,
        folder=str(folder.resolve()),
    )
    if processes.is_main_process:
        write_atomically(folder / RESULT_FILE, result.to_json())
    processes.wait_for_everyone()
    return Trained(result, model, recipe)


def build(recipe: Recipe) -> tuple[nn.Module, Plan]:
    """Get the model that a run trains, its adapter attached, with what trains at which rate."""
    config = recipe.config
    if config.training.precision == "float16" and not torch.accelerator.is_available():
        raise OptionError(
            "training.precision=float16: asked for an accelerator's autocast, found a CPU, which would compute in "
            "float32. Use bfloat16 or float32."
        )
    set_seed(config.seed)  # a new head and LoRA's A are random
    model = recipe.build_model()
    heads = recipe.head(model)
    options = config.adapter_options
    if options is not None:
        options.setdefault("task_type", recipe.task_type)
        options.setdefault("revision", config.revision)  # who loads the adapter needs the very same base
        if heads:
            options["modules_to_save"] = list(dict.fromkeys([*(options.get("modules_to_save") or []), *heads]))
        model = attach(model, build_adapter_config(options))
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    head = [p for name, p in named if _is_head(name, heads, options is not None)]
    known = {id(p) for p in head}
    body = [p for _, p in named if id(p) not in known]
    if not body:
        raise OptionError(f"adapter: {config.adapter} leaves nothing to train. Name other target_modules.")
    if not head and config.training.head_learning_rate is not None:
        raise OptionError("training.head_learning_rate: this run has no new head. Leave it out.")
    return model, Plan([(body, learning_rate(config)), (head, head_learning_rate(config))], recipe.loss)


def _is_head(name: str, heads: list[str], adapted: bool) -> bool:
    return ".modules_to_save." in name if adapted else any(name.startswith(f"{head}.") for head in heads)


def _fit(trainer: Any, last: Path | None) -> None:
    if last is None:
        trainer.train()
        return
    if trainer.is_fsdp_enabled or not (last / "optimizer.pt").is_file():
        raise OutputError(
            f"{last}: asked to continue, but runs under FSDP and DeepSpeed cannot be resumed: the optimizer's state is "
            f"not in a form that other processes read. Begin the run again in another folder, or use DDP."
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


def measure(recipe: Recipe, model: nn.Module) -> dict[str, dict[str, float]]:
    """Get the metrics of every held-out split, and lm-eval's where the run asks for it."""
    found = {split: recipe.evaluate(model, split) for split in ("validation", "test") if split in recipe.splits}
    figures = recipe.harness(model)
    return found | ({"lm_eval": figures} if figures else {})


def load_run(folder: str | Path, overrides: Iterable[str] = ()) -> tuple[Recipe, nn.Module]:
    """Get the recipe and the tuned model of a run's folder, ready to evaluate; `AdapterError` if it was not finished.

    `overrides` may change what is evaluated (`evaluation.x=…`), nothing else.
    """
    folder = Path(folder)
    recipe = _told_recipe(folder, overrides)
    config = recipe.config
    tuned = folder / (MODEL if config.adapter_options is None else ADAPTER)
    if not tuned.is_dir():
        raise AdapterError(f"{folder}: the run is not finished, {tuned.name}/ is missing. Continue it with --resume.")
    set_seed(config.seed)
    if config.adapter_options is None:
        model = recipe.build_model(tuned)
    else:
        model = load_attached(recipe.build_model(), tuned)
    return recipe, _ready(model)


def load_base(folder: str | Path, overrides: Iterable[str] = ()) -> tuple[Recipe, nn.Module]:
    """Get the recipe of a run's folder and the model that the run began with, ready to evaluate: what was before.

    A new head has the random numbers that the run's seed gave it. `overrides` as for `load_run`.
    """
    recipe = _told_recipe(Path(folder), overrides)
    set_seed(recipe.config.seed)
    return recipe, _ready(recipe.build_model())


def _told_recipe(folder: Path, overrides: Iterable[str]) -> Recipe:
    if not (folder / CONFIG_FILE).is_file():
        raise AdapterError(f"{folder}: asked for a run's folder, found no {CONFIG_FILE} in it. Check the path.")
    for override in overrides:
        if not override.startswith("evaluation."):
            raise OptionError(f"{override!r}: a finished run can only be told evaluation.key=value.")
    quiet_libraries()
    config = load_config(folder / CONFIG_FILE, overrides)
    return recipe_class(config.recipe)(config)


def _ready(model: nn.Module) -> nn.Module:
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()


def _save(recipe: Recipe, trainer: Any, folder: Path) -> int:
    """Save adapter (or model), tokenizer and template together, whole or not at all; get the tensors' bytes."""
    full = recipe.config.adapter_options is None
    goal = folder / (MODEL if full else ADAPTER)
    model = trainer.accelerator.unwrap_model(trainer.model)
    whole = {} if not trainer.is_fsdp_enabled else {"state_dict": trainer.accelerator.get_state_dict(trainer.model)}
    if trainer.accelerator.is_main_process:
        with fresh_folder(goal, overwrite=True) as partial:
            model.save_pretrained(str(partial), **whole)
            if recipe.processing is not None:
                recipe.processing.save_pretrained(str(partial))
    trainer.accelerator.wait_for_everyone()
    return sum(path.stat().st_size for path in goal.glob("*.safetensors"))


def numbers(model: nn.Module, plan: Plan) -> dict[str, int]:
    """Get how many numbers train in the adapter (or model) and in the head, and how many the base has."""
    body, head = (sum(p.numel() for p in group) for group, _ in plan.rates)
    adapters = {id(p) for _, _, module in spectral_modules(model) for p in module.parameters()}
    copies = ("lora_", ".modules_to_save.")  # what PEFT adds to the model
    total = sum(
        p.numel()
        for name, p in model.named_parameters()
        if id(p) not in adapters and not (p.requires_grad and any(word in name for word in copies))
    )
    return {"trainable": body, "head": head, "total": total}


def _memory() -> tuple[int | None, str]:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated(), torch.cuda.get_device_name()
    try:
        import resource
    except ImportError:  # Windows has none
        return None, "cpu"
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024), "cpu"


@contextmanager
def _opened_folder(config: RunConfig, folder: Path, resume: bool) -> Iterator[None]:
    """Be the only process that trains into the folder, which is new, or holds this very run."""
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"{folder}: asked for an output folder, found a file. Choose another folder.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{folder}: the folder cannot be created: {error.strerror}.") from error
    with hold_folder(folder, WORKERS_LINGER if config.training.workers else 0.0):
        _begin_or_continue(config, folder, resume)
        yield


def _begin_or_continue(config: RunConfig, folder: Path, resume: bool) -> None:
    """Write run.yaml into a new folder, or see that the folder's run is this one; clear what a killed process left."""
    if (folder / CONFIG_FILE).is_file():
        if not resume:
            state = "a finished run" if (folder / RESULT_FILE).is_file() else "an unfinished run"
            raise OutputError(f"{folder}: found {state} in it. Continue it with --resume, or choose another folder.")
        _refuse_other_run(config, folder)
    elif any(not path.name.startswith((".lock", f".{CONFIG_FILE}.partial-")) for path in folder.iterdir()):
        raise OutputError(
            f"{folder}: asked for an empty output folder, found other files in it. Choose another folder."
        )
    else:
        write_atomically(folder / CONFIG_FILE, write_yaml(config.plain()))
    for left in [*folder.glob(f".{CONFIG_FILE}.partial-*"), *folder.glob(f".{RESULT_FILE}.partial-*")]:
        left.unlink(missing_ok=True)
    clear_partial(folder / CHECKPOINTS)


def _refuse_other_run(config: RunConfig, folder: Path) -> None:
    before, now = load_config(folder / CONFIG_FILE).plain(), config.plain()
    last = next(iter(reversed(checkpoints(folder / CHECKPOINTS))), None)
    examples = None if last is None else examples_a_step(last)
    for values in (before, now):
        for name in (*HARMLESS, *(() if examples is None else STEP_PARTS)):
            values["training"].pop(name)
    different = sorted(differences(before, now))
    if different:
        raise OutputError(
            f"{folder}: asked to continue, but the run in it was told otherwise: {', '.join(different[:3])}. "
            f"Give the same configuration, or choose another folder."
        )
    asked, processes = config.training, join().num_processes
    found = asked.batch_size * asked.gradient_accumulation * processes
    if examples is not None and examples != found:
        raise OutputError(
            f"{folder}: asked to continue with {asked.batch_size} x {asked.gradient_accumulation} examples on each of "
            f"{processes} processes, {found} a step, but the run in it has {examples} a step. Give a "
            f"training.batch_size and gradient_accumulation that make {examples}, or choose another folder."
        )


def differences(before: Any, now: Any, name: str = "") -> list[str]:
    """Get a line for each key whose value in two configurations differs."""
    if isinstance(before, dict) and isinstance(now, dict):
        keys = dict.fromkeys([*before, *now])
        return [line for key in keys for line in differences(before.get(key), now.get(key), f"{name}.{key}".strip("."))]
    return [] if before == now else [f"{name} was {before!r}, is {now!r}"]
