"""`merge_checkpoint`: an adapter merged into a whole checkpoint, shard by shard, in float32, rounded once."""

from __future__ import annotations

import json
import re
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
    PEFT_PREFIX,
    AdapterFolder,
    Checkpoint,
    find_base,
    fresh_folder,
    open_checkpoint,
    read_adapter_folder,
    refuse_to_replace,
    save_tensors,
    write_atomically,
)
from ..checkpoint.reader import STEMS, read_json
from ..checkpoint.tensor_file import HEADER_LIMIT
from ..errors import AdapterError, ExportError
from .tied import untied, write_untied_config

# Weights in a form that is not merged would be the old ones: they and their indexes stay behind.
UNMERGED = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".index.json")
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
    untied: tuple[str, ...] = ()
    """Layers that shared a weight in the base and now have their own, because the adapter changed only one of them."""

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
) -> Merged:
    """Write a base checkpoint with an adapter merged in: W' = W + dW in float32, rounded once to the base's dtype.

    `base` is a folder of safetensors (single or sharded), a file or a hub name; None takes what the adapter names.
    Files, index and everything else in the folder keep their names. Where the adapter changes one of two layers that
    share a weight, both are written and the config ties them no more. In memory at once: one output shard and one
    decomposed weight. The folder appears only when complete.

    `ExportError` for a quantised base (merging would round the update away) and for shared weights that the model's
    class cannot separate, `AdapterError` for another base and for NaN, `OutputError` for an output that would
    replace the base or the adapter.
    """
    folder = read_adapter_folder(adapter_dir).require("SPECTUNE")
    found = find_base(base, folder)
    base, checkpoint = found.path, found.checkpoint
    refuse_to_replace(output_dir, base, folder.path, *{file.path for file in checkpoint.files.values()})
    _refuse_quantised(base, checkpoint)
    folder.refuse_surplus(len(checkpoint.files), base)
    checkpoint, apart = untied(base, checkpoint, folder)
    with fresh_folder(output_dir, overwrite=overwrite) as partial:
        report, merged = [], partial / ".merged"
        merged.mkdir()
        layers, front = saved_layers(folder), ""
        for place, (layer, name, transposed, module) in enumerate(saved_modules(folder, checkpoint)):
            weight, own = checkpoint.tensor(name), f"{layer}.weight"
            front = name.removesuffix(own) if name.endswith(own) else front
            update = dense(module.delta())
            update = (update.T if transposed else update).reshape(weight.shape)
            exact = weight.to(update.dtype) + update
            stored = exact.to(weight.dtype)
            _refuse_infinite(name, stored)
            report.append(_measure(name, weight, update, stored, exact))
            save_tensors(merged / f"{place}.safetensors", {name: stored})
            if on_tensor is not None:
                on_tensor(place + 1, len(layers), name)
        places = {tensor.name: merged / f"{place}.safetensors" for place, tensor in enumerate(report)}
        trained = _trained_in_full(folder, checkpoint, front)
        _write_shards(checkpoint, folder, places, trained, partial)
        shutil.rmtree(merged)
        if apart:
            write_untied_config(base, partial, apart)
        _copy_the_rest(base, partial)
    copied = {name.rpartition(".")[0] for name in trained}
    return Merged(Path(output_dir), tuple(report), tuple(sorted(copied)), apart)


def saved_layers(folder: AdapterFolder) -> set[str]:
    """Get the names of the adapted layers of a saved adapter."""
    return {name.split(".spectune_adapter.")[0] for name in folder.names if ".spectune_adapter." in name}


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
    found = read_json(config, CONFIG_LIMIT).get("quantization_config") if config.exists() else None
    if found:
        kind = found.get("quant_method", "unknown") if isinstance(found, dict) else found
        raise ExportError(
            f"{base}: the base is quantised ({kind}); merging would round the update away. Merge into the unquantised "
            f"checkpoint and quantise the result, or export to LoRA."
        )


