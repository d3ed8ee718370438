"""Experts that a model stores in one parameter: each matrix is an adapted layer of its own, the module sees the sum."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ..adapter import SpectralModule, in_own_dtype
from ..algebra import dense_stack
from ..checkpoint.stacks import stored_in_x_out
from ..errors import OptionError
from .base_weight import Layout
from .layer import SpectralLayer
from .mixed_rows import ROWS_DIFFER


class SpectralExpert(nn.Module, SpectralLayer):
    """One matrix of a stack, with its adapters. Its forward is never called: the stack asks it for its update."""

    def __init__(self, stack: SpectralStack, place: int, adapter_name: str) -> None:
        super().__init__()
        # In a list, so that torch does not register the stack as a child of its own child.
        self._home = [stack]
        self._place = place
        self._active_adapter = adapter_name
        self._begin(f"{stack.name}.{place}", stack.layout, None)

    active_adapters: list[str]

    @property
    def stack(self) -> SpectralStack:
        """The stack that this matrix is a part of."""
        return self._home[0]

    def get_base_layer(self) -> nn.Module:  # type: ignore[override]
        return self.stack.owner

    def _original(self) -> torch.Tensor:
        return self.stack.pretrained[self._place]

    def _put(self, merged: torch.Tensor) -> None:
        self.stack.put(self._place, merged)

    def _put_back(self) -> None:
        self.stack.put_back(self._place)

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module) -> tuple[torch.device, torch.dtype]:
        return self._original().device, self._original().dtype


class SpectralStack(nn.ModuleList):
    """The matrices of one parameter, B x O x I or B x I x O (a parameter of two axes is a stack of one)."""

    def __init__(self, owner: nn.Module, attribute: str, name: str, adapter_name: str) -> None:
        super().__init__()
        self._owner = [owner]
        self.name = name
        self._replaced: list[nn.Parameter] = []
        transposed = getattr(owner, attribute).ndim == 3 and stored_in_x_out(owner)
        self.layout = Layout("expert", transposed, attribute)
        self._merged: set[int] = set()
        self.extend(SpectralExpert(self, place, adapter_name) for place in range(len(self.pretrained)))

    @property
    def owner(self) -> nn.Module:
        """The module of the model that has the parameter."""
        return self._owner[0]

    @property
    def experts(self) -> list[SpectralExpert]:
        """The matrices, in order."""
        return cast("list[SpectralExpert]", list(self.children()))

    @property
    def pretrained(self) -> torch.Tensor:
        """The pretrained matrices as they are stored, three axes, also while adapters are merged."""
        present: torch.Tensor = self._replaced[0] if self._replaced else getattr(self.owner, self.layout.attribute)
        return as_stack(present.detach())

    def put(self, place: int, merged: torch.Tensor) -> None:
        """Put a merged matrix in its place; the whole pretrained parameter is kept aside meanwhile."""
        if not self._replaced:
            present: nn.Parameter = getattr(self.owner, self.layout.attribute)
            setattr(self.owner, self.layout.attribute, nn.Parameter(present.detach().clone(), requires_grad=False))
            self._replaced = [present]
        as_stack(getattr(self.owner, self.layout.attribute).data)[place] = merged
        self._merged.add(place)

    def put_back(self, place: int) -> None:
        """Put a pretrained matrix back; with the last one the very parameter of the model is back."""
        (pretrained,), merged = self._replaced, getattr(self.owner, self.layout.attribute)
        as_stack(merged.data)[place] = as_stack(pretrained.data)[place].to(merged.device, merged.dtype)
        self._merged.discard(place)
        if not self._merged:
            pretrained.data = pretrained.data.to(merged.device, merged.dtype)  # the model may have moved since
            setattr(self.owner, self.layout.attribute, pretrained)
            self._replaced = []

    def get_delta_weight(self, adapter_name: str) -> torch.Tensor:
        """Get the updates of one adapter in the layout of the parameter, in the dtype of the basis."""
        held = {place: e for place, e in enumerate(self.experts) if adapter_name in e.spectune_adapter}
        updates = {place: expert.get_delta_weight(adapter_name) for place, expert in held.items()}
        none = torch.zeros_like(next(iter(updates.values())))
        whole = torch.stack([updates.get(place, none) for place in range(len(self))])
        return whole.view(getattr(self.owner, self.layout.attribute).shape)

    def tuned(self) -> torch.Tensor | None:
        """Get the parameter with the updates of its active adapters, differentiable in their numbers.

        Added in float32 and rounded once to the parameter's dtype, as a merge does. None where the parameter itself is
        right: without an active adapter, while adapters are disabled or merged.
        """
        first = self.experts[0]
        if first.disable_adapters:
            for expert in self.experts:
                if expert.merged:
                    expert.unmerge()
        held = {
            name: places
            for name in first.active_adapters
            if (places := [place for place, expert in enumerate(self.experts) if name in expert.spectune_adapter])
        }
        if first.disable_adapters or self._merged or not held:
            return None
        stored: torch.Tensor = getattr(self.owner, self.layout.attribute)
        total = as_stack(stored).to(torch.promote_types(stored.dtype, torch.float32))
        with in_own_dtype(total):
            for name, places in held.items():
                dW_BOI = self._update([self.experts[place].module(name) for place in places]).to(total.dtype)
                update = dW_BOI.mT if self.layout.transposed else dW_BOI
                # An expert without directions to train (its weight is zero) has no adapter.
                at = torch.tensor(places, device=total.device)
                total = total + update if len(places) == len(self) else total.index_add(0, at, update)
        # transformers' grouped products need the strides of the parameter.
        return total.to(stored.dtype).contiguous().view(stored.shape)

    def _update(self, modules: list[SpectralModule]) -> torch.Tensor:
        if any(module._forward_hooks or module._forward_pre_hooks for module in modules):
            # Who listens to a module (the export's proof) hears what it makes of the identity.
            one_II = torch.eye(modules[0].Vh_RI.shape[1], dtype=modules[0].dtype, device=modules[0].S_R.device)
            return torch.stack([module(one_II).mT for module in modules])
        return dense_stack([module.training_delta() for module in modules])


class SpectralParameters(nn.Module, BaseTunerLayer):
    """A module whose parameters are adapted: it runs as ever, on the parameters with their updates added."""

    adapter_layer_names = ()
    other_param_names = ()

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self._active_adapter: list[str] = []
        self.train(base_layer.training)

    def stack(self, attribute: str, name: str, adapter_name: str) -> SpectralStack:
        """Get the stack of one parameter, which is made where there is none yet."""
        if attribute not in self._modules or attribute == "base_layer":
            # Not by add_module: PEFT's layers have a property `weight`, and so may the parameter be called.
            self._modules[attribute] = SpectralStack(self.base_layer, attribute, name, adapter_name)
        return cast(SpectralStack, self._modules[attribute])

    def stacks(self) -> Iterator[tuple[str, SpectralStack]]:
        """Get name of the parameter -> its stack."""
        for attribute, stack in self._modules.items():
            if isinstance(stack, SpectralStack):
                yield attribute, stack

    def drop_empty(self) -> bool:
        """Forget the stacks without adapters, and say whether none is left."""
        for attribute, stack in list(self.stacks()):
            if not any(len(expert.spectune_adapter) for expert in stack.experts):
                del self._modules[attribute]
        return not any(True for _ in self.stacks())

    @property
    def weight(self) -> Any:
        """The stack of a parameter of that name; a model that reads the parameter from outside must not miss it."""
        stack = self._modules.get("weight")
        return self.base_layer.weight if stack is None else stack

    @property
    def merged_adapters(self) -> list[str]:  # type: ignore[override]
        """The adapters that are merged; the experts know."""
        experts = (expert for _, stack in self.stacks() for expert in stack.experts)
        return next((expert.merged_adapters for expert in experts if expert.merged), [])

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Do nothing: PEFT merges every adapted layer, and the experts are layers of their own."""

    def unmerge(self) -> None:
        """Do nothing: PEFT unmerges every adapted layer, and the experts are layers of their own."""

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """Get the module alone, with its experts merged or as they are."""
        for _, stack in self.stacks():
            for expert in stack.experts:
                if merge:
                    expert.merge(safe_merge, adapter_names)
        return self.base_layer

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter from all experts."""
        for _, stack in self.stacks():
            for expert in stack.experts:
                BaseTunerLayer.delete_adapter(expert, adapter_name)
            self._active_adapter = list(stack.experts[0].active_adapters)

    def get_delta_weight(self, adapter_name: str, parameter: str | None = None) -> torch.Tensor:
        """Get the update of a parameter in its own layout; `parameter` names it where several are adapted."""
        stacks = dict(self.stacks())
        if parameter is None and len(stacks) > 1:
            raise ValueError(f"get_delta_weight: several parameters are adapted here. Name one of {sorted(stacks)}.")
        return stacks[next(iter(stacks)) if parameter is None else parameter].get_delta_weight(adapter_name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if ROWS_DIFFER.get():
            raise OptionError(
                "adapter_names cannot be used in a model with target_parameters: experts have one weight for the whole "
                "batch. Use set_adapter and one batch for each adapter."
            )
        found = {attribute: stack.tuned() for attribute, stack in self.stacks()}
        tuned = {attribute: weight for attribute, weight in found.items() if weight is not None}
        if not tuned:
            return self.base_layer(*args, **kwargs)
        return torch.func.functional_call(self.base_layer, tuned, args, kwargs)

    def __repr__(self) -> str:
        return "spectune." + super().__repr__()


def as_stack(stored: torch.Tensor) -> torch.Tensor:
    """Get a parameter with three axes, without a copy."""
    return stored if stored.ndim == 3 else stored.unsqueeze(0)
