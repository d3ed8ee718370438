"""`spectune fuse`: make one adapter of several on the same base, with a report of how much they overlap."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import DataError, OptionError

if TYPE_CHECKING:
    from ..fusion import Fused, OverlapReport
    from ..fusion.folder import Saved


def fuse(
    adapters: Annotated[list[Path], typer.Argument(help="Folders of saved adapters or runs, spectral or LoRA.")],
    rule: Annotated[
        str, typer.Option(help="spectral, average, task_singular, gradient, sequential, match or orthogonal.")
    ] = "spectral",
    weights: Annotated[
        str | None,
        typer.Option(help="One number for all, or one for each: 1 or 0.5,0.3,0.2; default: 1/N (task_singular: 1)."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder to write; must be new or empty. Default: report only.")
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
        typer.Option(help="Text or JSONL file of each adapter's own examples, in order (gradient, sequential, match)."),
    ] = None,
    keep: Annotated[
        Path | None, typer.Option(help="Texts on which the merge should leave the base alone (sequential, match).")
    ] = None,
    eps: Annotated[
        float | None, typer.Option(help="Pull towards no change (gradient) or the mean (sequential, match).")
    ] = None,
    rank: Annotated[int | None, typer.Option(help="Rank of the result (match); default: the ranks' sum.")] = None,
    heads_apart: Annotated[
        bool, typer.Option("--heads-apart", help="Leave out modules trained in full, such as heads.")
    ] = False,
    as_lora: Annotated[bool, typer.Option("--as-lora", help="Write a LoRA even if a spectral_a is possible.")] = False,
    max_rank: Annotated[int | None, typer.Option(help="Cut wider updates to this rank (LoRA).")] = None,
    allow_lossy: Annotated[bool, typer.Option("--allow-lossy", help="Let --max-rank lose part of an update.")] = False,
    pad: Annotated[
        bool, typer.Option("--pad/--no-pad", help="Pad layers of smaller rank to the largest (LoRA).")
    ] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print machine-readable results.")] = False,
) -> None:
    """Make one adapter out of several, and show how much of each is kept and how much they overlap."""
    from ..fusion import fuse as fuse_adapters

    if output is None and (as_lora or max_rank is not None or allow_lossy or not pad):
        raise OptionError(
            "--as-lora, --max-rank, --allow-lossy and --no-pad need a folder to write to. Pass -o FOLDER."
        )
    fused = fuse_adapters(
        adapters,
        rule=rule,
        weights=_weights(weights),
        base=base,
        allow_overlap=allow_overlap or None,
        eps=eps,
        rank=rank,
        heads_apart=heads_apart,
        **_looked_at(rule, adapters, examples, keep, base),
    )
    saved = fused.save(output, as_lora=as_lora, max_rank=max_rank, allow_lossy=allow_lossy, pad=pad) if output else None
    if report is not None:
        from ..pages import write_overlap_page

        write_overlap_page(fused.report, report)
    _show(fused, saved, report, as_json)


def _weights(words: str | None) -> list[float] | float | None:
    if words is None:
        return None
    try:
        numbers = [float(word) for word in words.split(",")]
    except ValueError:
        raise OptionError(f"--weights {words!r}: must be numbers separated by commas, such as 0.5,0.5.") from None
    return numbers[0] if len(numbers) == 1 else numbers


def _looked_at(
    rule: str, adapters: list[Path], examples: list[Path] | None, keep: Path | None, base: str | None
) -> dict[str, Any]:
    """Get what a rule takes besides the adapters: activations of their examples, or the base and batches of them."""
    from ..fusion import FUSIONS

    behind = rule in FUSIONS and FUSIONS[rule].behind
    if keep is not None and not behind:
        raise OptionError(f"--keep: rule {rule!r} does not use it. Leave it out, or use --rule match.")
    if not examples:
        return {}
    if len(examples) != len(adapters):
        raise OptionError(
            f"--examples: {len(examples)} files for {len(adapters)} adapters. Name one for each, in order."
        )
    texts = [_texts(path) for path in examples]
    return (
        _base_and_batches(adapters, texts, None if keep is None else _texts(keep), base)
        if behind
        else {"activations": _activations(adapters, texts, base)}
    )


def _base_and_batches(
    adapters: list[Path], texts: list[list[str]], keep: list[str] | None, base: str | None
) -> dict[str, Any]:
    from ..checkpoint import load_tokenizer
    from ..export.source import open_base
    from .terminal import Console

    model, of = open_base(adapters[0], base)
    tokenizer = load_tokenizer(of.name if of.from_hub else of.config_folder, of.revision)

    def batches(lines: list[str]) -> list[dict[str, Any]]:
        return [dict(tokenizer(line, return_tensors="pt", truncation=True)) for line in lines]

    console = Console(stderr=True)
    return {
        "model": model,
        "examples": [batches(lines) for lines in texts],
        "keep": None if keep is None else batches(keep),
        "on_layers": lambda done, layers: console.print(f"merged {done} of {layers} layers"),
    }


def _activations(adapters: list[Path], texts: list[list[str]], base: str | None) -> list[dict[str, Any]]:
    """Get the Gram matrices of every adapter's own texts, with that adapter on the base."""
    from ..checkpoint import load_tokenizer
    from ..export.source import open_adapted
    from ..fusion import collect_grams
    from .progress import Stages
    from .terminal import Console

    found = []
    with Stages(Console(stderr=True)) as stages:
        for path, lines in zip(adapters, texts, strict=True):
            model, of = open_adapted(path, base)
            # A repository's tokenizer files may not be downloaded yet.
            place = of.name if of.from_hub else of.config_folder
            tokenizer = load_tokenizer(place, of.revision)
            step = stages.begin(f"examples of {path.name}", len(lines))

            def batches(lines: list[str] = lines, tokenizer: Any = tokenizer, step: Any = step) -> Any:
                for place, line in enumerate(lines):
                    yield dict(tokenizer(line, return_tensors="pt", truncation=True))
                    step(place + 1, len(lines), None)

            found.append(collect_grams(model, batches()))
    return found


