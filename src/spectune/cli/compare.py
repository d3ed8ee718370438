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
        str | None,
        typer.Option(
            "--output",
            "-o",
            help="Folder, or address such as s3://BUCKET/NAME; default: comparisons/ and the file's name.",
        ),
    ] = None,
    jobs: Jobs = None,
    on: On = None,
    cpus: Cpus = None,
    gpus: Gpus = None,
    slurm: Slurm = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print machine-readable results on stdout.")] = False,
) -> None:
    """Compare methods: rates chosen on validation, figures on test. Repeat the command to continue a stopped sweep."""
    from ..sweeps import load_sweep, sweep_folder
    from .comparison_files import cluster_of, print_comparison, run_under_bar, write_files
    from .terminal import Console

    asked, place = load_sweep(sweep, overrides or []), sweep_folder(output or Path("comparisons", sweep.stem))
    console, engine = Console(stderr=True, quiet=as_json), cluster_of(on, cpus, gpus, slurm)
    with place:
        records = run_under_bar(asked, place, console, jobs, engine=engine)
        summary = write_files(asked, records, place.folder, console)
        page = place.page
    if as_json:
        print(json.dumps(summary, indent=2))
    else:
        print_comparison(summary, page, console)
    if records and not any(record.ok for record in records):
        raise SystemExit(1)
