"""`spectune generate`: text from a trained language model, through the template of its training."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from ..errors import OptionError


def generate(
    run_dir: Annotated[Path, typer.Argument(help="Folder of a causal_lm run.")],
    prompt: Annotated[
        list[str] | None,
        typer.Option(
            "--prompt",
            "-p",
            help="Prompt (JSON if it has several columns), repeatable; default: each line of stdin.",
        ),
    ] = None,
    max_new_tokens: Annotated[int | None, typer.Option(help="Limit for each answer; default: the run's.")] = None,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token each time.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Seed for a temperature above 0.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print machine-readable results on stdout.")] = False,
) -> None:
    """Print what a run's model writes after each prompt."""
    if temperature < 0 or (max_new_tokens is not None and max_new_tokens < 1):
        raise OptionError("generate: --temperature must be at least 0, --max-new-tokens at least 1.")
    prompts = prompt or [line.rstrip("\n") for line in sys.stdin if line.strip()]
    if not prompts:
        raise OptionError("generate: no prompt was given. Pass --prompt TEXT, or lines on stdin.")
    import torch

    from ..runs import load_run
    from .terminal import say

    recipe, model = load_run(run_dir)
    torch.manual_seed(seed)
    more = {} if max_new_tokens is None else {"max_new_tokens": max_new_tokens}
    written = recipe.generate(model, [recipe.as_prompt(text) for text in prompts], temperature=temperature, **more)
    for asked, answer in zip(prompts, written, strict=True):
        if as_json:
            print(json.dumps({"prompt": asked, "text": answer}))
        else:
            say(answer)
