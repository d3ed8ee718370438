"""`spectune resize`: cut a LoRA to a lower rank, or to fewer numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import OptionError
from .extract import Dtype
from .output import Overwrite, may_replace

if TYPE_CHECKING:
    from ..extraction import Resized


def resize(
    lora: Annotated[Path, typer.Argument(help="LoRA folder of PEFT, a run's folder, or a file of diffusers or kohya.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="New folder or new file, like the LoRA.")],
    rank: Annotated[int | None, typer.Option("--rank", "-r", help="Largest rank that a layer keeps.")] = None,
    energy: Annotated[float | None, typer.Option(help="Keep this share of |dW|² in each layer, such as 0.99.")] = None,
    frobenius: Annotated[
        float | None, typer.Option(help="Lose at most this share of |dW| in each layer, such as 0.1.")
    ] = None,
    share: Annotated[
        float | None,
        typer.Option(help="Keep this share of all numbers, by one threshold over all layers, such as 0.25."),
    ] = None,
    calibrate: Annotated[
        Path | None,
        typer.Option(
            help="With --share: keep what matters most to this run's task, by gradients of its training examples."
        ),
    ] = None,
    dtype: Annotated[Dtype | None, typer.Option(help="Dtype of the factors; default: unchanged.")] = None,
    overwrite: Overwrite = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print machine-readable results.")] = False,
) -> None:
    """Write the best approximation of a LoRA at a lower rank, layer by layer, in the same file layout."""
    overwrite = may_replace(output, overwrite)
    if calibrate is not None and share is None:
        raise OptionError("--calibrate chooses what to keep under a budget. Give --share, such as --share 0.25.")
    import torch

    from ..extraction import resize_lora
    from .progress import Stages
    from .terminal import Console

    with Stages(Console(stderr=True)) as stages:
        stored = None if dtype is None else getattr(torch, dtype.value)
        scores = None
        if calibrate is not None:
            from ..surveys.direction_scores import scores_of

            scores = scores_of(calibrate, lora, on_batch=stages.lazily("gradients of batches"))
        cut: dict[str, Any] = {"rank": rank, "energy": energy, "frobenius": frobenius, "dtype": stored}
        cut |= {"share": share, "scores": scores}
        done = resize_lora(lora, output, **cut, overwrite=overwrite, on_layer=stages.lazily("resizing"))
    if as_json:
        print(json.dumps(done.to_json(), indent=2))
    else:
        _show(done)


def _show(done: Resized) -> None:
    from .layer_table import print_by_kind
    from .terminal import Console, say

    def share(lost: float) -> str:
        return f"{lost:.2%}" if lost >= 1e-4 else f"{lost:.0e}" if lost else "0"

    columns = {"rank": "{:g}".format, "new": "{:g}".format, "cut": share, "rounded": share, "lost": share}
    rows = [(layer.name, (layer.old_rank, layer.rank, layer.cut, layer.rounding, layer.lost)) for layer in done.layers]
    print_by_kind(Console(), "the new LoRA against the old one", columns, rows)
    say("cut: |dW| lost by the lower rank; rounded: by the file's dtype; lost: both, measured in the new file")
    if done.at_their_rank:
        say(f"{len(done.at_their_rank)} of {len(done.layers)} layers keep their rank: no cut was needed")
    if done.carried:
        say(f"{len(done.carried)} tensors of modules trained in full are copied")
    say(f"largest loss in a layer: {done.worst_loss:.2%} of |dW|")
    say(f"{done.bytes_before:,} -> {done.bytes_after:,} bytes; LoRA written to {done.path}")
