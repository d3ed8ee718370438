"""`spectune fuse --evaluate` and `--rule all`: what each run's task keeps after each merge, and which rules fit."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import SpectuneError, one_line

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
