"""`merge_checkpoint`: an adapter merged into a whole checkpoint, shard by shard, in float32, rounded once."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ..adapter.saved import saved_modules
from ..algebra import dense
from ..checkpoint import (
    CONFIG_LIMIT,
    AdapterFolder,
    Checkpoint,
    find_base,
    fresh_folder,
    read_adapter_folder,
    refuse_to_replace,
    save_tensors,
)
from ..checkpoint.reader import read_json
from ..checkpoint.stacks import join_slices
from ..errors import AdapterError, ExportError
from .card import write_card
from .companions import copy_for_model
from .generation import complete_generation
from .plan import MergePlan, plan_merge, saved_layers
from .shards import Read, reader, stored_changes, write_shards
from .target import write_config
from .tied import refuse_still_tied
from .vocabulary import write_vocabulary

OnTensor = Callable[[int, int, str], None]
"""Called with (merged so far, all, name of the tensor)."""


@dataclass(frozen=True)
class MergedTensor:
    """One merged weight."""

    name: str
    change: float
    """|dW|_F, as a fraction of |W|_F."""
    rounding: float
    """|stored - (W + dW)|_F, as a fraction of |dW|_F: the share of the update that the checkpoint's dtype loses."""


@dataclass(frozen=True)
class Merged:
    """A merged checkpoint: its folder, and what rounding cost."""

    path: Path
    tensors: tuple[MergedTensor, ...]
    copied: tuple[str, ...]
    """Modules that were trained in full and replace the base's."""
    dtype: str = ""
    """What the merged weights are stored in: the base's."""
    architecture: str | None = None
    """The class in transformers that loads the folder; None for a base that is not one of transformers."""
    left_out: tuple[str, ...] = ()
    """Tensors of the base's own head, which the adapter's class does not have."""
    untied: tuple[str, ...] = ()
    """Layers that shared a weight in the base and now have their own, because the adapter changed only one of them."""
    generation: str = ""
    """What was added to generation_config.json; empty where it is the base's."""

    @property
    def worst_rounding(self) -> float:
        """The largest share of an update that rounding lost."""
        return max(tensor.rounding for tensor in self.tensors)

    def to_json(self) -> dict[str, Any]:
        """Get everything in plain numbers and words."""
        return asdict(self) | {"path": str(self.path)}


@torch.no_grad()
def merge_checkpoint(
    base: str | Path | None,
    adapter_dir: str | Path,
    output_dir: str | Path,
    *,
    overwrite: bool = False,
    on_tensor: OnTensor | None = None,
    rounded_later: torch.dtype | None = None,
) -> Merged:
    """Write a base checkpoint with an adapter merged in: W' = W + dW in float32, rounded once to the base's dtype.

    `base` is a folder of safetensors (single or sharded), a file or a hub name; None takes what the adapter names.
    Files, index and tensors keep the base's names, also where transformers renames, splits or joins them on load. A
    trained head makes the folder a model of the adapter's class, with the names of its classes in config.json.
    Tokenizer and processor are the adapter's, else the base's; generation ends at the tokenizer's end token, too. Where
    the adapter changes one of two layers that share a weight, both are written and the config ties them no more. In
    memory at once: one output shard and one decomposed weight. The folder appears only when complete. With
    `rounded_later` the merged weights stay in float32, and the report says what rounding to that dtype will lose.

    `ExportError` for a quantised base (merging would round the update away) and for shared weights that the model's
    class cannot separate, `AdapterError` for another base and for NaN, `OutputError` for an output that would
    replace the base or the adapter.
    """
    folder = read_adapter_folder(adapter_dir).require("SPECTUNE")
    found = find_base(base, folder)
    base, checkpoint = found.model_folder, found.checkpoint
    refuse_to_replace(output_dir, base, folder.path, *{file.path for file in checkpoint.files.values()})
    _refuse_quantised(base, checkpoint)
    folder.refuse_surplus(checkpoint.parts, base)
    plan = plan_merge(base, checkpoint, folder)
    with fresh_folder(output_dir, overwrite=overwrite) as partial:
        scratch = partial / ".merged"
        scratch.mkdir()
        report, merged = _merge(plan, folder, scratch, on_tensor, rounded_later)
        changed = {name: _trained(plan.checkpoint, folder, name, key) for name, key in plan.trained.items()}
        changed |= merged  # PEFT saves an adapted embedding's own weight too, as it was
        write_shards(
            plan.stored, stored_changes(plan.view, join_slices(plan.checkpoint, changed), scratch), plan.names, partial
        )
        shutil.rmtree(scratch)
        if plan.target is not None and (plan.target.options or plan.target.changes_class or plan.apart):
            write_config(base, partial, plan.target, bool(plan.apart))
            refuse_still_tied(base, partial, plan.apart)
        if plan.target is not None and plan.vocabulary is not None:
            write_vocabulary(base, partial, plan.target.model, plan.vocabulary)
        copy_for_model(folder.path, partial, base)
        own_words = (folder.path / "tokenizer_config.json").is_file()
        generates = plan.target is not None and plan.target.model.can_generate()
        done = Merged(
            Path(output_dir),
            report,
            tuple(sorted({name.rpartition(".")[0] for name in plan.trained.keys() - merged.keys()})),
            ", ".join(sorted({_word(rounded_later or plan.checkpoint.dtypes[tensor.name]) for tensor in report})),
            None if plan.target is None else type(plan.target.model).__name__,
            tuple(sorted(name for name, written in plan.names.items() if written is None)),
            plan.apart,
            complete_generation(partial) if own_words and generates else "",
        )
        write_card(partial, done, folder, found.name, base)
    return done


