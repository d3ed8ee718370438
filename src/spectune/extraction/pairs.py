"""Which tensors of two checkpoints belong together."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ..checkpoint import Checkpoint
from ..errors import ExportError, nearest

SHOWN = 5


@dataclass(frozen=True)
class Pairs:
    """The tensors of a base and of a tuned model, by their names in the tuned one."""

    base_names: dict[str, str]
    """Name in TUNED -> name in BASE."""
    new: tuple[str, ...]
    """Only in TUNED, such as a new head."""
    excluded: tuple[str, ...]


def pair(base: Checkpoint, tuned: Checkpoint, exclude: Iterable[str] = (), *, allow_new: bool = False) -> Pairs:
    """Get the pairs of floating-point tensors of two checkpoints of one model.

    One of them may contain the whole model (`bert.encoder…`) and the other only its body (`encoder…`).
    `exclude` names modules or tensors, in whole parts of their paths. `ExportError` lists what is missing, new
    (unless `allow_new`) or of a different shape.
    """
    bases, tuneds = (
        {name for name, dtype in model.dtypes.items() if dtype.is_floating_point} for model in (base, tuned)
    )
    excluded = _excluded(sorted(bases | tuneds), exclude)
    add, drop = _prefixes(bases - excluded, tuneds - excluded)
    names = {f"{add}{name.removeprefix(drop)}": name for name in bases - excluded}
    missing = sorted(names[name] for name in names.keys() - tuneds)
    new = sorted(tuneds - excluded - names.keys())
    if missing:
        found = f"lacks {_listed(missing, f'that {base.path} has')}"
        _refuse(tuned, found, "Leave out what does not matter with --exclude.")
    if new and not allow_new:
        found = f"has {_listed(new, f'that {base.path} lacks')}"
        _refuse(tuned, found, "Save them whole with --save-rest, or leave them out with --exclude.")
    shared = {name: names[name] for name in sorted(names)}
    other = [name for name, of_base in shared.items() if tuned.shapes[name] != base.shapes[of_base]]
    if other:
        shapes = [f"{name} ({_sides(base.shapes[shared[name]])} -> {_sides(tuned.shapes[name])})" for name in other]
        _refuse(tuned, f"has {_listed(shapes, f'in another shape than {base.path}')}", "Leave them out with --exclude.")
    return Pairs(shared, tuple(new), tuple(sorted(excluded)))


def _excluded(names: list[str], exclude: Iterable[str]) -> set[str]:
    found: set[str] = set()
    for word in exclude:
        hits = {name for name in names if f".{word}." in f".{name}."}
        if not hits:
            parts = sorted({part for name in names for part in name.split(".") if not part.isdigit()})
            raise ExportError(f"exclude: no tensor has {word!r} in its name. {nearest(word, parts)}")
        found |= hits
    return found


def _prefixes(bases: set[str], tuneds: set[str]) -> tuple[str, str]:
    """Get (to add, to drop) at the start of BASE's names, so that most of them exist in TUNED."""
    choices = {("", "")}
    choices |= {(front, "") for front in _fronts(tuneds, bases)} | {("", front) for front in _fronts(bases, tuneds)}

    def matches(choice: tuple[str, str]) -> int:
        add, drop = choice
        return sum(f"{add}{name.removeprefix(drop)}" in tuneds for name in bases)

    return max(sorted(choices), key=matches)


def _fronts(longer: set[str], shorter: set[str]) -> set[str]:
    """Get the beginnings of names without which they are in the other set."""
    dots = [(name, i + 1) for name in longer for i, letter in enumerate(name) if letter == "."]
    return {name[:end] for name, end in dots if name[end:] in shorter}


def _refuse(tuned: Checkpoint, found: str, remedy: str) -> None:
    raise ExportError(f"{tuned.path}: {found}. {remedy}")


def _listed(names: list[str], which: str) -> str:
    more = len(names) - SHOWN
    count = "1 tensor" if len(names) == 1 else f"{len(names)} tensors"
    return f"{count} {which}: {', '.join(names[:SHOWN])}{f' and {more} more' if more > 0 else ''}"


def _sides(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "scalar"
