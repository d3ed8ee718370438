"""`KeptBasis`: the singular basis of an adapter, recomputed, rotated to match its file, embedded or sharded."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..errors import AdapterError
from ..methods.contract import Method
from ..records import Spectrum
from ..spectrum import FOREIGN_GAIN, align, gain_off, sketch, sketch_tolerance, sketch_width
from .autocast import in_own_dtype
from .offloading import at_hand, is_cut

# |W Vh^T - U S| of an embedded basis, as a fraction of a foreign basis of that size (|W|_F sqrt(R / K)): rounding the
# base to bfloat16 gives at most 2^-9, another weight about 1. In between, chosen.
FOREIGN_RESIDUAL = 0.03
BASIS = ("U_OR", "S_R", "Vh_RI")
# A copy of the basis in the dtype of the forwards is kept where it is at most this part of a full one, so that it adds
# little memory. A wider one is rounded in each forward, which next to the products with it is nothing. Chosen.
KEPT_SHARE = 4


class KeptBasis(nn.Module):
    """The frozen basis of one adapter on one weight: a file contains it, or identifies it by its sketch.

    Buffers are the basis `U_OR, S_R, Vh_RI`, the method's frozen tensors, and the `sketch` that travels in the
    file: on load, the recomputed basis is rotated to match it, so that the update is the same on every machine.
    """

    U_OR: torch.Tensor
    S_R: torch.Tensor
    Vh_RI: torch.Tensor
    sketch: torch.Tensor
    own_names: tuple[str, ...] = ()
    """The names of the trained tensors in this module."""

    def __init__(self, method: Method, spectrum: Spectrum, *, embed_basis: bool) -> None:
        super().__init__()
        self.method = method
        self.name = spectrum.name
        self.columns, self.quality, self.source = spectrum.columns, spectrum.quality, spectrum.source
        self.base_matrix: Callable[[], torch.Tensor] | None = None
        """Returns W_OI, to check an embedded basis against it; set by the layer."""
        self._record: Spectrum | None = None
        self._cast: dict[tuple[str, torch.dtype], tuple[torch.Tensor, int, torch.Tensor]] = {}
        device = spectrum.S_R.device
        for buffer in BASIS:
            self.register_buffer(buffer, getattr(spectrum, buffer).contiguous())
        self.frozen_names = tuple(frozen := method.frozen(spectrum))
        for name, tensor in frozen.items():
            kept = tensor if tensor.is_floating_point() else tensor.to(torch.int32)
            self.register_buffer(name, kept.to(device), persistent=method.saves_frozen())
        self._aside: dict[str, torch.Tensor] = {}
        """What stands on the meta device until a file brings it, as it was found here."""
        found = math.isfinite(spectrum.quality.residual)
        self.register_buffer("sketch", self._make_sketch() if found and self.source == "weight" else torch.zeros(0))
        pending = method.saves_frozen() and any(bool((t < 0).any()) for t in frozen.values())  # places of a file
        self._settled_on: torch.Tensor | None = self.sketch if found and not pending else None
        self.embed_basis(embed_basis)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the basis, in which the update is computed."""
        S_R = self._buffers["S_R"]
        assert S_R is not None
        return S_R.dtype

    @property
    def spectrum(self) -> Spectrum:
        """The basis as a record, rotated to match the stored sketch."""
        with at_hand(self):
            if not self._is_settled():
                self.settle()
                self.refuse_non_finite()  # transformers writes a file's numbers directly into the module
            return self._basis()

    def _is_settled(self) -> bool:
        """Ask whether the basis matches the present sketch, which accelerate fetches as a new tensor each time."""
        present, settled_on = self._buffers["sketch"], self._settled_on
        if present is settled_on:
            return True
        if torch.compiler.is_exporting():  # torch.export puts other tensors in the places of all buffers
            if settled_on is None:
                raise AdapterError(f"{self.name}: loaded and never run. Run the model once before torch.export.")
            return True
        if present is None or settled_on is None or "_hf_hook" not in self.__dict__:
            return False
        if present.shape == settled_on.shape and torch.equal(present, settled_on.to(present)):
            self._settled_on = present
        return self._settled_on is present

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "sketch":  # transformers writes a file's tensors so
            self._settled_on = None
        super().__setattr__(name, value)

    def await_file(self) -> None:
        """Put what a file will bring on the meta device, as PEFT's low_cpu_mem_usage does with parameters."""
        for name, tensor in self._buffers.items():
            if tensor is not None and name not in self._non_persistent_buffers_set:
                self._aside[name], self._buffers[name] = tensor, tensor.to("meta")
        self._forget()
        self._settled_on = None

    def _kept(self, name: str) -> torch.Tensor:
        """Get a frozen tensor, a buffer or a parameter; faster than torch's attribute access."""
        tensor = self._buffers[name] if name in self._buffers else self._parameters[name]
        assert tensor is not None
        return tensor

    def _keep(self, name: str, tensor: torch.Tensor) -> None:
        """Replace a frozen tensor."""
        frozen = name in self._parameters
        setattr(self, name, nn.Parameter(tensor.contiguous(), requires_grad=False) if frozen else tensor)

    def bases_as_parameters(self) -> None:
        """Make the large frozen tensors frozen parameters, which FSDP2 shards; it copies buffers to every process.

        torch's tools for sharded models need every parameter in the state dict; the adapter's file does not change.
        """
        for name in self._large:
            tensor = self._buffers.get(name)
            if tensor is not None and tensor.numel():
                del self._buffers[name]
                self.register_parameter(name, nn.Parameter(tensor.contiguous(), requires_grad=False))
        self._forget()

    def freeze_basis(self) -> None:
        """Freeze the frozen tensors that are parameters."""
        for name in self._large:
            if name in self._parameters:
                self._parameters[name].requires_grad_(False)  # type: ignore[union-attr]

    @property
    def _large(self) -> tuple[str, ...]:
        """The tensors that FSDP2 shards; the others have a few numbers per direction (values, sketch, places)."""
        return "U_OR", "Vh_RI", *self.method.large_frozen()

    @property
    def found_names(self) -> list[str]:
        """The names of frozen parameters that are recomputed and not in the adapter's file."""
        embedded = "sketch" in self._non_persistent_buffers_set  # torch has such a set only for buffers
        travels = {name for name in self._large if (embedded if name in BASIS else self.method.saves_frozen())}
        frozen = [name for name in self._large if name in self._parameters]
        return [name for name in frozen if name not in travels]

    def _basis(self) -> Spectrum:
        U_OR, S_R, Vh_RI = (self._kept(name) for name in BASIS)
        held = self._record
        # Kept, because every forward needs it; a rotated or moved basis is another tensor.
        if held is None or held.U_OR is not U_OR or held.S_R is not S_R or held.Vh_RI is not Vh_RI:
            held = self._record = Spectrum(U_OR, S_R, Vh_RI, self.columns, self.quality, self.name, self.source)
        return held

    @property
    def frozen(self) -> dict[str, torch.Tensor]:
        """The method's other frozen tensors."""
        with at_hand(self):
            return {name: getattr(self, name) for name in self.frozen_names}

    def factors_in(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Get (U_OR, Vh_RI) for a forward in this dtype."""
        basis = self.spectrum
        return self._rounded("U_OR", basis.U_OR, dtype), self._rounded("Vh_RI", basis.Vh_RI, dtype)

    def _rounded(self, name: str, factor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        # Sharded bases are parameters, and not kept a second time, whole.
        frozen = factor is self._buffers.get(name) and len(self.columns) * KEPT_SHARE <= min(
            self.U_OR.shape[0], self.Vh_RI.shape[1]
        )
        if not frozen or torch.compiler.is_compiling() or factor.is_inference():
            return factor.to(dtype)
        held = self._cast.get((name, dtype))
        # The version counter changes when load_state_dict writes into the buffer; a rotated basis is another tensor.
        if held is None or held[0] is not factor or held[1] != factor._version:
            held = self._cast[name, dtype] = (factor, factor._version, factor.to(dtype))
        return held[2]

    def _make_sketch(self) -> torch.Tensor:
        return sketch(self._basis(), sketch_width(len(self.columns))).to(self.S_R.device)

    def embed_basis(self, embed: bool) -> None:
        """Choose what describes the basis in a file: the basis itself, or only its sketch."""
        for buffer in (*BASIS, "sketch"):
            if embed == (buffer != "sketch"):
                self._non_persistent_buffers_set.discard(buffer)
            else:
                self._non_persistent_buffers_set.add(buffer)
                if buffer in self._aside:  # the file does not bring it after all
                    self._buffers[buffer] = self._aside.pop(buffer)

    def settle(self) -> None:
        """Rotate the basis to match the sketch from a file; `AdapterError` if it belongs to another weight."""
        if any(tensor.is_meta for tensor in self._buffers.values() if tensor is not None):
            return  # no file has come yet
        self._aside.clear()
        if is_cut(self._kept("Vh_RI")):  # no process has it whole
            if self._buffers["sketch"] is not self._settled_on:
                raise AdapterError(
                    f"{self.name}: numbers were loaded after the model was sharded, and a sharded basis cannot be "
                    f"rotated to match them. Load the adapter first, then call fully_shard or deepspeed.initialize."
                )
            return
        if self.sketch.numel() and "sketch" not in self._non_persistent_buffers_set:
            basis = self._basis()
            with in_own_dtype(basis.S_R):
                turned, unexplained = align(basis, self.sketch)
            allowed = sketch_tolerance(basis)
            if not unexplained <= allowed:
                raise AdapterError(
                    f"{self.name}: the adapter was trained on another base weight: the sketch of its singular "
                    f"vectors differs by {unexplained:.1%} from this base's, more than rounding ({allowed:.1%}). "
                    f"Load it on the base model that it was trained on."
                )
            for name in BASIS:
                self._keep(name, getattr(turned, name))
        elif len(self.columns):
            self.refuse_foreign(self._basis())
            self._complete_frozen()
        if self.method.saves_frozen():
            self.method.check_frozen(self._basis(), {name: self._kept(name) for name in self.frozen_names})
        self._settled_on = self.sketch

    def refuse_non_finite(self) -> None:
        """Raise `AdapterError` if a trained number is NaN or infinite."""
        for name in self.own_names:
            if not bool(torch.isfinite(getattr(self, name)).all()):
                raise AdapterError(f"{self.name}.{name}: contains NaN or infinity. Train or copy the adapter again.")

    def refuse_foreign(self, loaded: Spectrum) -> None:
        """Raise `AdapterError` if the basis of a file is missing, or is not one of this base weight."""
        U_OR, S_R, Vh_RI = loaded.U_OR, loaded.S_R, loaded.Vh_RI
        if not bool(S_R.any()) and not math.isfinite(self.quality.residual):
            raise AdapterError(
                f"{self.name}: the basis should be in the adapter's file, and is not. Export or copy the adapter again."
            )
        if self.base_matrix is None:
            return
        W_OI = self.base_matrix().to(S_R)
        if self.source != "weight":
            self._refuse_other_gains(W_OI, loaded)
            return
        with in_own_dtype(S_R):
            residual = torch.linalg.vector_norm(W_OI @ Vh_RI.mT - U_OR * S_R)
        foreign = torch.linalg.vector_norm(W_OI) * (len(self.columns) / min(W_OI.shape)) ** 0.5
        if not float(residual) <= FOREIGN_RESIDUAL * float(foreign):
            raise AdapterError(
                f"{self.name}: the adapter was trained on another base weight: its singular vectors leave a residual "
                f"of {float(residual / foreign):.1%} here, more than rounding ({FOREIGN_RESIDUAL:.0%}). Load it on the "
                f"base model that it was trained on."
            )

    def _refuse_other_gains(self, W_OI: torch.Tensor, loaded: Spectrum) -> None:
        """Raise `AdapterError` unless this weight has along directions of data what the adapter's own had."""
        with in_own_dtype(W_OI):
            off = gain_off(W_OI, loaded)
        if not off <= FOREIGN_GAIN:
            raise AdapterError(
                f"{self.name}: the adapter was trained on another base weight: along its directions this one differs "
                f"by {off:.0%} of a typical entry, at most {FOREIGN_GAIN:.0%} is rounding. Load it on the base model "
                f"that it was trained on."
            )

    def _complete_frozen(self) -> None:
        """Recompute the frozen tensors that follow from the basis, now that it is loaded."""
        if not self.method.saves_frozen():
            for name, tensor in self.method.frozen(self._basis()).items():
                if tensor.is_floating_point():
                    self._keep(name, tensor.to(self.S_R))

    def _forget(self) -> None:
        """Drop the tensors that were kept for the forwards."""
        self._record = None
        self._cast.clear()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_record": None, "_cast": {}}

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        if prefix + "sketch" in state_dict or prefix + "U_OR" in state_dict:
            self.settle()

    def _apply(self, fn: Any, recurse: bool = True) -> KeptBasis:
        settled = self.sketch is self._settled_on
        self._forget()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if settled:
            self._settled_on = self.sketch
        return self
