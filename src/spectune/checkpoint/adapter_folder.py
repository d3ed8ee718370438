"""`read_adapter_folder`: a saved PEFT adapter, checked; its tensors stay on the disk."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from ..errors import AdapterError
from .basis_file import basis_beside, checked_tensors, no_basis, shared_identity
from .reader import read_json
from .run_folder import adapter_in
from .tensor_file import TensorFile

CONFIG_FILE = "adapter_config.json"
TENSOR_FILE = "adapter_model.safetensors"
# What PEFT puts before the path of every layer.
PEFT_PREFIX = "base_model.model."
# Configs of adapters and models have a few kilobytes. Chosen, not measured.
CONFIG_LIMIT = 2**20
# Tensors of a basis that a file may keep in bfloat16, if that is what they are rounded to.
HALVED = (".U_OR", ".Vh_RI")
# An adapter has ten tensors at most for one part of a model (basis, sketch, pattern, numbers). Chosen above it.
MOST_PER_PART = 32


@dataclass(frozen=True)
class AdapterFolder:
    """A saved adapter: its config, and the names and shapes of its tensors.

    The directions of an adapter that shares a basis file are its tensors too, as if they were in its own file.
    """

    path: Path
    config: dict[str, Any] = field(repr=False)
    file: TensorFile = field(repr=False)

    @property
    def peft_type(self) -> str:
        """Which PEFT method wrote it, in capitals: SPECTUNE, LORA, …"""
        return str(self.config["peft_type"]).upper()

    @property
    def base_name(self) -> str:
        """The base model's name in its config; empty if there is none."""
        name = self.config.get("base_model_name_or_path")
        return name.rstrip("/") or name if isinstance(name, str) else ""

    @property
    def names(self) -> tuple[str, ...]:
        """The names of its tensors, sorted."""
        return tuple(sorted(self.shapes))

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Tensor name -> shape, without reading the tensors."""
        own = self.file.shapes
        if self.basis is None:
            return own
        layers = {name.rpartition(".")[0] for name in own}
        return {n: shape for n, shape in self.basis.shapes.items() if n.rpartition(".")[0] in layers} | own

    def tensor(self, name: str) -> torch.Tensor:
        """Read one tensor; `AdapterError` names similar tensors if this one is missing.

        Directions that are kept in bfloat16 come in float32, in which they are used.
        """
        shared = name not in self.file.shapes and name in self.shapes
        found = self._shared[name] if shared else self.file.tensor(name)
        return found.float() if name.endswith(HALVED) and found.dtype == torch.bfloat16 else found

    @cached_property
    def basis(self) -> TensorFile | None:
        """The basis file that this adapter shares, or None; `AdapterError` if it is not beside the adapter."""
        identity = shared_identity(self.config)
        if identity is None:
            return None
        found = basis_beside(self.path, identity)
        if found is None:
            raise no_basis(self.path, identity)
        return found

    @cached_property
    def _shared(self) -> dict[str, torch.Tensor]:
        identity = shared_identity(self.config)
        assert self.basis is not None and identity is not None
        return checked_tensors(self.basis, identity)

    def refuse_surplus(self, parts: int, base: object) -> None:
        """Raise `AdapterError` for far more tensors than a base with `parts` modules or tensors can have places for.

        Other packages walk through, and print, every tensor that has no place.
        """
        if len(self.file.shapes) > MOST_PER_PART * max(parts, 1):
            raise AdapterError(
                f"{self.path}: its {len(self.file.shapes):,} tensors are too many for the {parts:,} parts of {base}. "
                f"Load the adapter on the base that it was trained on."
            )

    def require(self, *peft_types: str) -> AdapterFolder:
        """Get this folder if it is of one of these kinds; `AdapterError` says which kind it is."""
        if self.peft_type not in peft_types:
            raise AdapterError(
                f"{self.path}: a {' or '.join(peft_types)} adapter is needed, but this is a {self.peft_type} one. "
                f"Pass the folder of the right adapter."
            )
        return self


def adapter_path(path: str | Path) -> Path:
    """Get the folder of an adapter's files: `adapter/` for a run's folder, the parent for PEFT's tensor file.

    Any other path comes back as it is, whether or not it is an adapter.
    """
    path = adapter_in(path)
    beside_config = path.name == TENSOR_FILE and os.path.exists(path.parent / CONFIG_FILE)
    return path.parent if beside_config else path


def read_adapter_folder(path: str | Path) -> AdapterFolder:
    """Get a saved adapter of any PEFT method; its config and the header of its tensors are checked.

    `path` is its folder, or any path that `adapter_path` resolves to it.
    Links are followed (the Hugging Face cache is made of them) but must end at regular files.
    `AdapterError` for files that are missing, damaged, of another kind, or pickled.
    """
    path = adapter_path(path)
    if not os.path.isdir(path):
        why = "this is a file" if os.path.exists(path) else "there is nothing here"
        raise AdapterError(f"{path}: an adapter folder is needed, but {why}. Check the path.")
    if not (path / CONFIG_FILE).exists():
        raise AdapterError(f"{path}: this is not an adapter folder: it has no {CONFIG_FILE}. {_whose_folder(path)}")
    config = read_json(path / CONFIG_FILE, CONFIG_LIMIT)
    if not isinstance(config.get("peft_type"), str):
        raise AdapterError(
            f"{path / CONFIG_FILE}: the config has no peft_type, so its method is unknown. "
            f"Save the adapter with PEFT's save_pretrained."
        )
    if not (path / TENSOR_FILE).exists() and (path / "adapter_model.bin").exists():
        raise AdapterError(
            f"{path}: adapter_model.bin is a pickle, and reading it would run code in it. "
            f"Save the adapter as safetensors instead."
        )
    file = TensorFile.open(path / TENSOR_FILE)
    file.refuse_foreign()
    return AdapterFolder(path, config, file)


def _whose_folder(path: Path) -> str:
    if (path / "config.json").exists():
        return "It is a whole model; pass the adapter's folder."
    inner = sorted(child.parent.name for child in path.glob(f"*/{CONFIG_FILE}"))
    return f"Its subfolders have one: {', '.join(inner[:5])}." if inner else "Check the path."
