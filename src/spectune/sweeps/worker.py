"""One run of a sweep in its own process, so that its peak memory is measured and its crash harms no other run.

    python -m spectune.sweeps.worker JOB.json

Reads the job from a file and writes the answer into one. Lines of JSON go to stdout: [step, steps, loss] for each step,
and [step, steps, null, validation loss] where it is measured during training (may be NaN). It ends as on Ctrl-C when
stdin closes, so it never outlives the sweep.
"""

from __future__ import annotations

import json
import math
import os
import signal
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

from ..checkpoint import hold_folder, write_atomically
from ..errors import DivergedError, SpectuneError, one_line
from ..recipes.recipe import Recipe
from ..recipes.table import parse_config
from ..runs.folder import Run
from ..runs.load import load_run
from ..runs.measuring import PARTS, measured, refuse_unmeasured
from ..runs.provenance import machine
from ..runs.result import RESULT_FILE, RunResult
from ..runs.train import train_run
from ..training.loop import OnStep
from .config import GeneralText
from .general_text import general_loss

FAILED, INTERRUPTED = 1, 130
LINGER = 120.0
"""Seconds to wait for a run's folder: the process of a sweep that was killed, or of a node that was lost, still saves.

Chosen, not measured; an NFS server frees the locks of a machine that is gone after 90 (Linux's default lease).
"""
GRACE = 10.0
"""Seconds to end after the interrupt for a run that has made no step, and so has nothing to save.

A library may catch the interrupt while it is imported, or wait forever for a thread of its own. Chosen, not measured.
"""


def main(job: dict[str, Any], on_step: OnStep | None = None, on_validation: OnStep | None = None) -> int:
    """Train, measure, write the answer; get the exit status."""
    started, folder = time.perf_counter(), Path(job["folder"])
    answer: dict[str, Any]
    try:
        if folder.is_dir():
            with hold_folder(folder, LINGER):
                pass
        answer = work(job, on_step, on_validation)
    except KeyboardInterrupt:
        return INTERRUPTED
    except SpectuneError as error:
        answer = {"error": str(error), "diverged": isinstance(error, DivergedError)}
    except Exception as error:
        answer = {"error": f"{type(error).__name__}: {one_line(error, 500)}"}
    answer |= {"seconds": time.perf_counter() - started, "machine": machine()}
    write_atomically(job["answer"], json.dumps(answer))
    return FAILED if "error" in answer else 0


def work(job: dict[str, Any], on_step: OnStep | None = None, on_validation: OnStep | None = None) -> dict[str, Any]:
    """Get the run's loss on general text and the base model's; trains and measures what is not done yet."""
    config, folder = parse_config(job["config"]), Path(job["folder"])
    recipe: Recipe | None = None
    model: Any = None
    if not (folder / RESULT_FILE).is_file():
        trained = train_run(
            config, folder, resume=True, on_step=on_step, measures=job["measures"], on_validation=on_validation
        )
        recipe, model = trained.recipe, trained.model
    result = RunResult.read(folder)
    if result.diverged:
        raise DivergedError(result.diverged)
    lacks = [part for part in job["measures"] or PARTS if part not in result.metrics]
    if recipe is None and lacks:
        recipe, model = load_run(folder)
        _measure(result, recipe, model, lacks)
    if job["forgetting"] is None or config.recipe != "causal_lm":
        return {}
    if recipe is None:
        recipe, model = load_run(folder)
    asked = GeneralText.model_validate(job["forgetting"])
    after, base = general_loss(model, recipe.processing, asked), job["base_loss"]
    if base is None:
        del model
        base = general_loss(recipe.build_model(), recipe.processing, asked)
    return {"general_loss": after, "general_loss_base": base}


def _measure(result: RunResult, recipe: Recipe, model: Any, parts: list[str]) -> None:
    """Measure some parts of a finished run and put them into its result."""
    found, failed = measured(recipe, model, parts)
    refuse_unmeasured(result.model_copy(update={"unmeasured": failed}))
    Run(Path(result.folder)).write(result.model_copy(update={"metrics": result.metrics | found}))


def _telling(steps_told: TextIO, ended: threading.Event, begun: threading.Event) -> tuple[OnStep, OnStep]:
    def say(line: list[Any]) -> None:
        with suppress(BrokenPipeError):  # the sweep was killed; stdin closes, too, and a checkpoint is saved
            print(json.dumps(line), file=steps_told, flush=True)

    def tell(step: int, steps: int, loss: float) -> None:
        begun.set()
        # The training has a handler of its own until it is asked to stop. If it still has it, the interrupt came while
        # the run was loading, and a library caught it there.
        if ended.is_set() and signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
            os.kill(os.getpid(), signal.SIGINT)
        say([step, steps, loss if math.isfinite(loss) else None])

    return tell, lambda step, steps, validation: say([step, steps, None, validation])


def _own_stdout() -> TextIO:
    """Get the stdout that the sweep reads; the output of libraries and compilers goes to stderr from now on."""
    steps_told = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return steps_told


def _end_with_the_sweep(ended: threading.Event, begun: threading.Event) -> None:
    """Wait for the end of stdin, which the sweep keeps open while it lives."""
    while os.read(0, 1):
        pass
    os.kill(os.getpid(), signal.SIGINT)
    ended.set()  # after the signal, so that whoever sees this has been sent one
    if not begun.wait(GRACE):
        os._exit(INTERRUPTED)


if __name__ == "__main__":
    # A shell makes background jobs ignore Ctrl-C, Ray's workers block it, and this process would inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if hasattr(signal, "pthread_sigmask"):  # not on Windows
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        # Slurm sends it to all processes of a job whose time is almost up.
        signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    told = json.loads(Path(sys.argv[1]).read_text("utf-8"))
    sweep_ended, training_begun = threading.Event(), threading.Event()
    tell_step, tell_validation = _telling(_own_stdout(), sweep_ended, training_begun)
    threading.Thread(target=_end_with_the_sweep, args=[sweep_ended, training_begun], daemon=True).start()
    sys.exit(main(told, tell_step, tell_validation))
