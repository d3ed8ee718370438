"""Tables over layers: a model has hundreds of them, so those of one kind share a row, or three."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any

from ..checkpoint.targets import group_names

FigureForm = Callable[[float], str]


def print_by_kind(
    console: Any, title: str, columns: Mapping[str, FigureForm], rows: Sequence[tuple[str, Sequence[float]]]
) -> None:
    """Print (layer, figures) folded into kinds of layers: lowest, median and highest, or once what is equal in all."""
    from rich import box
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("kind of layer", overflow="fold")
    for words in ("n", "", *columns):
        table.add_column(words, justify="left" if not words else "right", overflow="fold")
    for kind, figures in kinds(rows).items():
        for place, (said, values) in enumerate(summaries(figures, list(columns.values()))):
            first = (kind, str(len(figures))) if place == 0 else ("", "")
            table.add_row(*first, said, *values)
    console.print(table)


def kinds(rows: Sequence[tuple[str, Sequence[float]]]) -> dict[str, list[Sequence[float]]]:
    """Get kind -> the figures of its layers."""
    names = group_names(name for name, _ in rows)
    found: dict[str, list[Sequence[float]]] = {}
    for name, figures in rows:
        found.setdefault(names[name], []).append(figures)
    return found


def summaries(figures: Sequence[Sequence[float]], forms: Sequence[FigureForm]) -> list[tuple[str, list[str]]]:
    """Get ("min", cells), ("median", cells), ("max", cells); one unnamed row where all layers say the same."""
    columns = list(zip(*figures, strict=True))
    ends: dict[str, Callable[[Sequence[float]], float]] = {"min": min, "median": median, "max": max}
    found = {said: [form(of(values)) for form, values in zip(forms, columns, strict=True)] for said, of in ends.items()}
    if found["min"] == found["max"]:
        return [("", found["min"])]
    return list(found.items())