def _trained_in_full(folder: AdapterFolder, checkpoint: Checkpoint, front: str) -> dict[str, str]:
    """Get name in the base -> key in the adapter's file, for what was trained in full.

    The base may lack the first parts of a name (`bert`), then the longest match counts, or have more of them
    (`front`, as in the adapted layers). A name that the base does not have is new.
    """
    found = {}
    for key in folder.names:
        if ".spectune_adapter." not in key:
            # PEFT saves the trained bias of an adapted layer under the wrapped layer's name.
            name = key.removeprefix(PEFT_PREFIX).replace(".base_layer.", ".")
            starts = (0, *(dot.end() for dot in re.finditer(r"\.", name)))
            shorter = [known for start in starts if (known := name[start:]) in checkpoint.files]
            longer = [known for known in (front + name,) if known in checkpoint.files]
            found[max(shorter or longer or [name], key=len)] = key
    return found


def _write_shards(
    checkpoint: Checkpoint, folder: AdapterFolder, places: dict[str, Path], trained: dict[str, str], target: Path
) -> None:
    """Write every file of the base again with the merged tensors in it, and an index over all of them."""
    files = sorted({file.path for file in checkpoint.files.values()})
    shards: dict[str, str] = {}
    size = count = 0
    for path in files:
        names = [name for name, file in checkpoint.files.items() if file.path == path]
        if path == files[-1]:
            names += trained.keys() - checkpoint.files.keys()
        tensors = {name: _tensor(name, checkpoint, folder, places, trained) for name in names}
        goal = path.relative_to(checkpoint.path) if checkpoint.path.is_dir() else Path(path.name)
        (target / goal).parent.mkdir(parents=True, exist_ok=True)  # shards in folders of their own may bear equal names
        save_tensors(target / goal, tensors)
        shards |= dict.fromkeys(tensors, goal.as_posix())
        size += sum(tensor.nbytes for tensor in tensors.values())
        count += sum(tensor.numel() for tensor in tensors.values())
    if (index := _index(checkpoint.path)) is not None:
        told = read_json(index, HEADER_LIMIT).get("metadata")
        sums = {"total_size": size, "total_parameters": count}  # the second is told by newer transformers only
        told = told if isinstance(told, dict) else {}
        told = told | {key: value for key, value in sums.items() if key in told or key == "total_size"}
        content = json.dumps({"metadata": told, "weight_map": shards}, indent=2, sort_keys=True) + "\n"
        write_atomically(target / index.name, content)


def _index(base: Path) -> Path | None:
    """Get the index file of the base, or None if it is a single file."""
    for stem in STEMS if base.is_dir() else ():
        if (base / f"{stem}.safetensors").exists():
            return None
        if (base / f"{stem}.safetensors.index.json").exists():
            return base / f"{stem}.safetensors.index.json"
    return None


def _tensor(
    name: str, checkpoint: Checkpoint, folder: AdapterFolder, places: dict[str, Path], trained: dict[str, str]
) -> torch.Tensor:
    if name in places:
        return open_checkpoint(places[name]).tensor(name)
    if name not in trained:
        return checkpoint.tensor(name)
    tensor = folder.tensor(trained[name])
    if not torch.isfinite(tensor.float()).all():
        raise AdapterError(
            f"{folder.path}: the tensor {trained[name]!r} contains NaN or infinity. Train or copy the adapter again."
        )
    stored = tensor.to(checkpoint.dtypes[name]) if name in checkpoint.files else tensor
    _refuse_infinite(name, stored)
    return stored


def _refuse_infinite(name: str, stored: torch.Tensor) -> None:
    """Raise `ExportError` if rounding to the base's dtype turned a number into infinity."""
    if not torch.isfinite(stored.float()).all():
        dtype = str(stored.dtype).removeprefix("torch.")
        raise ExportError(f"{name}: the merged weight is too large for the base's {dtype}. Merge into a float32 copy.")


def _copy_the_rest(base: Path, target: Path) -> None:
    """Copy configs and tokenizer."""
    for path in sorted(base.iterdir()) if base.is_dir() else ():
        if path.is_file() and not (target / path.name).exists() and not path.name.endswith(UNMERGED):
            shutil.copyfile(path, target / path.name)
