"""`spectune evaluate`: compute the metrics of a finished run again from its folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from ..errors import OptionError


def evaluate(
    run_dir: Annotated[Path, typer.Argument(help="Folder of a run.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="evaluation.key=value, such as 'evaluation.lm_eval={tasks: [gsm8k]}'.")
    ] = None,
    base: Annotated[bool, typer.Option("--base", help="Evaluate the model as it was before tuning.")] = False,
    reward: Annotated[
        str | None,
        typer.Option("--reward", help="Your Python function as a reward: FILE.py:function; the file is run."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print machine-readable results on stdout.")] = False,
) -> None:
    """Load a run's adapter on its base and print the metrics on the held-out examples. Writes nothing.

    With --base, the adapter is left out, and a new head has the values that the run's seed gives it.
    """
    from ..recipes import with_reward
    from ..runs import Run, load_base, load_run, measure
    from .run_page import print_metrics
    from .terminal import Console

    config = Run.open(run_dir).config()
    if with_reward(config, reward) != config:
        raise OptionError(f"--reward {reward}: is not a reward of this run, or its file has changed since.")
    recipe, model = (load_base if base else load_run)(run_dir, overrides or [])
    found = measure(recipe, model)
    if as_json:
        print(json.dumps(found, indent=2))
    else:
        print_metrics(found, Console())
