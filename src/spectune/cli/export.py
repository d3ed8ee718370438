"""`spectune export`: write a spectral adapter in a form that other software loads, with the proof."""

from __future__ import annotations

import json
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import OptionError
from .extract import Dtype
from .output import Overwrite, may_replace


class ExportForm(str, Enum):
    """What the adapter becomes."""

    lora = "lora"
    merged = "merged"
    gguf = "gguf"
    ollama = "ollama"


# Option -> the forms that it is for.
ONLY_FOR = {
    "--max-rank": ("lora", "gguf", "ollama"),
    "--allow-lossy": ("lora", "gguf", "ollama"),
    "--no-pad": ("lora", "gguf", "ollama"),
    "--pad-to": ("lora",),
    "--diffusers": ("lora",),
    "--merged": ("gguf", "ollama"),
    "--dtype": ("gguf", "ollama"),
    "--ollama-base": ("ollama",),
}
# Of an adapter alone: a merged model has no rank.
NOT_MERGED = ("--max-rank", "--allow-lossy", "--no-pad")


def export(
    adapter: Annotated[Path, typer.Argument(help="Folder of a saved spectral adapter, or of its run.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write; new or empty, or with --overwrite.")],
    to: Annotated[
        ExportForm,
        typer.Option("--to", help="A LoRA folder, the base merged, a GGUF file for llama.cpp, or a folder for Ollama."),
    ] = ExportForm.lora,
    base: Annotated[
        str | None, typer.Option("--base", help="Base: folder, file or hub name; default: the one the adapter names.")
    ] = None,
    max_rank: Annotated[int | None, typer.Option(help="Cut wider updates to this rank (not merged).")] = None,
    allow_lossy: Annotated[bool, typer.Option("--allow-lossy", help="Let --max-rank lose part of an update.")] = False,
    pad: Annotated[
        bool, typer.Option("--pad/--no-pad", help="Pad layers of smaller rank to the largest, with zeros (not merged).")
    ] = True,
    pad_to: Annotated[int | None, typer.Option(help="Give every layer this larger rank, with zeros (lora).")] = None,
    diffusers: Annotated[
        str | None,
        typer.Option(help="Also write diffusers' names for this part: unet, transformer, text_encoder (lora)."),
    ] = None,
    merged: Annotated[
        bool,
        typer.Option("--merged", help="The whole model, with the adapter merged in (gguf, ollama)."),
    ] = False,
    dtype: Annotated[
        Dtype | None,
        typer.Option(help="Type of a GGUF file's matrices; default: float32 for an adapter, else the base's."),
    ] = None,
    ollama_base: Annotated[
        str | None, typer.Option(help="Name of the same base in Ollama, in place of a GGUF file of it (ollama).")
    ] = None,
    overwrite: Overwrite = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print machine-readable results.")] = False,
) -> None:
    """Write an adapter in a form that other software loads, and print the proof that it is the same update."""
    overwrite = may_replace(output, overwrite)
    given = {"--max-rank": max_rank is not None, "--allow-lossy": allow_lossy, "--no-pad": not pad}
    given |= {"--pad-to": pad_to is not None, "--diffusers": bool(diffusers)}
    given |= {"--merged": merged, "--dtype": dtype is not None, "--ollama-base": ollama_base is not None}
    _refuse_unused([name for name, is_given in given.items() if is_given], to.value, merged)
    from . import exported

    cut: dict[str, Any] = {"max_rank": max_rank, "allow_lossy": allow_lossy, "pad": pad}
    common: dict[str, Any] = {"base_model": base, "overwrite": overwrite}
    done: Any
    show: Any
    if to is ExportForm.merged:
        done, show = exported.merge(adapter, output, base, overwrite), exported.show_merged
    elif to is ExportForm.lora:
        done = exported.write_lora(adapter, output, {**common, **cut, "pad_to": pad_to, "diffusers": diffusers})
        show = exported.show_lora
    else:
        named = {"ollama_base": ollama_base} if to is ExportForm.ollama else {}
        given_dtype = None if dtype is None else dtype.value
        done = exported.write_gguf(adapter, output, to.value, given_dtype, {**common, **cut, **named, "merged": merged})
        show = exported.show_ollama if to is ExportForm.ollama else exported.show_gguf
    if as_json:
        print(json.dumps(exported.as_plain(done), indent=2))
    else:
        show(done)


def _refuse_unused(given: list[str], form: str, merged: bool) -> None:
    for name in given:
        if form not in ONLY_FOR[name]:
            raise OptionError(f"{name}: this works only with --to {' or '.join(ONLY_FOR[name])}. Leave it out.")
        if merged and name in NOT_MERGED:
            raise OptionError(f"{name}: a merged model has no rank. Leave out {name} or --merged.")
