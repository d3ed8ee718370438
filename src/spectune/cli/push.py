"""`spectune push`: an adapter or a model to the Hugging Face hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import OptionError


def push(
    path: Annotated[Path, typer.Argument(help="Folder of a run, of an adapter, or of what spectune export wrote.")],
    repository: Annotated[str, typer.Argument(help="OWNER/NAME on the hub; created if there is none.")],
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show each file with its size and hash, and the card; no network.")
    ] = False,
    private: Annotated[bool, typer.Option("--private", help="Only you can see it; a public one is refused.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch to write to, created if there is none.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print machine-readable results.")] = False,
) -> None:
    """Put an adapter or a model on the Hugging Face hub, with its card and without paths of this machine."""
    if revision is not None and (not revision or not revision.isprintable() or " " in revision or ".." in revision):
        raise OptionError(f"--revision {revision!r}: this is not the name of a branch. Correct it.")
    from ..export.upload import plan_upload, require_token, upload
    from .terminal import say

    plan = plan_upload(path, repository, _spread(path))
    if not dry_run:
        require_token()
    if not as_json:
        _show(plan, dry_run)
    where = None if dry_run else upload(plan, private=private, revision=revision)
    if as_json:
        print(json.dumps({**plan.to_json(), "address": where}, indent=2))
    else:
        say("nothing was sent (--dry-run)" if dry_run else f"pushed: {where}")


def _show(plan: Any, dry_run: bool) -> None:
    from .terminal import say

    for file in plan.files:
        say(f"{file.name}  {file.size:,} bytes" + (f"  sha256 {file.sha256}" if dry_run else ""))
    for line in plan.rewritten:
        say(f"rewritten in {line}")
    if plan.left_out:
        say(f"stays here: {', '.join(plan.left_out)}")
    if dry_run:
        say()
        say(plan.card)


def _spread(path: Path) -> dict[str, Any] | None:
    """Get the figures over the seeds of the sweep that a run is part of; None for any other folder."""
    from ..sweeps import seeds_like

    return seeds_like(path)
