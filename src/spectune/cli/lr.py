"""`spectune lr`: a learning rate range test of a run, with its curve."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer


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
    said = "no rate made the loss fall; try a higher --high" if found.proposed is None else f"{found.proposed:.2g}"
    ends = "it did not diverge" if found.diverged is None else f"it diverged at {found.diverged:.2g}"
    steepest = "nowhere" if found.steepest is None else f"at {found.steepest:.2g}"
    console.print(f"the loss falls fastest {steepest}; {ends}; the run's own rate is {found.current:g}")
    console.print(f"proposed learning rate: {said}; curve: {output.resolve().as_uri()}", soft_wrap=True)
