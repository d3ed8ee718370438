"""`spectune extract`: get an adapter from a full fine-tune."""

from __future__ import annotations

import json
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import OptionError
from .output import Overwrite, may_replace

if TYPE_CHECKING:
    from ..extraction import Extracted


class Form(str, Enum):
    """What the change becomes."""

    lora = "lora"
    spectral_a = "spectral_a"


class Dtype(str, Enum):
    """How factors and matrices are stored."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


def extract(
    base: Annotated[str, typer.Argument(help="The pretrained model: folder, file or hub name.")],
    tuned: Annotated[
        str, typer.Argument(help="The fully tuned model: folder, file, hub name, or a run with adapter: none.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write; new or empty, or with --overwrite.")],
    to: Annotated[Form, typer.Option("--to", help="What the change becomes.")] = Form.lora,
    rank: Annotated[
        int | None, typer.Option("--rank", "-r", help="Rank (lora) or directions (spectral_a); default: 8.")
    ] = None,
    energy: Annotated[
        float | None, typer.Option(help="Keep this share of |dW|^2 in each layer, such as 0.99 (lora).")
    ] = None,
    frobenius: Annotated[
        float | None, typer.Option(help="Lose at most this share of |dW| in each layer, such as 0.1 (lora).")
    ] = None,
    columns: Annotated[
        str | None,
        typer.Option(help="Which directions: top, bottom, random, a start index, or a list 0,2,5 (spectral_a)."),
    ] = None,
    embeddings: Annotated[bool, typer.Option("--embeddings", help="Also adapt embeddings and output heads.")] = False,
    save_rest: Annotated[
        bool,
        typer.Option("--save-rest", help="Also save other changed tensors (norms, heads, …) in full."),
    ] = False,
    exclude: Annotated[
        list[str] | None, typer.Option("--exclude", help="Leave out modules or tensors of this name; repeatable.")
    ] = None,
    dtype: Annotated[Dtype, typer.Option(help="How the factors are stored (lora).")] = Dtype.float32,
    overwrite: Overwrite = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print machine-readable results.")] = False,
) -> None:
    """Write an adapter that turns BASE into TUNED, and measure how much of the change it captures."""
    chosen, overwrite = _columns(columns), may_replace(output, overwrite)
    import torch

    from ..extraction import extract_adapter
    from .progress import Stages
    from .terminal import Console

    with Stages(Console(stderr=True)) as stages:
        bars: dict[str, Any] = {}

        def on_weight(stage: str, done: int, total: int) -> None:
            if stage not in bars:
                bars[stage] = stages.begin(stage, total)
            bars[stage](done, total, None)

        found = extract_adapter(
            base,
            tuned,
            output,
            to=to.value,
            rank=rank,
            energy=energy,
            frobenius=frobenius,
            columns=chosen,
            embeddings=embeddings,
            save_rest=save_rest,
            exclude=exclude or (),
            dtype=getattr(torch, dtype.value),
            overwrite=overwrite,
            on_weight=on_weight,
        )
    if as_json:
        print(json.dumps(found.to_json(), indent=2))
    else:
        _show(found)


def _columns(words: str | None) -> str | int | list[int] | None:
    if words is None or words.isidentifier():
        return words
    try:
        places = [int(word) for word in words.split(",")]
    except ValueError:
        raise OptionError(
            f"--columns {words}: must be top, bottom, random, a start index, or a list such as 0,2,5."
        ) from None
    return places if "," in words else places[0]


def _show(found: Extracted) -> None:
    from rich.table import Table

    from .layer_table import print_by_kind
    from .terminal import Console, say

    console = Console()
    columns = {"rank": "{:g}".format, "|dW| / |W|": "{:.1e}".format}
    columns |= {"|dW|² kept": "{:.2%}".format, "|dW| lost": "{:.2%}".format}
    rows = [(layer.name, (layer.rank, layer.relative, layer.kept, layer.lost)) for layer in found.layers]
    print_by_kind(console, f"{found.form} against the tuned model", columns, rows)
    if found.rest:
        rest = Table("tensor", "what", "change", "saved in full", title="changed outside the adapted layers")
        for tensor in found.rest:
            change = "–" if tensor.relative is None else f"{tensor.relative:.1e}"
            rest.add_row(tensor.name, tensor.why, change, "yes" if tensor.saved else "no")
        console.print(rest)
    say(f"the written file keeps {found.kept:.2%} of |dW|² of the {len(found.layers)} adapted layers")
    if found.left_out:
        say(
            f"left out: {len(found.left_out)} changed tensors, {found.left_out_share:.2%} of the whole change "
            f"(Frobenius norm); --save-rest saves those that PEFT can load"
        )
    if len(set(found.dtypes)) > 1:
        say(f"the models are stored in {' and '.join(found.dtypes)}: part of the change is rounding")
    say(f"kinds of layers: from {found.told_by}; {len(found.unchanged)} tensors did not change")
    say(f"{found.form} written to {found.path} ({found.bytes:,} bytes)")
