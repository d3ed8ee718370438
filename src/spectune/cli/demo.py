"""`spectune demo`: the run that ships, from a pretrained model to a page with its results."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import printable

if TYPE_CHECKING:
    from ..demo import Demo


def demo(
    method: Annotated[str, typer.Option(help="Which method of spectune.METHODS trains.")] = "spectral_a",
    r: Annotated[int | None, typer.Option("--r", help="Directions tuned; default: the method's own.")] = None,
    steps: Annotated[int, typer.Option(help="Optimizer steps.")] = 150,
    lr: Annotated[float | None, typer.Option(help="Learning rate of the adapter; default: a tuned one.")] = None,
    seed: Annotated[int, typer.Option(help="The same seed gives the same result.")] = 0,
    output: Annotated[Path, typer.Option(help="Folder to write; continues a demo that was stopped there.")] = Path(
        "spectune-demo"
    ),
    sentences: Annotated[int | None, typer.Option(help="Use only this many sentences, for a quick look.")] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace the output folder if there is one.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print machine-readable results on stdout.")] = False,
) -> None:
    """Teach a small real model 24 languages, save, reload, export and check it, and write a page. Works offline."""
    from ..demo import DemoOptions, opened_folder, run_demo
    from ..training import Interrupted
    from .progress import Stages
    from .run_page import write_run_page
    from .terminal import Console

    options = DemoOptions(method=method, r=r, steps=steps, rate=lr, seed=seed, sentences=sentences)
    options.check()
    console = Console(stderr=as_json)
    with opened_folder(output, overwrite), Stages(console) as stages:
        try:
            done = run_demo(options, output, console.print, stages.begin)
        except Interrupted:
            stages.stop()
            words = f"interrupted; repeat the command to continue in {output}"
            print(f"spectune: {printable(words)}", file=sys.stderr)
            raise SystemExit(130) from None
        write_run_page(done.result, done.page, console)
    page = done.page.resolve()
    if as_json:
        print(json.dumps({**_figures(done), "report": str(page)}, indent=2))
    console.print(f"adapter, LoRA and page are in {output}; open {page.as_uri()}", soft_wrap=True)


def _figures(done: Demo) -> dict[str, object]:
    result = done.result
    untrained, frozen = result.compared
    return {
        "method": result.method,
        "seed": result.seed,
        "steps": result.steps,
        "learning_rate": result.learning_rate,
        "accuracy": {
            "untrained": untrained.value,
            "frozen_body": frozen.value,
            "tuned": result.metrics["test"]["accuracy"],
        },
        "trainable": result.trainable,
        "reload_agreement": done.reload_agreement,
        "lora_agreement": done.lora_agreement,
        "lora_max_relative_error": done.export.proof.max_relative_error,
    }
