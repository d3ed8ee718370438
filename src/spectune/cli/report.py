"""`spectune report`: a run as one self-contained HTML page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer


def report(
    run_dir: Annotated[Path, typer.Argument(help="Folder of a run.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print machine-readable results on stdout.")] = False,
) -> None:
    """Write report.html into a run's folder, from its run.json; a run without one is loaded and looked at first."""
    from rich.console import Console

    from ..checkpoint import write_atomically
    from ..pages import write_report
    from ..runs import RunRecord

    path = run_dir / "run.json"
    if path.is_file():
        record = RunRecord.from_json(path.read_text("utf-8"))
    else:
        from ..runs import RunResult, load_run
        from .run_page import run_record

        result = RunResult.read(run_dir)
        recipe, model = load_run(run_dir)
        record = run_record(result, recipe, model)
        write_atomically(path, record.to_json() + "\n")
    write_report(record, run_dir / "report.html")
    page = (run_dir / "report.html").resolve()
    if as_json:
        print(json.dumps({"report": str(page)}, indent=2))
    else:
        Console().print(f"open {page.as_uri()}", soft_wrap=True)
