"""`spectune fuse --evaluate` and `--rule all`: what each run's task keeps after each merge, and which rules fit."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import OptionError, SpectuneError, one_line

if TYPE_CHECKING:
    from ..fusion import Fused, OverlapReport
    from ..runs import Kept


def fuse_by_all(fuse: Callable[[str], Fused], has_examples: bool, console: Any) -> Iterator[Fused]:
    """Get the result of every rule that these adapters fit; of the others, print why they do not."""
    from ..fusion import FUSIONS

    for name, rule in FUSIONS.items():
        if (rule.behind or name == "gradient") and not has_examples:
            console.print(f"{name}: left out, because it needs --examples")
            continue
        try:
            yield fuse(name)
        except SpectuneError as error:
            console.print(f"{name}: left out, because {one_line(error, 300)}", soft_wrap=True)


def refuse_tuning(rule: str, weights: str | None, adapters: int, runs: int) -> None:
    """Raise `OptionError` where `--tune` cannot work."""
    if rule == "all" or weights is not None:
        said = "--rule all" if rule == "all" else "--weights"
        raise OptionError(f"--tune: it finds the weights of one rule. Leave {said} out.")
    if adapters != runs:
        raise OptionError(f"--tune: {runs} runs in --evaluate for {adapters} adapters. Name one for each, in order.")


def tuned(merge: Callable[[list[float] | None], Fused], runs: list[Path], rounds: int, console: Any) -> Fused:
    """Get the merge of the best weights that were tried; each round is printed."""
    from ..runs import Tried, tuned_weights

    def say(tried: Tried) -> None:
        shares = ", ".join(f"{share:.1%}" for share in tried.shares)
        found = ", ".join(f"{weight:.3g}" for weight in tried.weights)
        console.print(f"weights {found}: the tasks keep {shares} of their validation scores", soft_wrap=True)

    fused, tried = tuned_weights(runs, merge, rounds, say)
    best = max(tried, key=lambda one: one.mean)
    console.print(f"the best mean, {best.mean:.1%}, is that of round {tried.index(best) + 1} of {len(tried)}")
    return fused


def evaluate_tasks(fused: Fused, tasks: list[Kept], console: Any) -> None:
    """Measure every task with a merged adapter on its body."""
    if not tasks:
        return
    with tempfile.TemporaryDirectory() as folder:
        merged = Path(folder) / "merged"
        fused.save(merged, as_lora=True)
        for task in tasks:
            share = task.measure(fused.report.rule, merged)
            console.print(f"{fused.report.rule}: {task.run.name} keeps {share:.1%}")


def print_tasks(tasks: list[Kept], console: Any) -> None:
    """Print the table of what each task keeps; nothing without tasks."""
    from rich.table import Table

    from ..pages.overlap_page import task_heads, task_rows

    if tasks:
        table = Table(*task_heads(tasks), title="what each task keeps")
        for row in task_rows(tasks):
            table.add_row(*row)
        console.print(table)


def show_all(reports: list[OverlapReport], tasks: list[Kept], as_json: bool) -> None:
    """Print what every rule gives."""
    from rich.table import Table

    from .terminal import Console

    if as_json:
        print(json.dumps({"rules": [report.to_json() for report in reports], **tasks_as_json(tasks)}, indent=2))
        return
    console, table = Console(), Table("rule", "largest rank", "strength kept: lowest", "highest", title="rules")
    for report in reports:
        rank = max(layer.rank for layer in report.layers)
        kept = report.kept.values()
        table.add_row(report.rule, str(rank), f"{min(kept):.1%}", f"{max(kept):.1%}")
    console.print(table)
    print_tasks(tasks, console)


def tasks_as_json(tasks: list[Kept]) -> dict[str, Any]:
    """Get everything in plain numbers and words; nothing without tasks."""
    rows = [
        {**vars(task), "run": str(task.run), "kept": {merge: task.share(merge) for merge in task.after}}
        for task in tasks
    ]
    return {"tasks": rows} if rows else {}
