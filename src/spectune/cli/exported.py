"""What `spectune export` does for each form, and what it prints."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..export import GgufExport, LoraExport, Merged, OllamaExport


@contextmanager
def _merging() -> Iterator[Any]:
    """Get what is told of each merged weight, shown as a bar."""
    from .progress import Stages
    from .terminal import Console

    with Stages(Console(stderr=True)) as stages:
        yield stages.lazily("merging")


def write_lora(adapter: Path, output: Path, options: dict[str, Any]) -> LoraExport:
    """Write a LoRA folder."""
    from ..export import export_lora
    from ..training.loop import quiet_libraries

    quiet_libraries()  # the models that the proof compares
    return export_lora(adapter, output, **options)


def merge(adapter: Path, output: Path, base: str | None, overwrite: bool) -> Merged:
    """Write the base checkpoint merged."""
    from ..export import merge_checkpoint

    with _merging() as on_tensor:
        return merge_checkpoint(base, adapter, output, overwrite=overwrite, on_tensor=on_tensor)


def write_gguf(adapter: Path, output: Path, form: str, dtype: str | None, options: dict[str, Any]) -> Any:
    """Write a GGUF file, alone or in a folder for Ollama."""
    import torch

    from ..export import export_gguf, export_ollama

    write: Any = export_ollama if form == "ollama" else export_gguf
    with _merging() as on_tensor:
        kind = None if dtype is None else getattr(torch, dtype)
        return write(adapter, output, dtype=kind, on_tensor=on_tensor, **options)


def as_plain(done: LoraExport | Merged | GgufExport | OllamaExport) -> dict[str, Any]:
    """Get what an export says, as plain numbers and words."""
    from ..export import LoraExport, Merged, OllamaExport

    if isinstance(done, OllamaExport):
        said = {"path": str(done.path), "template": done.template, "stops": list(done.stops)}
        return {**said, "gguf": as_plain(done.gguf)}
    if isinstance(done, Merged):
        return done.to_json()
    if isinstance(done, LoraExport):
        return {
            "path": str(done.path),
            "max_rank": done.max_rank,
            "vllm_max_lora_rank": done.vllm_max_lora_rank,
            "refused": done.refused,
            "lost": done.lost,
            "proof": done.proof.to_json(),
        }
    inner = {"lora": done.lora, "merged": done.merged}
    plain: dict[str, Any] = {name: None if part is None else as_plain(part) for name, part in inner.items()}
    facts = {"architecture": done.architecture, "dtype": done.dtype, "notes": list(done.notes)}
    return {"path": str(done.path), **facts, **plain}


def show_merged(done: Merged) -> None:
    """Print what merging changed."""
    from .terminal import say

    say(f"{len(done.tensors)} weights merged into {done.path}, in float32, rounded once to the base's {done.dtype}")
    _show_change(done)
    if done.architecture:
        say(f"the folder is a {done.architecture}; README.md says how to load it")


def _show_change(done: Merged) -> None:
    from .terminal import say

    say(f"rounding lost at most {done.worst_rounding:.2%} of an update (Frobenius norm)")
    if done.copied:
        say(f"trained in full and copied: {', '.join(done.copied)}")
    if done.left_out:
        more = f" and {len(done.left_out) - 1} more" if len(done.left_out) > 1 else ""
        say(f"left out, because this class has no place for it: {done.left_out[0]}{more}")
    if done.generation:
        say(done.generation)
    if done.untied:
        say(f"no longer tied: {', '.join(done.untied)}")


def show_ollama(done: OllamaExport) -> None:
    """Print what was written for Ollama."""
    from .terminal import say

    show_gguf(done.gguf, use=False)
    say(f"TEMPLATE: {done.template}; stops at: {', '.join(done.stops) or 'nothing'}")
    say(f"cd {done.path} && ollama create NAME -f Modelfile")


def show_gguf(done: GgufExport, use: bool = True) -> None:
    """Print what was written for llama.cpp."""
    from .terminal import say

    if done.merged is not None:
        say(f"{len(done.merged.tensors)} weights merged in float32, rounded once to {done.dtype}")
        _show_change(done.merged)
    if done.lora is not None:
        _show_proof(done.lora)
    for note in done.notes:
        say(f"note: {note}")
    say(f"GGUF file of a {done.architecture} model in {done.dtype}: {done.path}")
    if use:
        say(f"llama-cli -m {done.path}" if done.merged else f"llama-cli -m BASE.gguf --lora {done.path}")


def show_lora(done: LoraExport) -> None:
    """Print the proof, and what servers make of the folder."""
    from .terminal import Console

    _show_proof(done)
    console = Console()
    console.print(_readers(done), soft_wrap=True)
    console.print(f"LoRA written to {done.path}", soft_wrap=True)


def _show_proof(done: LoraExport) -> None:
    from .layer_table import print_by_kind
    from .terminal import Console

    console = Console()
    columns = {"rank": "{:g}".format, "max |dW error|": "{:.1e}".format, "relative": "{:.1e}".format}
    rows = [(name, figures) for name, *figures in done.proof.table()]
    print_by_kind(console, "the LoRA against the spectral adapter", columns, rows)
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


def _readers(done: LoraExport) -> str:
    """Get one line on what servers make of the folder."""
    refusals = [f"{reader} ({why})" for reader, why in done.refused.items()]
    line = f"would be refused or misread by: {'; '.join(refusals)}" if refusals else "vLLM, SGLang, llama.cpp: fits"
    served = done.vllm_max_lora_rank
    return f"{line}. vLLM needs --max-lora-rank {served}" if served and "vLLM" not in done.refused else line
