"""`target_parameters`: which parameters a config names, and which of them can be adapted."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ..adapter.saved import LayerRanks
from ..checkpoint.patterns import INSIDE, Clock, Expression
from ..checkpoint.stacks import stored_in_x_out
from ..errors import OptionError, WeightError, nearest
from ..records import Weight
from .base_weight import LAYOUTS, Layout
from .bases import plain_weight, refuse_offloaded
from .config import SpectralConfig
from .cut_weights import outline
from .experts import SpectralExpert, SpectralParameters, as_stack
from .from_file import LayerIndices, LayerNames


@dataclass(frozen=True)
class StoredStack:
    """One parameter to adapt: its path, the path of the module that has it, and its name there."""

    path: str
    module: str
    attribute: str
    excluded: frozenset[int] = frozenset()
    """Places of matrices that `exclude_modules` names (`experts.down_proj.3`)."""

    def owner(self, model: nn.Module) -> nn.Module:
        """Get the module of the base model that has the parameter."""
        module: Any = model.get_submodule(self.module)
        return module.base_layer if isinstance(module, SpectralParameters) else module

    def weights(self, model: nn.Module) -> Iterator[Weight]:
        """Get each matrix of the parameter as a weight of its own, also while adapters are merged."""
        module, owner = model.get_submodule(self.module), self.owner(model)
        stacks = dict(module.stacks()) if isinstance(module, SpectralParameters) else {}
        refuse_offloaded(owner, self.path, model)
        if self.attribute in stacks:
            stored = stacks[self.attribute].pretrained
        else:
            stored = as_stack(plain_weight(owner, self.attribute, self.path))
        parameter: torch.Tensor = getattr(owner, self.attribute)
        layout = Layout("expert", parameter.ndim == 3 and stored_in_x_out(owner), self.attribute)
        for place, matrix in enumerate(stored):
            if place not in self.excluded:
                yield Weight(f"{self.path}.{place}", layout.to_matrix(matrix))

    def experts(self, model: nn.Module, adapter_name: str) -> Iterator[SpectralExpert]:
        """Get the matrices as layers to adapt; the module that has them is wrapped if this is its first adapter."""
        wrapped: Any = model.get_submodule(self.module)
        if not isinstance(wrapped, SpectralParameters):
            wrapped = SpectralParameters(wrapped)
            parent, _, name = self.module.rpartition(".")
            setattr(model.get_submodule(parent), name, wrapped)
        for place, expert in enumerate(wrapped.stack(self.attribute, self.path, adapter_name).experts):
            if place not in self.excluded:
                yield expert


def chosen_parameters(config: SpectralConfig, model: nn.Module) -> list[StoredStack]:
    """Get the parameters that `target_parameters` names, by the end of their path, and that nothing leaves out.

    exclude_modules, modules_to_save and layers_to_transform leave out a parameter by its own path or its module's.
    """
    wanted, clock = sorted(set(config.target_parameters or ())), Clock()
    if not wanted:
        return []
    excluded, counted = LayerNames(config.exclude_modules, clock), LayerIndices(config, clock)
    saved = [Expression(name, INSIDE, clock) for name in config.modules_to_save or ()]
    found, named = [], set()
    for target in _parameters(model):
        words = [word for word in wanted if target.path == word or target.path.endswith("." + word)]
        named |= set(words)
        paths = (target.path, target.module)
        left_out = any(excluded.hold(path) or any(name.match(path) for name in saved) for path in paths)
        if words and not left_out and counted.holds(target.path):
            size = len(as_stack(getattr(target.owner(model), target.attribute))) if config.exclude_modules else 0
            places = frozenset(place for place in range(size) if excluded.hold(f"{target.path}.{place}"))
            found.append(replace(target, excluded=places))
    for word in wanted:
        if word not in named:
            near = sorted({".".join(target.path.split(".")[-2:]) for target in _parameters(model)})
            raise OptionError(
                f"target_parameters: no parameter of {type(model).__name__} is called {word!r}. {nearest(word, near)}"
            )
    for target in found:
        _refuse_unfit(target, model)
    return found


def _parameters(model: nn.Module) -> Iterator[StoredStack]:
    """Get every parameter of the base model; what stands inside of adapters is none."""
    for path, module in model.named_modules():
        if ".spectune_" not in path:
            place = path.replace(".base_layer", "")
            for name, _ in module.named_parameters(recurse=False):
                yield StoredStack(f"{place}.{name}" if place else name, place, name)


def _refuse_unfit(target: StoredStack, model: nn.Module) -> None:
    owner = target.owner(model)
    innermost: Any = owner.get_base_layer() if isinstance(owner, BaseTunerLayer) else owner
    parameter: Any = getattr(innermost, target.attribute)
    for kind, layout in LAYOUTS.items():
        if isinstance(innermost, kind) and target.attribute == layout.attribute:
            raise OptionError(
                f"target_parameters: {target.path} is the weight of a {kind.__name__}, which is adapted as a layer. "
                f"Name {target.module.rpartition('.')[2]!r} in target_modules instead."
            )
    if not target.module or isinstance(owner, BaseTunerLayer):
        where = f"a layer that {type(owner).__name__} has adapted" if target.module else "the model itself"
        raise WeightError(f"{target.path}: a parameter of {where} cannot be adapted. Take it out of target_parameters.")
    plain_weight(innermost, target.attribute, target.path)
    if type(parameter) is not nn.Parameter or not parameter.is_floating_point() or parameter.dtype.itemsize < 2:
        raise WeightError(
            f"{target.path}: a stack of quantised weights ({type(parameter).__name__}, "
            f"{str(parameter.dtype).removeprefix('torch.')}) cannot be adapted. Load the base in half precision."
        )
    if parameter.ndim not in (2, 3):
        raise WeightError(
            f"{target.path}: a parameter with {parameter.ndim} axes is not a matrix or a stack of matrices. Take it "
            f"out of target_parameters."
        )


@contextmanager
def ranks_of_modules(config: SpectralConfig, targets: list[StoredStack]) -> Iterator[None]:
    """Keep from PEFT, which knows ranks of modules only, the names in rank_pattern that stand for parameters."""
    whole, named = config.rank_pattern, LayerRanks(config.rank_pattern)
    ours = {named.pattern_of(target.path) for target in targets}
    config.rank_pattern = {name: r for name, r in whole.items() if name not in ours}
    try:
        yield
    finally:
        config.rank_pattern = whole


def say_what_all_linear_leaves_out(config: SpectralConfig, model: nn.Module) -> None:
    """Warn where target_modules='all-linear' passes by experts that are stored in one parameter."""
    if not isinstance(config.target_modules, str) or config.target_modules.lower() != "all-linear":
        return
    names = {
        ".".join(target.path.split(".")[-2:])
        for target in _parameters(model)
        if "expert" in f"{target.path} {type(target.owner(model)).__name__}".lower()
        and outline(getattr(target.owner(model), target.attribute)).ndim == 3
    }
    if names and not config.target_parameters:
        warnings.warn(
            f"target_modules='all-linear' leaves out the experts, which are parameters and not linear layers. To tune "
            f"them too, set target_parameters={sorted(names)}.",
            stacklevel=2,
        )
