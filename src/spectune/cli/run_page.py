"""Shared by the verbs of runs: the page of a run, and its metrics as a table."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..runs import RunResult
    from .terminal import Console


def write_run_page(result: RunResult, page: Path, console: Console) -> None:
    """Write a run's page, or say that it needs jinja2."""
    from ..errors import MissingExtraError
    from ..pages import write_report

    try:
        write_report(result, page)
    except MissingExtraError as error:
        console.print(f"no {page.name}: {error}", markup=False, soft_wrap=True)


def print_metrics(metrics: dict[str, dict[str, float]], console: Console) -> None:
    """Print a table of split, metric and figure, or a line if nothing was held out."""
    from rich.table import Table

    if not metrics:
        console.print("no held-out examples, so no metrics: give data.validation, validation_share or test")
        return
    table = Table("examples", "metric", "figure")
    for split, figures in metrics.items():
        for name, value in figures.items():
            table.add_row(split, name, f"{value:.4f}")
    console.print(table)
