"""What the verbs of runs share: the record and page of a run, and its metrics as a table."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

    from ..recipes import Recipe
    from ..runs import RunRecord, RunResult

# Metrics that are shares from 0 to 1, drawn as bars; losses and correlations stand in a table.
SHARES = ("accuracy", "f1", "macro_f1", "exact_match", "gsm8k")
MOST_EXAMPLES = 12


def write_run_page(
    folder: Path, result: RunResult, recipe: Recipe, model: Any, console: Console, *, main: bool = True
) -> None:
    """Write run.json and report.html into a run's folder; without jinja2 the page is left out, and that is said.

    Every process of a distributed run calls this, because a sharded model answers only where all of them ask it; the
    `main` one writes.
    """
    from ..checkpoint import write_atomically
    from ..errors import MissingExtraError
    from ..pages import write_report

    record = run_record(result, recipe, model)
    if not main:
        return
    write_atomically(folder / "run.json", record.to_json() + "\n")
    try:
        write_report(record, folder / "report.html")
    except MissingExtraError as error:
        console.print(f"no report.html: {error}", markup=False, soft_wrap=True)


def run_record(result: RunResult, recipe: Recipe, model: Any) -> RunRecord:
    """Get what the report shows of a run."""
    from ..runs import (
        Example,
        Metric,
        RunRecord,
        Size,
        layer_spectra,
        layer_updates,
        machine,
        versions,
    )
    from ..training import method_of

    config = recipe.config
    held_out = next((split for split in ("validation", "test") if split in recipe.splits), None)
    answers = recipe.answers(model, held_out, MOST_EXAMPLES) if held_out else []
    spectral = config.adapter_options is not None and "method" in config.adapter_options
    memory = (
        [] if result.peak_bytes is None else [Metric("peak memory, bytes", result.peak_bytes, result.device, False)]
    )
    speed = [] if result.step_seconds is None else [Metric("seconds a step", result.step_seconds, "median", False)]
    return RunRecord(
        title=f"{recipe.title}: {Path(result.folder).name}",
        task=f"{config.recipe} on {Path(config.model).name}",
        method=method_of(config),
        config=result.config | {"learning_rate_used": result.learning_rate},
        versions=versions("accelerate", "datasets", "trl", "timm"),
        machine=machine(device=result.device),
        seed=config.seed,
        loss=result.losses,
        validation=result.validation_losses,
        metrics=[
            Metric(f"{split} {name}", value, share=name in SHARES)
            for split, figures in result.metrics.items()
            for name, value in figures.items()
        ]
        + speed
        + memory,
        sizes=[
            Size(
                f"{method_of(config)} adapter" if spectral else method_of(config), result.trainable, result.file_bytes
            ),
            Size("the whole model", result.total),
        ],
        spectra=layer_spectra(model) if spectral else [],
        updates=layer_updates(model) if config.adapter_options is not None else [],
        examples=[Example(a.text, a.expected, a.predicted) for a in answers],
    )


def print_metrics(metrics: dict[str, dict[str, float]], console: Console) -> None:
    """Print a table of split, metric and figure; a line where nothing was held out."""
    from rich.table import Table

    if not metrics:
        console.print("no held-out examples, so no metrics: give data.validation, validation_share or test")
        return
    table = Table("examples", "metric", "figure")
    for split, figures in metrics.items():
        for name, value in figures.items():
            table.add_row(split, name, f"{value:.4f}")
    console.print(table)
