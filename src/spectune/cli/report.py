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
    """Write report.html into a run's folder. If the adapter was not analysed when the run ended, do it now."""
    from ..checkpoint import refuse_links
    from ..pages import write_report
    from ..runs import Run, load_run, look
    from .terminal import Console

    run = Run.open(run_dir)
    refuse_links(run.folder)
    result = run.result
    if not result.looked_at:
        result = look(result, *load_run(run_dir))
        run.write(result)
    write_report(result, run.page)
    page = run.page.resolve()
    if as_json:
        print(json.dumps({"report": str(page)}, indent=2))
    else:
        Console().print(f"open {page.as_uri()}", soft_wrap=True)
