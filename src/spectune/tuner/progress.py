"""What a terminal shows while the weights of a large model are decomposed, or examples pass through it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from ..errors import printable

# Small models are done before anybody could read a bar. Chosen.
SILENT_SECONDS = 2.0


@contextmanager
def ticking(words: str) -> Iterator[Callable[[str], None]]:
    """Get what must be called for each piece of work, with its name; a bar appears on a terminal if it takes a while.

    `words` say what is done, with "{}" for the number of pieces.
    """
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), TextColumn(words.replace("{}", "{task.completed}")), TimeElapsedColumn())
    console = Console(stderr=True)
    bar = Progress(*columns, TextColumn("{task.description}", markup=False), console=console, transient=True)
    job = bar.add_task("", total=None)
    started, shown = time.monotonic(), False

    def tick(layer: str) -> None:
        nonlocal shown
        if not shown and console.is_terminal and time.monotonic() - started > SILENT_SECONDS:
            bar.start()
            shown = True
        bar.update(job, advance=1, description=printable(layer))

    try:
        yield tick
    finally:
        if shown:
            bar.stop()
