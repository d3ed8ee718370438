"""`spectune reproduce`: the papers' experiments, with published and measured figures side by side."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .comparison_files import Cpus, Gpus, Jobs, On, Slurm

if TYPE_CHECKING:
    from ..papers import Experiment
    from .terminal import Console


def reproduce(
    name: Annotated[str | None, typer.Argument(help="Name of the experiment; without it, they are listed.")] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="Settings that replace the sweep's, such as seeds=[0]; the report lists them."),
    ] = None,
    small: Annotated[bool, typer.Option("--small", help="Small models and data, in minutes.")] = False,
    data: Annotated[
        Path | None, typer.Option("--data", help="Folder with the files that the experiment needs.")
    ] = None,
    tune: Annotated[
        bool, typer.Option("--tune", help="A grid of rates for each method, in place of the paper's one.")
    ] = False,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder; default: reproductions/ and the name.")
    ] = None,
    jobs: Jobs = None,
    on: On = None,
    cpus: Cpus = None,
    gpus: Gpus = None,
    slurm: Slurm = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print machine-readable results on stdout.")] = False,
) -> None:
    """Run a published experiment and list every deviation. Repeat the command to continue a stopped one."""
    from ..errors import OptionError
    from ..papers import load_experiment, prepare
    from ..sweeps import sweep_folder
    from .comparison_files import cluster_of, run_under_bar, write_files
    from .terminal import Console

    if name is None:
        _list(as_json)
        return
    experiment, console = load_experiment(name), Console(stderr=True, quiet=as_json)
    place = sweep_folder(output or Path("reproductions", f"{name}-small" if small else name))
    folder = place.folder
    if experiment.compute is not None:
        if overrides or data is not None or tune or on is not None:
            raise OptionError(
                f"{name} is computed without training, so key=value, --data, --tune and --on do not apply. "
                f"Leave them out."
            )
        _compute(experiment, folder, as_json, console)
        return
    engine = cluster_of(on, cpus, gpus, slurm)
    ready = prepare(
        experiment,
        folder,
        small=small,
        tune=tune,
        data=data,
        overrides=overrides or [],
        say=lambda words: console.print(words),
    )
    records = run_under_bar(ready.sweep, folder, console, jobs, ready.published, engine)
    summary = write_files(ready.sweep, records, folder, console, ready.published)
    if as_json:
        print(json.dumps(summary, indent=2))
    else:
        _tell(ready.published, summary, place.page, console)
    if records and not any(record.ok for record in records):
        raise SystemExit(1)


def _tell(published: Mapping[str, Any], summary: Mapping[str, Any], page: str, console: Console) -> None:
    from .comparison_files import print_comparison

    print_comparison(summary, page, console)
    for method, figures in published["rows"].items():
        said = ", ".join(f"{task} {value:g}" for task, value in figures.items())
        console.print(f"published {method}: {said}", markup=False, soft_wrap=True)
    for sentence in published["deviations"]:
        console.print(f"deviation: {sentence}", markup=False, soft_wrap=True)


def _list(as_json: bool) -> None:
    from rich.table import Table

    from ..papers import experiment_names, load_experiment
    from .terminal import Console

    found = {name: load_experiment(name) for name in experiment_names()}
    if as_json:
        print(
            json.dumps(
                {name: e.model_dump(include={"title", "source", "needs", "missing"}) for name, e in found.items()},
                indent=2,
            )
        )
        return
    table = Table("name", "what", "needs at full size", "--small")
    for name, experiment in found.items():
        needs = experiment.needs if experiment.missing is None else f"not here: {experiment.missing}"
        table.add_row(name, experiment.title, needs, "yes" if experiment.small else "–")
    Console().print(table)


def _compute(experiment: Experiment, folder: Path, as_json: bool, console: Console) -> None:
    from rich.table import Table

    from ..checkpoint import write_atomically
    from ..pages import write_claims
    from ..papers import COMPUTATIONS
    from .comparison_files import provenance

    rows = [asdict(row) for row in COMPUTATIONS[str(experiment.compute)]()]
    found: dict[str, Any] = {"title": experiment.title, "source": experiment.source, "rows": rows}
    found |= {"deviations": experiment.deviations, "provenance": provenance()}
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "computed.json", json.dumps(found, indent=1) + "\n")
    write_claims(found, folder / "computed.html")
    if as_json:
        print(json.dumps(found, indent=2))
    else:
        table = Table("claim", "published", "found", "agrees")
        for row in rows:
            agrees = {True: "yes", False: "NO", None: "–"}[row["agrees"]]
            table.add_row(row["claim"], row["published"], row["found"], agrees)
        console.print(table)
        for sentence in experiment.deviations:
            console.print(f"deviation: {sentence}", markup=False, soft_wrap=True)
        console.print(f"open {(folder / 'computed.html').resolve().as_uri()}", soft_wrap=True)
    if any(row["agrees"] is False for row in rows):
        raise SystemExit(1)
