"""`spectune check`: show what a run would do before it costs anything."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.text import Text

    from ..runs import DryRun
    from .terminal import Console

MOST_LAYERS, MOST_CLASSES = 12, 12


def check(
    config: Annotated[Path, typer.Argument(help="YAML file of the run.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Settings that replace the file's, such as training.steps=10.")
    ] = None,
    reward: Annotated[
        str | None,
        typer.Option("--reward", help="Your Python function as a reward: FILE.py:function; the file is run."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print machine-readable results on stdout.")] = False,
) -> None:
    """Validate a run and show it: an example with its loss mask, the layers, the counts, the memory, the rates."""
    from ..recipes import load_config, with_reward
    from ..runs import dry_run
    from .terminal import Console

    asked = with_reward(load_config(config, overrides or []), reward)
    found = dry_run(asked)
    if as_json:
        values = asdict(found) | {"config": asked.plain()}
        values["memory"]["total"] = found.memory.total
        print(json.dumps(values, indent=2))
    else:
        _print(found, Console())


def _print(found: DryRun, console: Console) -> None:
    from ..pages import readable_bytes

    console.rule(f"the first training example (underlined: {found.shown.marks})")
    console.print(_example(found))
    console.rule("what is trained")
    for name, shape in found.layers[:MOST_LAYERS]:
        console.print(f"{name}  {' x '.join(map(str, shape))}", markup=False, highlight=False)
    if len(found.layers) > MOST_LAYERS:
        console.print(f"… {len(found.layers)} layers in all (--json lists them)")
    share = found.trainable / found.total
    head = f", and {found.head:,} of the head in full" if found.head else ""
    console.print(f"{found.trainable:,} numbers trained{head}; the model has {found.total:,} ({share:.3%})")
    console.print("examples: " + ", ".join(f"{count:,} {split}" for split, count in found.examples.items()))
    for split, counts in found.classes.items():
        console.print(f"classes of {split}: {_counted(counts)}", markup=False, highlight=False)
    parts = {name: getattr(found.memory, name) for name in ("weights", "gradients", "optimizer", "activations")}
    sizes = ", ".join(f"{name} {readable_bytes(size)}" for name, size in parts.items())
    console.print(f"memory: about {readable_bytes(found.memory.total)} ({sizes})")
    head_rate = f", head {found.rates['head_learning_rate']:g}" if found.head else ""
    known = found.rates["known"]
    span = f"; known to work: {known[0]:g} to {known[1]:g} ({found.rates['source']})" if known else ""
    console.print(f"learning rate {found.rates['learning_rate']:g}{head_rate}{span}", markup=False)
    for remark in found.remarks:
        console.print(f"note: {remark}", markup=False)


def _counted(counts: dict[str, int]) -> str:
    shown = ", ".join(f"{name} {count:,}" for name, count in list(counts.items())[:MOST_CLASSES])
    return shown if len(counts) <= MOST_CLASSES else f"{shown}, … {len(counts)} in all (--json lists them)"


def _example(found: DryRun) -> Text:
    from rich.text import Text

    from ..errors import printable
    from .terminal import LAYOUT

    text = Text()
    for piece, carries_loss in found.shown.pieces:
        text.append(printable(piece, LAYOUT), "underline bold green" if carries_loss else "")
    if found.shown.answer:
        text.append("  ->  ").append(printable(found.shown.answer, LAYOUT), "underline bold green")
    return text
