"""`spectune cache`: list or clear the cache of bases."""

from __future__ import annotations

import json
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer


class Action(str, Enum):
    """What to do with the cache."""

    ls = "ls"
    clear = "clear"


def cache(
    action: Annotated[Action, typer.Argument(help="ls lists the entries, clear deletes them all.")],
    folder: Annotated[Path | None, typer.Option("--cache", help="Folder of the cache, if not the default.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print machine-readable results.")] = False,
) -> None:
    """List or delete the stored bases (SPECTUNE_CACHE, or ~/.cache/spectune/bases)."""
    from ..spectrum import BasisCache, default_folder

    store = BasisCache(folder or default_folder())
    if action is Action.clear:
        count, size = store.clear()
        print(json.dumps({"deleted": count, "bytes": size}) if as_json else f"{count} entries, {size:,} bytes deleted")
        return
    entries = list(store.entries())
    if as_json:
        shown = [
            {"name": e.name, "shape": e.shape, "directions": e.rank, "solver": e.solver, "bytes": e.size}
            for e in entries
        ]
        print(json.dumps({"cache": str(store.folder), "limit": store.limit, "entries": shown}, indent=2))
        return
    from rich.table import Table

    from .terminal import Console

    table = Table("weight", "shape", "directions", "solver", "bytes")
    for e in entries:
        table.add_row(e.name, "x".join(map(str, e.shape)), str(e.rank), e.solver, f"{e.size:,}")
    console = Console()
    console.print(table)
    total = sum(e.size for e in entries)
    console.print(f"{len(entries)} entries, {total:,} of {store.limit:,} bytes, in {store.folder}", soft_wrap=True)
