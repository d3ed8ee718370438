"""Progress bars for long work: what is done, how fast, time left."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta

from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.text import Text

from ..errors import printable
from .terminal import Console


class Words(ProgressColumn):
    """Words about a task; control characters in names of files and layers are escaped."""

    def __init__(self, words: str) -> None:
        super().__init__()
        self.words = words

    def render(self, task: Task) -> Text:
        return Text(printable(self.words.format(task=task)), style="none")


class Rate(ProgressColumn):
    """Steps per second."""

    def render(self, task: Task) -> Text:
        return Text(f"{task.speed:.1f}/s" if task.speed else "", style="progress.data.speed")


class Stages(Progress):
    """One bar for each stage of a run; without a terminal, as in a log, a line now and then in place of a bar."""

    def __init__(self, console: Console) -> None:
        columns = (Words("{task.description}"), BarColumn(), MofNCompleteColumn(), Rate(), TimeElapsedColumn())
        more = (TimeRemainingColumn(), Words("{task.fields[said]}"))
        super().__init__(*columns, *more, console=console, disable=not console.is_terminal)

    def begin(self, name: str, steps: int) -> Callable[[int, int, float | None], None]:
        """Start a bar, and get the function to call after each step with (step, steps, loss or None)."""
        bar = self.add_task(name, total=steps, said="")

        def on_step(step: int, steps: int, loss: float | None) -> None:
            said = "" if loss is None else f"loss {loss:.3f}"
            self.update(bar, completed=step, total=steps, said=said)
            if self.disable and (step == steps or step % line_every(steps) == 0):
                self.console.print(_line(self.tasks[self.task_ids.index(bar)]), soft_wrap=True)

        return on_step

    def lazily(self, name: str) -> Callable[..., None]:
        """Get the function to call with (step, steps, loss or the item's name); the bar starts with the first call."""
        begun: Callable[[int, int, float | None], None] | None = None

        def on_step(step: int, steps: int, said: float | str | None = None) -> None:
            nonlocal begun
            begun = begun or self.begin(name, steps)
            begun(step, steps, said if isinstance(said, float) else None)

        return on_step


def _line(task: Task) -> str:
    """Get a bar in words: what is done of how much, what is said of it, how fast, time left."""
    done = f"{task.description}: {task.completed:.0f} of {task.total or 0:.0f}"
    speed = f"{task.speed:.1f}/s" if task.speed else ""
    left = f"{timedelta(seconds=int(task.time_remaining))} left" if task.time_remaining else ""
    return ", ".join(part for part in (done, task.fields["said"], speed, left) if part)


def line_every(steps: int) -> int:
    """Get after how many steps a log gets a line: a twentieth of them, and at most 500, as transformers logs."""
    return min(max(1, steps // 20), 500)


class Bytes(Progress):
    """One bar that counts bytes: GiB done, GiB per second, time left, the last item."""

    def __init__(self, console: Console) -> None:
        columns = (Words("{task.description}"), BarColumn(), DownloadColumn(binary_units=True))
        more = (TransferSpeedColumn(), TimeRemainingColumn(), Words("{task.fields[said]}"))
        super().__init__(*columns, *more, console=console)

    def begin(self, name: str, total: int) -> Callable[[int, str], None]:
        """Start the bar, and get the function to call with (bytes just done, name of the item)."""
        bar = self.add_task(name, total=total, said="")
        return lambda size, said: self.update(bar, advance=size, said=said)