def _texts(path: Path) -> list[str]:
    """Get one text per line; from a .jsonl file, the field `text` of each line."""
    try:
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot read the examples: {error}. Pass a text or JSONL file.") from None
    if path.suffix == ".jsonl":
        lines = [_field(path, place, line) for place, line in enumerate(lines, 1)]
    if not lines:
        raise DataError(f"{path}: contains no examples. Write one text on each line.")
    return lines


def _field(path: Path, place: int, line: str) -> str:
    try:
        row = json.loads(line)
    except ValueError:
        row = None
    if not isinstance(row, dict) or not isinstance(row.get("text"), str):
        raise DataError(f'{path}: line {place} is not {{"text": "..."}}. Correct it, or pass a plain text file.')
    return str(row["text"])


def _show(fused: Fused, saved: Saved | None, page: Path | None, as_json: bool) -> None:
    if as_json:
        written = {} if saved is None else _written(saved)
        print(json.dumps({**fused.report.to_json(), **written}, indent=2))
        return
    from .terminal import Console

    console = Console()
    _print_report(console, fused.report)
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


def _print_report(console: Any, report: OverlapReport) -> None:
    from rich.table import Table

    pairs = Table("layer", "adapters", "shared", "cosine", "outputs", "inputs", "cross", title="overlap of the updates")
    for pair in report.pairs:
        pairs.add_row(
            pair.layer,
            f"{pair.first}, {pair.second}",
            str(len(pair.shared_columns)),
            f"{pair.cosine:+.3f}",
            f"{pair.output_angle:.0f}°",
            f"{pair.input_angle:.0f}°",
            f"{pair.spectral_cross:.1%}",
        )
    kept = Table("adapter", "weight", "strength kept", title=f"rule {report.rule}")
    for name, weight in zip(report.adapters, report.weights, strict=True):
        kept.add_row(name, f"{weight:.3g}", f"{report.kept[name]:.1%}")
    if report.pairs:
        console.print(pairs)
        console.print(
            "shared: singular columns that both tuned; angles: 90° is no overlap; cross: terms that fusing adds"
        )
    console.print(kept)
    console.print(f"base: {report.base}", soft_wrap=True)
