"""`untied`: where two layers share a weight and an adapter changes only one, each layer gets its own."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from ..checkpoint import PEFT_PREFIX, AdapterFolder, Checkpoint
from ..checkpoint.reader import LazyFile
from ..errors import ExportError
from .architecture import Architecture, read_architecture


@dataclass(frozen=True)
class _Shared:
    """A tensor of a file under the name that it would have in another layer."""

    file: LazyFile
    stored: str
    name: str

    @property
    def path(self) -> Path:
        return self.file.path

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {self.name: self.file.shapes[self.stored]}

    @property
    def dtypes(self) -> dict[str, torch.dtype]:
        return {self.name: self.file.dtypes[self.stored]}

    def tensor(self, name: str, device: torch.device | str = "cpu") -> torch.Tensor:
        return self.file.tensor(self.stored, device)


def untied(
    base: Path, checkpoint: Checkpoint, folder: AdapterFolder, architecture: Architecture
) -> tuple[Checkpoint, tuple[str, ...]]:
    """Get the checkpoint as a model without ties would store it, and the layers that shared a weight (if any).

    In a live model the adapter of an embedding does not change a head that shares its weight, so a merged checkpoint
    must store both. `ExportError` where that is not the same model: outside of language models with one embedding and
    one head, classes use `tie_word_embeddings` for more than ties (T5 scales its outputs by it).
    """
    changed = _changed(folder, architecture)
    groups = [group for group in architecture.tied if group & changed and not _still_one(folder, group, architecture)]
    files = dict(checkpoint.files)
    for group in groups:
        if architecture.task_type != "CAUSAL_LM" or len(group) != 2:
            _refuse(base, group, changed)
        at = {architecture.place(name, shape).module: name for name, shape in checkpoint.shapes.items()}
        holders = [at[module] for module in sorted(group) if module in at]
        for module in sorted(group - at.keys() if holders else ()):
            files[f"{module}.weight"] = _Shared(files[holders[0]], holders[0], f"{module}.weight")
    return Checkpoint(checkpoint.path, files), tuple(sorted({module for group in groups for module in group}))


def refuse_still_tied(base: Path, merged: Path, modules: tuple[str, ...]) -> None:
    """Raise `ExportError` if the class of a merged folder ties these layers whatever its config says."""
    for group in read_architecture(merged).tied if modules else ():
        if group & set(modules):
            _refuse(base, group, set(modules))


def _changed(folder: AdapterFolder, architecture: Architecture) -> set[str]:
    """Get the modules whose weight the adapter changes, by the paths of the base's class."""
    weights = {
        layer + ".weight" if middle else name
        for name in folder.names
        for layer, middle, _ in [name.removeprefix(PEFT_PREFIX).partition(".spectune_adapter.")]
    }
    weights = {name.removeprefix(PEFT_PREFIX) for name in weights if name.endswith(".weight")}
    return {architecture.place(name, (1, 1)).module for name in weights}


def _still_one(folder: AdapterFolder, group: frozenset[str], architecture: Architecture) -> bool:
    """Ask whether an adapter's file has these layers only as PEFT saves resized embeddings: one weight, twice."""
    saved = folder.config.get("modules_to_save") or []
    ends = tuple(f".{name}" for name in saved) if isinstance(saved, list) else ()
    if any(f".{module}".endswith(ends) for module in group):
        return False
    first: torch.Tensor | None = None
    for key in folder.names:
        name = key.removeprefix(PEFT_PREFIX)
        if (
            architecture.place(
                name.partition(".spectune_adapter.")[0].removesuffix(".weight") + ".weight", (1, 1)
            ).module
            in group
        ):
            if ".spectune_adapter." in name or ".base_layer." in name:
                return False
            tensor = folder.tensor(key)
            if first is not None and not torch.equal(first, tensor):
                return False
            first = tensor
    return first is not None


def _refuse(base: Path, group: frozenset[str], changed: set[str]) -> None:
    raise ExportError(
        f"{base}: {' and '.join(sorted(group))} share one weight, but the adapter changes only {min(group & changed)}; "
        "a merged checkpoint of this class cannot store both. Use the adapter on its base, or train without that "
        "layer."
    )
