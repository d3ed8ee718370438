"""`spectune inspect`: the spectra of a model or an adapter, and what every method would cost."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import OptionError

if TYPE_CHECKING:
    from rich.table import Table

    from ..surveys import AdapterSurvey, ModelSurvey

# Layers in the terminal's list of the most changed ones; --json and --html have all. Chosen.
MOST_CHANGED = 8


def inspect(
    path: Annotated[
        str, typer.Argument(help="A model, a saved adapter (also LoRA), or a run: folder, file, hub name.")
    ],
    base: Annotated[
        str | None, typer.Option(help="Base of an adapter: folder, file or hub name; default: the one it names.")
    ] = None,
    r: Annotated[int, typer.Option("--r", help="Directions of each method in the budget, and for the overlaps.")] = 8,
    include: Annotated[str | None, typer.Option(help="Only weights whose name matches this regex (model).")] = None,
    exclude: Annotated[
        str | None, typer.Option(help="Leave out weights whose name matches this regex (model).")
    ] = None,
    sample: Annotated[int | None, typer.Option(help="Look at only this many weights of each kind (model).")] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="No timing (model); no overlaps and intruders (adapter).")
    ] = False,
    html: Annotated[Path | None, typer.Option(help="Also write an HTML page.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print machine-readable results.")] = False,
) -> None:
    """Show a model's spectra and the budget of every method, or what an adapter does to its base."""
    from ..pages import write_survey
    from ..surveys import ModelSurvey
    from .terminal import say

    survey = _survey(path, base, r, include, exclude, sample, quick)
    if html is not None:
        write_survey(survey, html)
    if as_json:
        print(json.dumps(survey.to_json(), indent=1, allow_nan=False))
    elif isinstance(survey, ModelSurvey):
        _show_model(survey)
    else:
        _show_adapter(survey)
    if html is not None and not as_json:
        say(f"page: {html.resolve().as_uri()}")


def _survey(
    path: str,
    base: str | None,
    r: int,
    include: str | None,
    exclude: str | None,
    sample: int | None,
    quick: bool,
) -> ModelSurvey | AdapterSurvey:
    from ..surveys import is_adapter, survey_adapter, survey_model
    from .progress import Stages
    from .terminal import Console

    adapter = is_adapter(path)
    foreign = {"--include": include, "--exclude": exclude, "--sample": sample} if adapter else {"--base": base}
    if given := [option for option, value in foreign.items() if value is not None]:
        kind, other = ("an adapter", "a model") if adapter else ("a model", "an adapter")
        raise OptionError(f"{path} is {kind}, and {', '.join(given)} works only for {other}. Leave it out.")
    with Stages(Console(stderr=True)) as stages:
        on_layer = stages.lazily("layers")
        if adapter:
            return survey_adapter(path, base, r, quick=quick, on_layer=on_layer)
        return survey_model(path, r, include=include, exclude=exclude, sample=sample, quick=quick, on_layer=on_layer)


def _show_model(survey: ModelSurvey) -> None:
    from ..pages import readable_bytes, readable_seconds, share, short
    from ..surveys import group_figures
    from .terminal import Console

    kinds = _table(
        f"spectra by kind of weight (medians, r = {survey.r})",
        *("kind", "n", "out x in", "eff. rank", "stable", f"energy at {survey.r}", "r for 90%"),
    )
    for row in group_figures(survey):
        shape = "x".join(map(str, row["shapes"][0])) + (" …" if len(row["shapes"]) > 1 else "")
        effective = f"{short(row['effective_rank'])} ({row['effective_share']:.0%})"
        figures = (effective, short(row["stable_rank"]), share(row["energy_at_r"]), short(row["r_for_90"]))
        kinds.add_row(row["group"], str(row["count"]), shape, *figures)
    costs = _table(
        f"what every method would cost on {survey.targets} weights",
        *("method", "trained", "file", "memory", "LoRA rank", "SVD (est.)"),
    )
    for cost in survey.budget:
        rank = "none" if cost.exact_rank is None else str(cost.exact_rank)
        sizes = (readable_bytes(cost.file_bytes), readable_bytes(cost.memory_bytes))
        costs.add_row(cost.method, f"{cost.trainable:,}", *sizes, rank, readable_seconds(cost.decompose_seconds))
    console = Console()
    console.print(kinds)
    console.print(costs)
    if len(survey.weights) < survey.targets:
        console.print(f"looked at {len(survey.weights)} of {survey.targets} weights, evenly spread over the blocks")
    for reason, count in survey.left_out.items():
        console.print(f"left out: {count} {'matrix' if count == 1 else 'matrices'} ({reason})")
    for cost in survey.budget:
        if cost.left_out:
            console.print(f"{cost.method}: {cost.left_out} weights have too few directions and are not counted")
    console.print("memory: basis, numbers, gradients, AdamW's moments, float32; without activations", soft_wrap=True)


def _show_adapter(survey: AdapterSurvey) -> None:
    from ..pages import readable_bytes, share, short
    from ..surveys import adapter_group_figures
    from .terminal import Console

    rows = adapter_group_figures(survey)
    located = any("intruders" in row for row in rows)
    more = ("in top", "out top", "intruders") if located else ()
    kinds = _table(
        f"{survey.method}: the update by kind of layer (medians)",
        *("kind", "n", "|dW|", "of |W|", "rank", "r 99%", *more),
    )
    for row in rows:
        figures = [short(row["norm"]), share(row["relative"]), short(row["rank"])]
        figures.append(short(row["suggested_r"]))
        if located:
            figures += [share(row["right_top"]), share(row["left_top"]), f"{row['intruders']}/{row['looked_at']}"]
        kinds.add_row(row["group"], str(row["count"]), *figures)
    console = Console()
    console.print(kinds)
    if located:
        chance = f"{share(rows[0]['right_chance'])} and {share(rows[0]['left_chance'])}"
        console.print(
            f"in/out top: share of the update in the base's top {survey.r} input/output directions "
            f"(by chance {chance} in the first row)",
            soft_wrap=True,
        )
    changed = sorted(survey.layers, key=lambda layer: layer.relative or layer.norm, reverse=True)[:MOST_CHANGED]
    if len(survey.layers) > 1:
        size = "|dW| / |W|" if survey.base else "|dW|"
        console.print(f"most changed ({size}):")
        for layer in changed:
            figure = short(layer.norm) if layer.relative is None else share(layer.relative)
            console.print(f"  {figure:>8}  {layer.name}", highlight=False, markup=False)
    size = readable_bytes(survey.file_bytes)
    console.print(
        f"{survey.trainable:,} trained numbers in {size}; LoRA rank for 99% of the energy: {survey.suggested_r}"
    )
    for line in survey.missing:
        console.print(f"not known here: {line}", highlight=False, markup=False)


def _table(title: str, *columns: str) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for place, words in enumerate(columns):
        table.add_column(words, justify="right" if place else "left", overflow="fold")
    return table