def _merge(
    plan: MergePlan, folder: AdapterFolder, scratch: Path, on_tensor: OnTensor | None, later: torch.dtype | None
) -> tuple[tuple[MergedTensor, ...], dict[str, Read]]:
    """Merge each adapted weight into a file of its own; get the report, and live name -> how to read it."""
    report, changed, count = [], {}, len(saved_layers(folder))
    for place, (_, name, transposed, module) in enumerate(saved_modules(folder, plan.checkpoint)):
        weight = plan.checkpoint.tensor(name)
        update = dense(module.delta())
        update = (update.T if transposed else update).reshape(weight.shape)
        exact = weight.to(update.dtype) + update
        stored = exact.to(later or weight.dtype)
        _refuse_infinite(name, stored)
        report.append(_measure(name, weight, update, stored, exact))
        path = scratch / f"{place}.safetensors"
        save_tensors(path, {name: exact if later else stored})
        changed[name] = reader(path, name)
        if on_tensor is not None:
            on_tensor(place + 1, count, name)
    return tuple(report), changed


def _measure(
    name: str, weight: torch.Tensor, update: torch.Tensor, stored: torch.Tensor, exact: torch.Tensor
) -> MergedTensor:
    tiny = torch.finfo(torch.float32).tiny
    size, whole = (max(float(torch.linalg.vector_norm(t.to(exact.dtype))), tiny) for t in (update, weight))
    lost = float(torch.linalg.vector_norm(stored.to(exact.dtype) - exact))
    return MergedTensor(name, size / whole, lost / size)


def _refuse_quantised(base: Path, checkpoint: Checkpoint) -> None:
    if any(file.path.suffix == ".gguf" for file in checkpoint.files.values()):
        raise ExportError(
            f"{base}: GGUF files can be read but not written. Merge into the safetensors model and convert that."
        )
    config = base / "config.json"
    said = read_json(config, CONFIG_LIMIT) if config.exists() else {}
    found = said.get("quantization_config") or said.get("compression_config")
    if found:
        kind = found.get("quant_method", "unknown") if isinstance(found, dict) else found
        raise ExportError(
            f"{base}: the base is quantised ({kind}); merging would round the update away. Merge into the unquantised "
            f"checkpoint and quantise the result, or export to LoRA."
        )


def _trained(base: Checkpoint, folder: AdapterFolder, name: str, key: str) -> Read:
    """Get a function that reads a tensor that was trained in full, in the dtype that the base has it in."""

    def read() -> torch.Tensor:
        tensor = folder.tensor(key)
        if not torch.isfinite(tensor.float()).all():
            raise AdapterError(
                f"{folder.path}: the tensor {key!r} contains NaN or infinity. Train or copy the adapter again."
            )
        stored = tensor.to(base.dtypes[name]) if name in base.files else tensor
        _refuse_infinite(name, stored)
        return stored

    return read


def _refuse_infinite(name: str, stored: torch.Tensor) -> None:
    """Raise `ExportError` if rounding to the base's dtype turned a number into infinity."""
    if not torch.isfinite(stored.float()).all():
        raise ExportError(
            f"{name}: the merged weight is too large for the base's {_word(stored.dtype)}. Merge into a float32 copy."
        )


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
