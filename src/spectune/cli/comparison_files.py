"""Shared by `compare` and `reproduce`: where a sweep runs, its progress bar, and the files that it writes."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from ..sweeps import Cluster, SweepConfig, SweepFolder, SweepRecord
    from .terminal import Console

SHOWN = 4
"""Runs beside the bar while a cluster works on many; chosen for the width of a terminal."""
JOBS_HELP = "Runs at the same time; here they share cores and GPU. Default: 1; with --on all."
Jobs = Annotated[int | None, typer.Option("--jobs", "-j", min=1, help=JOBS_HELP)]
On = Annotated[str | None, typer.Option("--on", help="Run on a cluster: ray, ray://HOST:PORT or slurm.")]
Cpus = Annotated[float | None, typer.Option("--cpus", min=0.01, help="CPUs of each run, with --on; default: 1.")]
GPUS_HELP = (
    "GPUs of each run, with --on; on Ray also a share, such as 0.25. Default: 1 where Ray has any, none on Slurm."
)
Gpus = Annotated[float | None, typer.Option("--gpus", min=0, help=GPUS_HELP)]
Slurm = Annotated[list[str] | None, typer.Option("--slurm", help="NAME=VALUE for sbatch, such as partition=gpu.")]


def cluster_of(on: str | None, cpus: float | None, gpus: float | None, slurm: list[str] | None) -> Cluster | None:
    """Get the cluster that the options of a command name; None for processes of this machine."""
    from ..errors import OptionError
    from ..sweeps import connect

    if on is None:
        for name, value in (("--cpus", cpus), ("--gpus", gpus), ("--slurm", slurm or None)):
            if value is not None:
                raise OptionError(f"{name} works only with --on. Give --on ray or --on slurm, or leave it out.")
        return None
    return connect(on, cpus or 1, gpus, slurm or [])


def run_under_bar(
    sweep: SweepConfig,
    output: str | Path | SweepFolder,
    console: Console,
    jobs: int | None = None,
    published: Mapping[str, Any] | None = None,
    engine: Cluster | None = None,
) -> list[SweepRecord]:
    """Get every record of a sweep, showing a bar with the runs and the steps of those in progress.

    Tables and page are written after each run.
    """
    from ..sweeps import run_sweep, sweep_folder
    from .progress import Stages

    if engine is not None:
        console.print(engine.said, markup=False, soft_wrap=True)
    with sweep_folder(output) as place, Stages(console) as stages:
        bar = stages.add_task("runs", total=None, said="")
        latest, turn = dict[str, str](), Lock()  # what each run said last

        def on_run(done: int, runs: int, name: str, step: int, steps: int, loss: float | None) -> None:
            at = f"step {step}/{steps}" if steps else "starting"
            with turn:
                latest.pop(name, None)
                latest[name] = f"{name}  {at}" + ("" if loss is None else f"  loss {loss:.3f}")
                at_work = sorted(list(latest)[-(jobs or (1 if engine is None else SHOWN)) :])
                stages.update(bar, total=runs, completed=done, said="   ".join(latest[one] for one in at_work))

        def on_record(records: list[SweepRecord], runs: int) -> None:
            write_files(sweep, records, place.folder, console, published, planned=runs)
            place.show()

        try:
            records = run_sweep(
                sweep, place, provenance=provenance(), on_run=on_run, on_record=on_record, jobs=jobs, engine=engine
            )
        except KeyboardInterrupt:
            stages.stop()
            console.print(f"stopped; repeat the command to continue in {place.said}", markup=False, soft_wrap=True)
            raise
        stages.update(bar, total=len(records), completed=len(records), said="")
    return records


def write_files(
    sweep: SweepConfig,
    records: Sequence[SweepRecord],
    folder: Path,
    console: Console,
    published: Mapping[str, Any] | None = None,
    planned: int | None = None,
) -> dict[str, Any]:
    """Write comparison.json, .md and .html and PEFT's form into a sweep's folder, and get the summary.

    `planned` is how many runs there will be, while the sweep still runs.
    """
    from ..checkpoint import write_atomically
    from ..errors import MissingExtraError, printable
    from ..pages import write_comparison
    from ..sweeps import summarise, to_markdown, write_method_comparison

    summary = summarise(sweep, records, planned)
    complete = dict(summary) if published is None else summary | {"published": dict(published)}
    write_atomically(folder / "comparison.json", json.dumps(complete, indent=1) + "\n")
    write_atomically(folder / "comparison.md", printable(to_markdown(summary, published), "\n"))
    write_method_comparison(sweep, records, folder / "method_comparison")
    try:
        write_comparison(summary, folder / "comparison.html", published)
    except MissingExtraError as error:
        if planned is None:
            console.print(f"no comparison.html: {error}", markup=False, soft_wrap=True)
    return complete


def print_comparison(summary: Mapping[str, Any], page: str, console: Console) -> None:
    """Print the rows of a summary, the failed runs, and the address of the page, if there is one."""
    from rich.table import Table

    from ..sweeps import shown, spread

    step_times = "step, ms (not comparable)"
    table = Table("task", "method", f"test {summary['metric']}", "low to high", "rate", "trained", step_times)
    for row in summary["rows"]:
        metric = summary["task_metrics"][row["task"]]
        rate = "–" if row["rate"] is None else f"{row['rate']:g}"
        step = "–" if row["step_seconds"] is None else f"{1000 * row['step_seconds']:.0f}"
        trained = "–" if row["trainable"] is None else f"{row['trainable']:,}"
        test = shown(row["test"], metric)
        table.add_row(row["task"], row["method"], test, spread(row, metric), rate, trained, step)
    console.print(table)
    for failed in summary["failed"]:
        console.print(f"failed: {failed['run']}: {failed['error']}", markup=False, soft_wrap=True)
    for stopped in summary["stopped"]:
        console.print(f"stopped early: {stopped['run']}: {stopped['reason']}", markup=False, soft_wrap=True)
    for sentence in summary["says"]:
        console.print(f"note: {sentence}", markup=False, soft_wrap=True)
    if page:
        console.print(f"open {page}", markup=False, soft_wrap=True)


def provenance() -> dict[str, Any]:
    """Get what every record contains: versions, machine, and the commit if the code is a git checkout."""
    from ..runs import machine, versions

    return {"versions": versions("datasets", "accelerate", "trl"), "machine": machine(), "commit": commit()}


def commit() -> str | None:
    """Get the commit of the installed code, marked -dirty when it has changes; None outside a git checkout."""
    here = Path(__file__).resolve().parent
    try:
        tracked = subprocess.run(
            ["git", "ls-files", "--error-unmatch", "app.py"], cwd=here, capture_output=True, text=True, timeout=10
        )
        found = subprocess.run(
            ["git", "describe", "--always", "--dirty"], cwd=here, capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() or None if tracked.returncode == 0 and found.returncode == 0 else None
