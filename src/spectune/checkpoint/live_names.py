"""`live_view`: a checkpoint under the names that its tensors have in the live model.

transformers renames tensors when it loads them (a ViT's `attention.attention.query` is `attention.q_proj`), splits
some and joins others (a Mixtral's experts). Its own rules say how, there and back; none of them stands here.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from .reader import Checkpoint, LazyFile

# Tensor name -> the tensor.
NamedTensors = dict[str, torch.Tensor]


@dataclass(frozen=True, eq=False)
class Group:
    """Stored tensors that become live ones together: one and one for a mere renaming."""

    stored: tuple[str, ...]
    renamed: tuple[str, ...] = ()
    """The stored tensors after all renaming, as the converter knows them."""
    patterns: tuple[str, ...] = ()
    converter: Any = None
    """transformers' WeightConverter; None where only the name differs."""
    model: Any = field(default=None, repr=False)
    first: str = ""
    """The first of the live names."""

    def to_live(self, tensors: Mapping[str, torch.Tensor]) -> NamedTensors:
        """Get the live tensors from the stored ones."""
        if self.converter is None:
            return {self.first: tensors[self.stored[0]]}
        pairs = zip(self.renamed, self.patterns, (tensors[name] for name in self.stored), strict=True)
        return _converted(copy.deepcopy(self.converter), self.first, pairs, self.model)

    def to_stored(self, tensors: Mapping[str, torch.Tensor]) -> NamedTensors:
        """Get the stored tensors from all the live ones."""
        if self.converter is None:
            return {self.stored[0]: tensors[self.first]}
        back = self.converter.reverse_transform()
        named = [(name, *back.rename_source_key(name)) for name in _in_order(tensors)]
        first = named[0][1]
        found = _converted(back, first, [(name, pattern, tensors[name]) for name, _, pattern in named], self.model)
        original = dict(zip(self.renamed, self.stored, strict=True))
        return {original[name]: tensor.contiguous() for name, tensor in found.items()}


def _converted(converter: Any, first: str, tensors: Any, model: Any) -> NamedTensors:
    for name, pattern, tensor in tensors:
        converter.add_tensor(first, name, pattern, tensor)
    found = converter.convert(first, model=model, config=model.config)
    return {name: value[0] if isinstance(value, list) else value for name, value in found.items()}


@dataclass(frozen=True)
class _LiveTensor:
    """One tensor of the live model, read from the stored ones when it is asked for."""

    name: str
    group: Group
    base: Checkpoint = field(repr=False)
    shape: tuple[int, ...]

    @property
    def path(self) -> Path:
        return self.base.files[self.group.stored[0]].path

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {self.name: self.shape}

    @property
    def dtypes(self) -> dict[str, torch.dtype]:
        stored = self.group.stored[0]
        return {self.name: self.base.files[stored].dtypes[stored]}

    def tensor(self, name: str, device: torch.device | str = "cpu") -> torch.Tensor:
        stored = {name: self.base.tensor(name, device) for name in self.group.stored}
        return self.group.to_live(stored)[self.name]


@dataclass(frozen=True, eq=False)
class LiveView:
    """A checkpoint by live names, and the stored tensors behind them."""

    checkpoint: Checkpoint
    groups: dict[str, Group] = field(repr=False)
    """Live name -> the stored tensors that it comes from."""

    def stored(self, changed: set[str]) -> Iterator[tuple[Group, set[str]]]:
        """Get each group of stored tensors that these live ones change, with all live tensors of the group."""
        seen = {id(self.groups[name]): self.groups[name] for name in sorted(changed) if name in self.groups}
        names: dict[int, set[str]] = {}
        for name, group in self.groups.items():
            names.setdefault(id(group), set()).add(name)
        for key, group in seen.items():
            yield group, names[key]


def live_view(base: Checkpoint, model: Any) -> LiveView:
    """Get a checkpoint under the names of a model of its class (on the meta device is enough).

    A tensor that the class does not have, or that its rules fail on, keeps its name.
    """
    groups: dict[str, Group] = {}
    files: dict[str, LazyFile] = {}
    for group in _groups(base, model):
        for name, (owner, shape) in _live_shapes(group, base).items():
            groups[name], files[name] = owner, _LiveTensor(name, owner, base, shape)
    return LiveView(Checkpoint(base.path, files), groups)


def _groups(base: Checkpoint, model: Any) -> Iterator[Group]:
    from transformers.conversion_mapping import get_model_conversion_mapping

    known, rules = set(model.state_dict()), get_model_conversion_mapping(model) or []
    joined: dict[str, tuple[Any, list[tuple[str, str, str]]]] = {}
    for stored in _in_order(base.files):
        name, renamed, pattern, converter = _renamed(stored, rules, known, model.base_model_prefix)
        if converter is None:
            yield Group((stored,), first=name)
        else:
            joined.setdefault(name, (converter, []))[1].append((stored, renamed, pattern))
    for name, (converter, parts) in joined.items():
        names, renamed_names, patterns = (tuple(part) for part in zip(*parts, strict=True))
        yield Group(names, renamed_names, patterns, converter, model, name)


def _renamed(stored: str, rules: Any, known: set[str], prefix: str) -> tuple[str, str, str, Any]:
    """Get (first live name, name before the converter, its pattern, converter or None), as transformers finds them."""
    name = stored
    for rule in rules:
        if not hasattr(rule, "operations"):
            name, _ = rule.rename_source_key(name)
    renamed, pattern, converter = name, "", None
    for rule in rules:
        if hasattr(rule, "operations"):
            name, found = rule.rename_source_key(renamed)
            if found is not None:
                pattern, converter = found, rule
                break
    if (live := _with_body(name, known, prefix)) is not None:
        return live, renamed, pattern, converter
    return _with_body(stored, known, prefix) or stored, stored, "", None  # a file that already has the live names


def _with_body(name: str, known: set[str], prefix: str) -> str | None:
    """Get the name as the class has it: the body's name (`bert`) is taken away or added where that makes it known."""
    places = (*([name.removeprefix(f"{prefix}.")] if name.startswith(f"{prefix}.") else []), f"{prefix}.{name}", name)
    return next((place for place in places if place in known), None)


def _live_shapes(group: Group, base: Checkpoint) -> dict[str, tuple[Group, tuple[int, ...]]]:
    """Get live name -> its group and shape; where the rules fail, each stored tensor by itself."""
    shapes = {name: base.files[name].shapes[name] for name in group.stored}
    if group.converter is None:
        return {group.first: (group, shapes[group.stored[0]])}
    empty = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    try:
        return {name: (group, tuple(tensor.shape)) for name, tensor in group.to_live(empty).items()}
    except Exception:  # foreign rules on a foreign file: what they cannot join cannot be adapted either
        return {name: (Group((name,), first=name), shape) for name, shape in shapes.items()}


def _in_order(names: Iterable[str]) -> list[str]:
    """Get names in the order in which transformers takes them: experts are stacked by their numbers."""
    from transformers.core_model_loading import dot_natural_key

    return sorted(names, key=dot_natural_key)
