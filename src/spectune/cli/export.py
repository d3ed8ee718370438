"""`spectune export`: write a spectral adapter in a form that other software loads, with the proof."""

from __future__ import annotations

import json
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import OptionError
from .output import Overwrite, may_replace

if TYPE_CHECKING:
    from ..export import LoraExport, Merged


class ExportForm(str, Enum):
    """What the adapter becomes."""

    lora = "lora"
    merged = "merged"


def export(
    adapter: Annotated[Path, typer.Argument(help="Folder of a saved spectral adapter, or of its run.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write; new or empty, or with --overwrite.")],
    to: Annotated[
        ExportForm, typer.Option("--to", help="A LoRA folder, or the base checkpoint merged.")
    ] = ExportForm.lora,
    base: Annotated[
        str | None, typer.Option("--base", help="Base: folder, file or hub name; default: the one the adapter names.")
    ] = None,
    max_rank: Annotated[int | None, typer.Option(help="Cut wider updates to this rank (lora).")] = None,
    allow_lossy: Annotated[bool, typer.Option("--allow-lossy", help="Let --max-rank lose part of an update.")] = False,
    pad: Annotated[
        bool, typer.Option("--pad/--no-pad", help="Pad layers of smaller rank to the largest, with zeros (lora).")
    ] = True,
    pad_to: Annotated[int | None, typer.Option(help="Give every layer this larger rank, with zeros (lora).")] = None,
    diffusers: Annotated[
        str | None,
        typer.Option(help="Also write diffusers' names for this part: unet, transformer, text_encoder (lora)."),
    ] = None,
    overwrite: Overwrite = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print machine-readable results.")] = False,
) -> None:
    """Write an adapter in a form that other software loads, and print the proof that it is the same update."""
    overwrite = may_replace(output, overwrite)
    if to is ExportForm.merged:
        if max_rank is not None or pad_to is not None or not pad or allow_lossy or diffusers:
            raise OptionError(
                "--max-rank, --allow-lossy, --no-pad, --pad-to and --diffusers work only with --to lora. Leave them "
                "out."
            )
        _show(_merge(adapter, output, base, overwrite), as_json)
        return
    from ..export import export_lora

    done = export_lora(
        adapter,
        output,
        base_model=base,
        max_rank=max_rank,
        allow_lossy=allow_lossy,
        pad=pad,
        pad_to=pad_to,
        diffusers=diffusers,
        overwrite=overwrite,
    )
    if as_json:
        proof = {
            "path": str(done.path),
            "max_rank": done.max_rank,
            "vllm_max_lora_rank": done.vllm_max_lora_rank,
            "refused": done.refused,
            "lost": done.lost,
            "proof": done.proof.to_json(),
        }
        print(json.dumps(proof, indent=2))
    else:
        _print_proof(done)


def _merge(adapter: Path, output: Path, base: str | None, overwrite: bool) -> Merged:
    from ..export import merge_checkpoint
    from .progress import Stages
    from .terminal import Console

    with Stages(Console(stderr=True)) as stages:
        step: Any = None

        def on_tensor(done: int, total: int, name: str) -> None:
            nonlocal step
            step = step or stages.begin("merging", total)
            step(done, total, None)

        return merge_checkpoint(base, adapter, output, overwrite=overwrite, on_tensor=on_tensor)


def _show(done: Merged, as_json: bool) -> None:
    from .terminal import say

    if as_json:
        print(json.dumps(done.to_json(), indent=2))
        return
    say(f"{len(done.tensors)} weights merged into {done.path}, in float32, rounded once to the base's {done.dtype}")
    say(f"rounding lost at most {done.worst_rounding:.2%} of an update (Frobenius norm)")
    if done.copied:
        say(f"trained in full and copied: {', '.join(done.copied)}")
    if done.architecture:
        say(f"the folder is a {done.architecture}; README.md says how to load it")
    if done.left_out:
        more = f" and {len(done.left_out) - 1} more" if len(done.left_out) > 1 else ""
        say(f"left out, because this class has no place for it: {done.left_out[0]}{more}")
    if done.untied:
        say(f"no longer tied: {', '.join(done.untied)} (tie_word_embeddings is false in the new config.json)")


def _print_proof(done: LoraExport) -> None:
    from rich.table import Table

    from .terminal import Console

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
    if any(done.lost.values()):
        console.print(f"lossy: --max-rank cut off at most {max(done.lost.values()):.1%} of an update")
    if done.exact_ranks != done.ranks:
        smallest = min(done.exact_ranks.values())
        console.print(
            f"ranks from {smallest} are padded to {done.max_rank} with zeros, as llama.cpp and SGLang need it"
        )
    console.print(_readers(done), soft_wrap=True)
    console.print(f"LoRA written to {done.path}", soft_wrap=True)


def _readers(done: LoraExport) -> str:
    """Get one line on what servers make of the folder."""
    refusals = [f"{reader} ({why})" for reader, why in done.refused.items()]
    line = f"would be refused or misread by: {'; '.join(refusals)}" if refusals else "vLLM, SGLang, llama.cpp: fits"
    served = done.vllm_max_lora_rank
    return f"{line}. vLLM needs --max-lora-rank {served}" if served and "vLLM" not in done.refused else line
