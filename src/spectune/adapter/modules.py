"""`SpectralModule`: one adapter on one weight."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ..algebra import apply
from ..errors import OptionError
from ..methods.contract import Method
from ..records import Delta, SparseCore, Spectrum
from .autocast import in_own_dtype
from .dynamics import Dynamics, follow
from .kept_basis import BASIS, KeptBasis
from .offloading import at_hand, is_cut

# PEFT's init_weights=False, a start other than the identity to test merging and saving: how far the trained numbers
# are from it. Chosen.
RANDOM_START = 0.02


class SpectralModule(KeptBasis):
    """The trained numbers of one adapter on one weight, with their frozen basis.

    Parameters are the method's trained tensors, under the method's own names; `owner` is the module with those
    that all layers share.
    """

    def __init__(
        self,
        method: Method,
        spectrum: Spectrum,
        *,
        embed_basis: bool,
        random_start: bool = False,
        owner: SpectralModule | None = None,
    ) -> None:
        super().__init__(method, spectrum, embed_basis=embed_basis)
        rows_O, cols_I, _ = spectrum.shape
        device = spectrum.S_R.device
        self.strength = 1.0
        self._dynamics = Dynamics()
        # In a list, so that torch does not register the owner as a child.
        self._owner = [owner] if owner is not None else []
        start = method.start(rows_O, cols_I, seed=zlib.crc32(spectrum.name.encode()))
        self.trained_names = tuple(start)
        self.own_names = tuple(
            name for name in start if owner is None or name not in method.shared_shapes(rows_O, cols_I)
        )
        for name in self.own_names:
            tensor = start[name]
            if random_start:
                tensor = tensor + RANDOM_START * torch.randn(tensor.shape)
            self.register_parameter(name, nn.Parameter(tensor.to(device)))
        if any(parameter.is_meta for parameter in self.parameters()):
            self.await_file()

    @property
    def dynamics(self) -> Dynamics:
        """The rules for the trained numbers at an optimizer step."""
        return self._dynamics

    @dynamics.setter
    def dynamics(self, dynamics: Dynamics) -> None:
        self._dynamics = dynamics
        follow(self)

    @property
    def trained(self) -> dict[str, torch.Tensor]:
        """The trained tensors, in the dtype and on the device of the basis."""
        with at_hand(self):
            S_R = self._kept("S_R")
            found: dict[str, torch.Tensor] = {n: getattr(self, n).to(S_R.dtype) for n in self.own_names}
        for owner in self._owner:  # a model may be spread over devices, layer by layer
            with at_hand(owner):
                others = [name for name in self.trained_names if name not in found]
                found |= {name: getattr(owner, name).to(S_R.device, S_R.dtype) for name in others}
        return found

    def delta(self) -> Delta:
        """Get the update, differentiable in the trained tensors."""
        with at_hand(self), in_own_dtype(self._kept("S_R")):
            return self.method.delta(self.spectrum, self.trained, self.frozen, self.strength)

    def training_delta(self) -> Delta:
        """Get the update for one forward: in training mode, with the method's dropout."""
        with at_hand(self), in_own_dtype(self._kept("S_R")):
            trained = self.method.disturb(self.trained) if self.training else self.trained
            return self.method.delta(self.spectrum, trained, self.frozen, self.strength)

    def delta_in(self, dtype: torch.dtype) -> Delta:
        """Get `training_delta` for a forward in this dtype: computed in the dtype of the basis, rounded once.

        Narrow factors that are the frozen basis itself are rounded once for all forwards.
        """
        delta = self.training_delta()
        if dtype == delta.left_OP.dtype:
            return delta
        core = delta.core
        if isinstance(core, SparseCore):
            core = replace(core, values_C=core.values_C.to(dtype))
        else:
            core = core.to(dtype)
        return Delta(self._rounded("U_OR", delta.left_OP, dtype), core, self._rounded("Vh_RI", delta.right_QI, dtype))

    def forward(self, x_NI: torch.Tensor) -> torch.Tensor:
        return apply(self.delta_in(x_NI.dtype), x_NI)

    def weight_size(self) -> float:
        """Get the root mean square of the base weight's singular values, |W|_F / sqrt(K); `OptionError` for a weight of
        zeros, or where the weight is not at hand."""
        if self.base_matrix is None:
            raise OptionError(f"{self.name}: the base weight is needed to measure its size. Attach the adapter to it.")
        W_OI = self.base_matrix()
        size = float(torch.linalg.vector_norm(W_OI, dtype=torch.float32)) / min(W_OI.shape) ** 0.5
        if not 0 < size < float("inf"):
            raise OptionError(
                f"{self.name}: the base weight is all zeros or not finite, so no step can be a part of its size. "
                f"Exclude the layer or use another optimizer."
            )
        return size

    @property
    def has_settled_basis(self) -> bool:
        """Whether the basis is here and whole: not on the meta device until a file comes, and not sharded."""
        kept = [self._kept(name) for name in (*BASIS, *self.frozen_names)]
        return not any(tensor.is_meta or is_cut(tensor) for tensor in kept)

    def take_basis(self, other: SpectralModule) -> None:
        """Replace this basis, its sketch and the method's frozen tensors by copies of another module's."""
        if not self.has_settled_basis:
            return  # a file brings them
        with at_hand(other):
            device, basis = self._kept("S_R").device, other.spectrum
            self.columns, self.quality, self.source = basis.columns, basis.quality, basis.source
            for name in (*BASIS, *other.frozen_names):
                self._keep(name, other._kept(name).detach().to(device, copy=True))
            self._buffers["sketch"] = self._settled_on = other.sketch.detach().to(device, copy=True)
            self.embed_basis("sketch" in other._non_persistent_buffers_set)
        self._forget()

    def hold(self) -> Callable[[], None]:
        """Get a function that restores the present state, with trained numbers in their present tensors."""
        buffers, parameters, settled_on = dict(self._buffers), dict(self._parameters), self._settled_on
        numbers = {name: tensor.clone() for name, tensor in self.state_dict().items()}

        def put_back() -> None:
            self._buffers.update(buffers)
            self._parameters.update(parameters)
            self._settled_on = settled_on
            for name, tensor in self.state_dict().items():
                tensor.copy_(numbers[name])
            self._forget()

        return put_back

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self.dynamics = self._dynamics  # register the copy with the hook

    def requires_grad_(self, requires_grad: bool = True) -> SpectralModule:
        for name in self.own_names:
            getattr(self, name).requires_grad_(requires_grad)
        return self

    def extra_repr(self) -> str:
        return f"{self.method}, directions={len(self.columns)}, solver={self.quality.solver}"
