"""`spectune train`: train a run from its YAML file; its folder gets adapter, figures and report."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import DivergedError, printable


def train(
    config: Annotated[Path, typer.Argument(help="YAML file of the run.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Settings that replace the file's, such as training.steps=10.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder of the run; default: runs/ and the file's name.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue from the last checkpoint, if there is one.")
    ] = False,
    overwrite: Annotated[
        bool,
        typer.Option("--overwrite", help="Replace the run in the folder, once the first step of this one is done."),
    ] = False,
    reward: Annotated[
        str | None,
        typer.Option("--reward", help="Your Python function as a reward: FILE.py:function; the file is run."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print machine-readable results on stdout.")] = False,
) -> None:
    """Train a run. Ctrl-C saves a checkpoint and stops; --resume then reaches the same weights as an unbroken run."""
    from ..recipes import load_config, with_reward
    from ..runs import Run, RunResult, run, train_run
    from ..training import Interrupted, advice, choice, join, learning_rate, method_of, tuned_by
    from .progress import Stages
    from .run_page import print_metrics, write_run_page
    from .terminal import Console

    asked = with_reward(load_config(config, overrides or []), reward)
    folder = output or Path("runs", config.stem)
    main = join().is_main_process
    console = Console(stderr=True, quiet=as_json or not main)
    warning = advice(tuned_by(asked), learning_rate(asked))
    if chosen := choice(asked):
        console.print(chosen, markup=False, soft_wrap=True)

    def warn(said: str) -> None:
        Console(stderr=True).print(f"warning: {said}", markup=False, soft_wrap=True)

    if warning and main:
        warn(warning)
    finished = resume and not overwrite and Run(folder).is_finished
    step: Any = None
    with Stages(console) as stages:

        def on_step(done: int, steps: int, loss: float) -> None:
            nonlocal step
            step = step or stages.begin(method_of(asked), steps)
            step(done, steps, loss)

        try:
            if finished:
                result: RunResult = run(asked, folder, resume=True)
            else:
                result = train_run(
                    asked, folder, resume=resume, overwrite=overwrite, on_step=on_step, looks=True, on_warning=warn
                ).result
                if main:
                    write_run_page(result, Run(folder).page, console)
        except DivergedError:
            if main and Run(folder).is_finished:
                write_run_page(Run(folder).result, Run(folder).page, console)
            raise
        except Interrupted as stop:
            stages.stop()
            if main:
                print(f"spectune: {printable(stop)}", file=sys.stderr)
            raise SystemExit(130) from None
    if not main:
        return
    if as_json:
        long = {"losses", "spectra", "updates", "examples", "drawings", "curves", "completions", "samples", "confusion"}
        print(json.dumps(result.model_dump(mode="json", exclude=long) | {"folder": result.folder}, indent=2))
        return
    print_metrics(result.metrics, console)
    if result.confusion:
        label, share = result.confusion.most_frequent
        said = f"always answering {label} is right in {share:.1%} of {result.confusion.split}"
        console.print(printable(said), markup=False, soft_wrap=True)
    if result.directions:
        console.print(f"directions: {result.directions}", markup=False, soft_wrap=True)
    console.print(f"{result.trainable:,} numbers trained; the run is in {folder}", soft_wrap=True)
    if any("method" in options for options in asked.adapters):
        place = shlex.quote(str(folder))
        console.print(f"next: spectune inspect {place}", soft_wrap=True)
        console.print(f"      spectune export {place} -o {shlex.quote(f'{folder}-lora')}", soft_wrap=True)
