"""`merge_checkpoint`: an adapter merged into a whole checkpoint, shard by shard, in float32, rounded once."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ..algebra import dense
from ..checkpoint import AdapterFolder, Checkpoint, fresh_folder, open_checkpoint, read_adapter_folder, save_tensors
from ..checkpoint.reader import read_json
from ..errors import ExportError
from ..methods.saved import PEFT_PREFIX, saved_modules

CONFIG_LIMIT = 2**20
OnTensor = Callable[[int, int, str], None]
"""Called with (merged so far, all, name of the tensor)."""


@dataclass(frozen=True)
class MergedTensor:
    """How one weight came out of the merge."""

    name: str
    change: float
    """|dW|_F, as a fraction of |W|_F."""
    rounding: float
    """|stored - (W + dW)|_F, as a fraction of |dW|_F: what the checkpoint's dtype lost of the update."""


@dataclass(frozen=True)
class Merged:
    """A merged checkpoint: where it stands and what rounding cost."""

    path: Path
    tensors: tuple[MergedTensor, ...]
    copied: tuple[str, ...]
    """Modules that were trained in full and replace the base's."""

    @property
    def worst_rounding(self) -> float:
        """The largest share of an update that rounding took."""
        return max(tensor.rounding for tensor in self.tensors)

    def to_json(self) -> dict[str, Any]:
        """Get everything in plain numbers and words."""
        return {"path": str(self.path), "tensors": [asdict(t) for t in self.tensors], "copied": list(self.copied)}


@torch.no_grad()
def merge_checkpoint(
    base: str | Path,
    adapter_dir: str | Path,
    output_dir: str | Path,
    *,
    overwrite: bool = False,
    on_tensor: OnTensor | None = None,
) -> Merged:
    """Write a base checkpoint with an adapter merged in: W' = W + dW in float32, rounded once to the base's dtype.

    `base` is a folder of safetensors, single or sharded; files, index and everything else in the folder keep their
    names. In memory at once: one output shard and one decomposed weight. The folder appears only when complete.

    `ExportError` for a quantised base (merging would round the update away), `AdapterError` for another base.
    """
    base, checkpoint = Path(base), open_checkpoint(base)
    folder = read_adapter_folder(adapter_dir).require("SPECTUNE")
    _refuse_quantised(base)
    with fresh_folder(output_dir, overwrite=overwrite) as partial:
        report, merged = [], partial / ".merged"
        merged.mkdir()
        layers = [*saved_layers(folder)]
        for place, (_, name, transposed, module) in enumerate(saved_modules(folder, checkpoint)):
            weight = checkpoint.tensor(name)
            update = dense(module.delta())
            update = (update.T if transposed else update).reshape(weight.shape)
            exact = weight.to(update.dtype) + update
            stored = exact.to(weight.dtype)
            report.append(_measure(name, weight, update, stored, exact))
            save_tensors(merged / f"{place}.safetensors", {name: stored})
            if on_tensor is not None:
                on_tensor(place + 1, len(layers), name)
        places = {tensor.name: merged / f"{place}.safetensors" for place, tensor in enumerate(report)}
        copied = _write_shards(checkpoint, folder, places, partial)
        shutil.rmtree(merged)
        _copy_the_rest(base, partial)
    return Merged(Path(output_dir), tuple(report), copied)


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


def _refuse_quantised(base: Path) -> None:
    config = base / "config.json"
    found = read_json(config, CONFIG_LIMIT).get("quantization_config") if config.exists() else None
    if found:
        kind = found.get("quant_method", "unknown") if isinstance(found, dict) else found
        raise ExportError(
            f"{base}: the base is quantised ({kind}); merging would round the update away. Merge into the unquantised "
            f"checkpoint and quantise the result, or export to LoRA."
        )


def _write_shards(
    checkpoint: Checkpoint, folder: AdapterFolder, places: dict[str, Path], target: Path
) -> tuple[str, ...]:
    """Write every file of the base again with the merged tensors in it; get the modules that were copied whole."""
    # PEFT saves the trained bias of an adapted layer under the wrapped layer's name.
    trained = {
        name.removeprefix(PEFT_PREFIX).replace(".base_layer.", "."): name
        for name in folder.names
        if ".spectune_adapter." not in name
    }
    at_base = {}
    for name, key in trained.items():
        layer, _, kind = name.rpartition(".")
        there = [n for n in checkpoint.names if n == name or name.endswith("." + n)]
        at_base[there[0] if there else f"{layer}.{kind}"] = key
    files = sorted({file.path for file in checkpoint.files.values()})
    for path in files:
        names = [name for name, file in checkpoint.files.items() if file.path == path]
        tensors = {name: _tensor(name, checkpoint, folder, places, at_base) for name in names}
        if path == files[-1]:
            tensors |= {name: folder.tensor(key) for name, key in at_base.items() if name not in checkpoint.files}
        goal = target / (path.relative_to(checkpoint.path) if checkpoint.path.is_dir() else path.name)
        goal.parent.mkdir(parents=True, exist_ok=True)  # shards in folders of their own may bear equal names
        save_tensors(goal, tensors)
    return tuple(sorted({name.rpartition(".")[0] for name in at_base}))


def _tensor(
    name: str, checkpoint: Checkpoint, folder: AdapterFolder, places: dict[str, Path], at_base: dict[str, str]
) -> torch.Tensor:
    if name in places:
        return open_checkpoint(places[name]).tensor(name)
    return folder.tensor(at_base[name]).to(checkpoint.dtypes[name]) if name in at_base else checkpoint.tensor(name)


def _copy_the_rest(base: Path, target: Path) -> None:
    """Copy configs, tokenizer and index; weights of other formats stay behind, they would be the unmerged ones."""
    if not base.is_dir():
        return
    for path in base.iterdir():
        if (
            path.is_file()
            and not (target / path.name).exists()
            and path.suffix not in (".bin", ".pt", ".pth", ".gguf", ".h5")
        ):
            shutil.copyfile(path, target / path.name)
