"""`spectune compare`: methods x learning rates x seeds x tasks, ranked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from .comparison_files import Cpus, Gpus, Jobs, On, Slurm


def compare(
    sweep: Annotated[Path, typer.Argument(help="YAML file of the sweep, such as examples/sweep.yaml.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Settings that replace the file's, such as seeds=[0].")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder; default: comparisons/ and the file's name.")
    ] = None,
    jobs: Jobs = None,
    on: On = None,
    cpus: Cpus = None,
    gpus: Gpus = None,
    slurm: Slurm = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print machine-readable results on stdout.")] = False,
) -> None:
    """Compare methods: rates chosen on validation, figures on test. Repeat the command to continue a stopped sweep."""
    from ..sweeps import load_sweep
    from .comparison_files import cluster_of, print_comparison, run_under_bar, write_files
    from .terminal import Console

    asked = load_sweep(sweep, overrides or [])
    folder = output or Path("comparisons", sweep.stem)
    console = Console(stderr=True, quiet=as_json)
    records = run_under_bar(asked, folder, console, jobs, engine=cluster_of(on, cpus, gpus, slurm))
    summary = write_files(asked, records, folder, console)
    if as_json:
        print(json.dumps(summary, indent=2))
    else:
        print_comparison(summary, folder, console)
    if records and not any(record.ok for record in records):
        raise SystemExit(1)
