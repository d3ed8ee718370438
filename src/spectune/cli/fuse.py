"""`spectune fuse`: make one adapter of several on the same base, with a report of how much they overlap."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import OptionError
from .output import Overwrite, may_replace

if TYPE_CHECKING:
    from ..fusion import Fused, OverlapReport
    from ..fusion.folder import Saved
    from ..runs import Kept


def fuse(
    adapters: Annotated[list[Path], typer.Argument(help="Folders of saved adapters or runs, spectral or LoRA.")],
    rule: Annotated[
        str,
        typer.Option(
            help="spectral, average, task_singular, isotropic, core, aligned_ties, calibrated, gradient, sequential, "
            "match or orthogonal; auto chooses and says why, all compares."
        ),
    ] = "spectral",
    weights: Annotated[
        str | None,
        typer.Option(help="One number for all, or one for each: 1 or 0.5,0.3,0.2; default: 1/N, or 1 (see docs)."),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", help="Folder to write; new or empty, or with --overwrite. Default: report only."
        ),
    ] = None,
    report: Annotated[Path | None, typer.Option(help="Write the overlap report as an HTML page.")] = None,
    base: Annotated[
        str | None, typer.Option("--base", help="Base: folder, file or hub name; default: the one the adapters name.")
    ] = None,
    allow_overlap: Annotated[
        bool, typer.Option("--allow-overlap", help="Fuse even if adapters tuned the same columns or rows.")
    ] = False,
    examples: Annotated[
        list[Path] | None,
        typer.Option(
            help="Each adapter's own examples, in order: a text or JSONL file, or a run (gradient, sequential, match)."
        ),
    ] = None,
    keep: Annotated[
        Path | None, typer.Option(help="Texts on which the merge should leave the base alone (sequential, match).")
    ] = None,
    eps: Annotated[
        float | None, typer.Option(help="Pull towards no change (gradient) or the mean (sequential, match).")
    ] = None,
    rank: Annotated[int | None, typer.Option(help="Rank of the result (match); default: the ranks' sum.")] = None,
    density: Annotated[
        float | None, typer.Option(help="Share of each update's numbers that stays (core, aligned_ties).")
    ] = None,
    common: Annotated[
        float | None, typer.Option(help="Share of the directions that are the sum's (isotropic); default: 1.")
    ] = None,
    evaluate: Annotated[
        list[Path] | None, typer.Option(help="A run whose task is measured before and after the merge; repeatable.")
    ] = None,
    tune: Annotated[
        int | None,
        typer.Option(
            help="Try this many merges for the weights by which the tasks keep most of their validation scores; needs "
            "--evaluate with each adapter's run, in order."
        ),
    ] = None,
    heads_apart: Annotated[
        bool, typer.Option("--heads-apart", help="Leave out modules trained in full, such as heads.")
    ] = False,
    as_lora: Annotated[bool, typer.Option("--as-lora", help="Write a LoRA even if a spectral_a is possible.")] = False,
    max_rank: Annotated[int | None, typer.Option(help="Cut wider updates to this rank (LoRA).")] = None,
    allow_lossy: Annotated[bool, typer.Option("--allow-lossy", help="Let --max-rank lose part of an update.")] = False,
    pad: Annotated[
        bool, typer.Option("--pad/--no-pad", help="Pad layers of smaller rank to the largest (LoRA).")
    ] = True,
    overwrite: Overwrite = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print machine-readable results.")] = False,
) -> None:
    """Make one adapter out of several, and show how much of each is kept and how much they overlap."""
    from ..fusion import FUSIONS
    from ..fusion import fuse as fuse_adapters
    from ..fusion.adapters import open_adapters
    from ..fusion.experts import refuse_lora_of_experts
    from ..runs import Kept
    from .fuse_examples import ALL, Looks
    from .fuse_tasks import evaluate_tasks, fuse_by_all, refuse_tuning, show_all, tuned
    from .progress import Stages
    from .terminal import Console

    if output is None and (as_lora or max_rank is not None or allow_lossy or not pad or overwrite):
        raise OptionError(
            "--as-lora, --max-rank, --allow-lossy, --no-pad and --overwrite need a folder to write to. Pass -o FOLDER."
        )
    overwrite = output is not None and may_replace(output, overwrite)
    if as_lora:
        refuse_lora_of_experts(open_adapters(adapters), "--as-lora")
    if rule == ALL and (output is not None or report is not None):
        raise OptionError("--rule all compares and writes nothing. Leave out -o and --report, or choose one rule.")
    if tune is not None:
        refuse_tuning(rule, weights, len(adapters), len(evaluate or ()))
    looks = Looks(adapters, examples or [], keep, base)
    looks.refuse_idle(rule)
    tasks, progress = [Kept.of(run) for run in evaluate or []], Console(stderr=True)
    options = {"allow_overlap": allow_overlap or None, "eps": eps, "rank": rank, "density": density, "common": common}

    def by(name: str, given: list[float] | None = None) -> Fused:
        known = options if rule != ALL else {key: options[key] for key in FUSIONS[name].options() if key in options}
        more: dict[str, Any] = {**known, **looks.for_rule(name), "weights": given or _weights(weights), "base": base}
        if "on_layers" in more:
            return fuse_adapters(adapters, rule=name, heads_apart=heads_apart, **more)
        with Stages(progress) as stages:
            step = stages.begin(f"{name}, layers", 0)
            more["on_layers"] = lambda done, layers: step(done, layers, None)
            return fuse_adapters(adapters, rule=name, heads_apart=heads_apart, **more)

    if tune is not None:
        merges = iter([tuned(lambda given: by(rule, given), evaluate or [], tune, progress)])
    else:
        merges = fuse_by_all(by, bool(examples), progress) if rule == ALL else iter([by(rule)])
    reports = []
    for fused in merges:
        evaluate_tasks(fused, tasks, progress)
        reports.append(fused.report)
    if rule == ALL:
        show_all(reports, tasks, as_json)
        return
    saved = (
        fused.save(output, as_lora=as_lora, max_rank=max_rank, allow_lossy=allow_lossy, pad=pad, overwrite=overwrite)
        if output
        else None
    )
    if report is not None:
        from ..pages import write_overlap_page

        write_overlap_page(fused.report, report, tasks)
    _show(fused, saved, report, tasks, as_json)


def _weights(words: str | None) -> list[float] | float | None:
    if words is None:
        return None
    try:
        numbers = [float(word) for word in words.split(",")]
    except ValueError:
        raise OptionError(f"--weights {words!r}: must be numbers separated by commas, such as 0.5,0.5.") from None
    return numbers[0] if len(numbers) == 1 else numbers


def _show(fused: Fused, saved: Saved | None, page: Path | None, tasks: list[Kept], as_json: bool) -> None:
    from .fuse_tasks import print_tasks, tasks_as_json
    from .terminal import Console

    if as_json:
        written = {} if saved is None else _written(saved)
        print(json.dumps({**fused.report.to_json(), **written, **tasks_as_json(tasks)}, indent=2))
        return
    console = Console()
    _print_report(console, fused.report)
    print_tasks(tasks, console)
    if saved is not None:
        what = "exports to a LoRA" if saved.kind == "spectral_a" else "a LoRA"
        if any(saved.lost.values()):
            console.print(f"lossy: --max-rank cut off at most {max(saved.lost.values()):.1%} of an update")
        console.print(f"{saved.kind} written to {saved.path}: {what} of rank {saved.max_rank}", soft_wrap=True)
        console.print(f"rounding to float32 lost at most {saved.error:.1e} of an update")
    if page is not None:
        console.print(f"report: {page.resolve().as_uri()}", soft_wrap=True)


def _written(saved: Saved) -> dict[str, Any]:
    return {
        "path": str(saved.path),
        "kind": saved.kind,
        "max_rank": saved.max_rank,
        "ranks": saved.ranks,
        "error": saved.error,
        "lost": saved.lost,
    }


OVERLAP = {
    "shared": "{:g}".format,
    "cosine": "{:+.3f}".format,
    "outputs": "{:.0f}°".format,
    "inputs": "{:.0f}°".format,
    "cross": "{:.1%}".format,
}
"""Column -> its form: the figures of two updates of one layer."""


def _print_report(console: Any, report: OverlapReport) -> None:
    from rich.table import Table

    from .layer_table import print_by_kind

    pairs: dict[tuple[str, str], list[tuple[str, tuple[float, ...]]]] = {}
    for pair in report.pairs:
        figures = (len(pair.shared_columns), pair.cosine, pair.output_angle, pair.input_angle, pair.spectral_cross)
        pairs.setdefault((pair.first, pair.second), []).append((pair.layer, figures))
    if report.why:
        console.print(f"rule {report.rule}, because {report.why}", soft_wrap=True)
    kept = Table("adapter", "weight", "strength kept", title=f"rule {report.rule}")
    for name, weight in zip(report.adapters, report.weights, strict=True):
        kept.add_row(name, f"{weight:.3g}", f"{report.kept[name]:.1%}")
    for (first, second), rows in pairs.items():
        print_by_kind(console, f"overlap of {first} and {second}", OVERLAP, rows)
    if pairs:
        console.print(
            "shared: singular columns that both tuned; angles: 90° is no overlap; cross: terms that fusing adds"
        )
    console.print(kept)
    console.print(f"base: {report.base}", soft_wrap=True)
