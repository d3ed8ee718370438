"""The matrices of a stacked parameter (experts), each as a tensor of its own, and back; how a class stores a matrix."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from .model_class import class_named, without_memory
from .reader import Checkpoint

# Classes of transformers that store their experts in x out without saying so (`is_transposed`).
IN_X_OUT = ("Llama4TextExperts",)
Read = Callable[[], torch.Tensor]


@dataclass(frozen=True, eq=False)
class Stack:
    """A parameter of three axes, or of two: a stack of one. Its matrices are read together."""

    stored: str
    base: Checkpoint = field(repr=False)
    kept: dict[str, torch.Tensor] = field(repr=False)
    """The parameter that was read last, of all stacks of a checkpoint."""

    def __len__(self) -> int:
        shape = self.base.shapes[self.stored]
        return shape[0] if len(shape) == 3 else 1

    def whole(self) -> torch.Tensor:
        """Get the parameter as it is stored."""
        if self.stored not in self.kept:
            self.kept.clear()
            self.kept[self.stored] = self.base.tensor(self.stored)
        return self.kept[self.stored]

    def joined(self, changed: Mapping[int, Read]) -> torch.Tensor:
        """Get the parameter with some of its matrices replaced."""
        whole = self.base.tensor(self.stored).clone()
        for place, read in changed.items():
            (whole[place] if whole.ndim == 3 else whole).copy_(read())
        return whole


@dataclass(frozen=True, eq=False)
class Slice:
    """One matrix of a stack, as a tensor under the name of its layer."""

    stack: Stack
    place: int
    name: str

    @property
    def path(self) -> Path:
        return self.stack.base.files[self.stack.stored].path

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {self.name: self.stack.base.shapes[self.stack.stored][-2:]}

    @property
    def dtypes(self) -> dict[str, torch.dtype]:
        return {self.name: self.stack.base.dtypes[self.stack.stored]}

    def tensor(self, name: str, device: torch.device | str = "cpu") -> torch.Tensor:
        whole = self.stack.whole()
        return (whole[self.place] if whole.ndim == 3 else whole).to(device)


def with_slices(base: Checkpoint, parameters: Mapping[str, set[int]]) -> Checkpoint:
    """Get the checkpoint with these matrices (name of the tensor -> places) as `<tensor>.<place>.weight` beside it."""
    files = dict(base.files)
    kept: dict[str, torch.Tensor] = {}
    for stored, places in parameters.items():
        stack = Stack(stored, base, kept)
        for place in places:
            if len(base.shapes[stored]) in (2, 3) and place < len(stack):
                name = f"{stored}.{place}.weight"
                files[name] = Slice(stack, place, name)
    return Checkpoint(base.path, files)


def join_slices(base: Checkpoint, changed: Mapping[str, Read]) -> dict[str, Read]:
    """Get the changed tensors with those of a stack joined: each parameter is read again when it is written."""
    found: dict[str, Read] = {}
    stacks: dict[Stack, dict[int, Read]] = {}
    for name, read in changed.items():
        file: Any = base.files.get(name)
        if isinstance(file, Slice):
            stacks.setdefault(file.stack, {})[file.place] = read
        else:
            found[name] = read
    return found | {stack.stored: _joining(stack, slices) for stack, slices in stacks.items()}


def _joining(stack: Stack, slices: dict[int, Read]) -> Read:
    return lambda: stack.joined(slices)


def stored_in_x_out(owner: Any) -> bool:
    """Ask whether a module stores the matrices of its parameters in x out: transformers says so of its experts.

    The singular directions are the same either way; what differs is which of the two factors is called left.
    """
    named = any(kind.__name__ in IN_X_OUT for kind in type(owner).__mro__)
    return bool(getattr(owner, "is_transposed", named))


class StoredLayouts:
    """Which layers of a base store their matrix in x out, by its class, which is built when it is first asked for."""

    def __init__(self, base: Checkpoint) -> None:
        self._folder = base.path if base.path.is_dir() else base.path.parent
        self._modules: dict[str, Any] | None = None

    def in_x_out(self, layer: str) -> bool:
        """Ask for one layer; a layer of a base without a class in transformers is taken as out x in."""
        from torch import nn
        from transformers.pytorch_utils import Conv1D

        module = self._module(layer)
        if module is not None:
            return isinstance(module, (Conv1D, nn.Embedding))
        path, _, attribute = layer.rpartition(".")[0].rpartition(".")  # <module>.<parameter>.<place>
        owner = self._module(path)
        parameter = getattr(owner, attribute, None)
        return isinstance(parameter, torch.Tensor) and parameter.ndim == 3 and stored_in_x_out(owner)

    def _module(self, path: str) -> Any:
        if self._modules is None:
            kind = class_named(self._folder)
            self._modules = {} if kind is None else dict(without_memory(kind, self._folder).named_modules())
        parts = path.split(".")
        places = [".".join(parts[start:]) for start in range(len(parts))]
        found = next((self._modules[place] for place in places if place in self._modules), None)
        ending = [known for known in self._modules if known.endswith(f".{path}")] if found is None else []
        return self._modules[ending[0]] if len(ending) == 1 else found
