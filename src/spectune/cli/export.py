"""`spectune export`: a spectral adapter as an ordinary LoRA folder, with the proof."""

from __future__ import annotations

import json
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from ..export import LoraExport


class Target(str, Enum):
    """What the adapter becomes."""

    lora = "lora"


def export(
    adapter: Annotated[Path, typer.Argument(help="Folder of a saved spectral adapter.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write; must be new or empty.")],
    to: Annotated[Target, typer.Option("--to", help="What to write.")] = Target.lora,
    base: Annotated[
        str | None, typer.Option("--base", help="Base model folder or repository; default: what the adapter names.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print machine-readable results.")] = False,
) -> None:
    """Write an adapter in a form that other software loads, and print the proof that it is the same update."""
    from ..export import export_lora

    done = export_lora(adapter, output, base_model=base)
    if as_json:
        print(json.dumps({"path": str(done.path), "max_rank": done.max_rank, "proof": done.proof.to_json()}, indent=2))
    else:
        _print_proof(done)


def _print_proof(done: LoraExport) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("layer", "rank", "max |dW error|", "relative", title="the LoRA against the spectral adapter")
    for name, rank, error, relative in done.proof.table():
        table.add_row(name, str(rank), f"{error:.1e}", f"{relative:.1e}")
    console = Console()
    console.print(table)
    logits = done.proof.logits
    if logits.error is None:
        console.print(f"logits not compared: {logits.skipped}")
    else:
        console.print(f"max |logit difference| {logits.error:.1e}, the largest logit is {logits.largest:.1e}")
    served = done.vllm_max_lora_rank
    console.print(f"vLLM: --max-lora-rank {served}" if served else f"rank {done.max_rank} is more than vLLM serves")
    console.print(f"LoRA written to {done.path}")
