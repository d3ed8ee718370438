"""`spectune schedule`: which singular columns each of several adapters trains, so that they can be fused."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import OptionError

if TYPE_CHECKING:
    from ..fusion import Schedule

METHODS_WITH_ROOM = ("spectral_a", "orthogonal_adaptation")


def schedule(
    concepts: Annotated[int, typer.Option(help="How many adapters will be fused.")],
    r: Annotated[int, typer.Option("--r", help="Directions that each of them tunes.")] = 8,
    private: Annotated[
        bool, typer.Option("--private", help="Draw random columns, for people who tune independently.")
    ] = False,
    top: Annotated[int | None, typer.Option(help="Draw from this many of the strongest columns (--private).")] = None,
    seed: Annotated[int, typer.Option(help="Adapter t draws with seed + t (--private).")] = 0,
    start: Annotated[int, typer.Option(help="First column of the first block.")] = 0,
    method: Annotated[str, typer.Option(help="spectral_a, or orthogonal_adaptation for its rows.")] = "spectral_a",
    as_json: Annotated[bool, typer.Option("--json", help="Print machine-readable results.")] = False,
) -> None:
    """Assign singular columns to several adapters, and print the settings that train them."""
    from ..fusion import disjoint_schedule, sampled_schedule
    from .terminal import say

    if private and (top is None or start or method != "spectral_a"):
        raise OptionError("--private draws spectral_a columns: pass --top K, and leave out --start and --method.")
    if not private and (top is not None or seed):
        raise OptionError(
            "--top and --seed work only with --private. Leave them out: columns are then assigned in blocks."
        )
    if method not in METHODS_WITH_ROOM or (start and method != "spectral_a"):
        raise OptionError(f"--method {method}: must be {' or '.join(METHODS_WITH_ROOM)} (the latter without --start).")
    plan = sampled_schedule(concepts, r, top or 0, seed) if private else disjoint_schedule(concepts, r, start)
    if as_json:
        print(json.dumps({"method": method, **plan.to_json()}, indent=2))
    else:
        say("\n".join(_lines(plan, method)))


def _lines(plan: Schedule, method: str) -> list[str]:
    lines = [f"{len(plan.columns)} adapters, {plan.r} directions each; weights need at least {plan.top} directions"]
    if plan.seeds:
        lines.append(f"chance that two adapters share no column: {plan.clear_pair:.1%}")
        lines.append(f"chance that no two of {len(plan.columns)} share one: {plan.clear_all:.1%}")
        for first, second, shared in plan.clashes:
            lines.append(f"adapters {first} and {second} share the columns {', '.join(map(str, shared))}")
        if not plan.clashes:
            lines.append("in this draw, no two adapters share a column")
    for place, columns in enumerate(plan.columns):
        own = f", seed {plan.seeds[place]}" if plan.seeds else ""
        lines += ["", f"adapter {place}{own}"]
        options: dict[str, object] = {"method": method, "r": plan.r}
        options |= {"columns": list(columns)} if method == "spectral_a" else {"concept": place, "basis_seed": 0}
        lines.append("  yaml:   adapter: {" + ", ".join(f"{name}: {value}" for name, value in options.items()) + "}")
        overrides = (f"adapter.{name}={value}".replace(" ", "") for name, value in options.items())
        lines.append("  shell:  spectune train RUN.yaml " + " ".join(f"'{word}'" for word in overrides))
        lines.append(
            "  python: SpectralConfig(" + ", ".join(f"{name}={value!r}" for name, value in options.items()) + ")"
        )
    return lines
