"""`spectune lr`: a learning rate range test of a run, with its curve."""

from __future__ import annotations

import json
import shlex
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

# Of a shorter ramp the steepest place is mostly noise. Chosen.
FEW = 50


def lr(
    config: Annotated[Path, typer.Argument(help="YAML file of the run.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Settings that replace the file's, such as training.steps=10.")
    ] = None,
    low: Annotated[
        float | None, typer.Option(help="First rate of the ramp; default: a hundredth of the run's rate.")
    ] = None,
    high: Annotated[
        float | None, typer.Option(help="Last rate of the ramp; default: a hundred times the run's rate.")
    ] = None,
    steps: Annotated[int, typer.Option(help="Optimizer steps of the ramp.")] = 100,
    output: Annotated[Path, typer.Option("--output", "-o", help="HTML file with the curve.")] = Path("lr.html"),
    as_json: Annotated[bool, typer.Option("--json", help="Print machine-readable results on stdout.")] = False,
) -> None:
    """Train with an exponentially growing rate until the loss diverges, and propose a rate. Saves no model."""
    from ..pages import write_rate_page
    from ..recipes import load_config
    from ..runs import range_test
    from ..training.config import HEAD
    from .progress import Stages
    from .terminal import Console

    asked = load_config(config, overrides or [])
    console = Console(stderr=as_json, quiet=as_json)
    with Stages(console) as stages:
        found = range_test(asked, low=low, high=high, steps=steps, on_step=stages.lazily("ramp"))
    title = f"Learning rate range test: {found.method} on {Path(asked.model).name}"
    write_rate_page(output, title, found.rates, found.losses, found.smoothed, found.proposed)
    if as_json:
        print(json.dumps(asdict(found) | {"page": str(output.resolve())}, indent=2))
        return
    file = output.resolve().as_uri()
    ends = "it did not diverge" if found.diverged is None else f"it diverged at {found.diverged:.2g}"
    steepest = "nowhere" if found.steepest is None else f"at {found.steepest:.2g}"
    console.print(f"the loss falls fastest {steepest}; {ends}; the run's own rate is {found.current:g}")
    if found.proposed is None or found.found is None:
        console.print(f"no rate made the loss fall; try a higher --high; curve: {file}", soft_wrap=True)
        return
    if len(found.losses) < FEW or found.diverged is None:
        few = f"{len(found.losses)} steps say little; take 100" if len(found.losses) < FEW else "take a higher --high"
        console.print(f"a weak proposal: {few}", soft_wrap=True)
    rate, more = f"{found.proposed:.2g}", ""
    if found.proposed != found.found:
        side = "highest" if found.proposed < found.found else "lowest"
        more = f", the {side} that is known to work for {found.method}"
    console.print(f"proposed learning rate: {rate}{more}; curve: {file}", soft_wrap=True)
    key = "head_learning_rate" if asked.adapter == HEAD else "learning_rate"
    words = ["spectune", "train", str(config), *(overrides or []), f"training.{key}={rate}"]
    console.print(f"next: {shlex.join(words)}", soft_wrap=True)
