"""The kinds of adapted layers: what one adapter adds to the output of each."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..adapter import SpectralModule, at_hand, forward_of, is_autocast
from ..adapter.rows import ROWS, add_rows, stacked_cores
from ..algebra import add, dense, is_core_built, is_dense_cheaper, through_core, with_built_core
from ..errors import OptionError
from ..records import Delta
from .attention import SpectralAttentionLinear, reading
from .base_weight import backend_of, layout_of
from .layer import SpectralAdapted
from .own_code import has_own_forward

PLAIN = (nn.Linear, Conv1D, nn.Conv1d, nn.Conv2d, nn.Conv3d)


class SpectralLinear(SpectralAdapted):
    """A linear layer: nn.Linear, transformers' Conv1D, or one quantised by bitsandbytes or torchao."""

    def update(self, module: SpectralModule, x: torch.Tensor) -> torch.Tensor:
        return cast(torch.Tensor, module(x.to(self.working_dtype(x, module))))

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.bank is not None and (rows := ROWS.get()) is not None and rows.bank is self.bank.bank:
            return self._forward_banked(x, rows.of_batch(x.shape, self.module_name), *args, **kwargs)
        modules = self.active_modules()
        if (
            args
            or kwargs
            or not modules
            or self.merged_adapters
            or self._disable_adapters
            or not is_plain(self.base_layer)
            # The fused road calls no module of an adapter, so a hook on one (the export's proof) would see nothing.
            or any(module._forward_hooks or module._forward_pre_hooks for module in modules)
        ):
            return super().forward(x, *args, **kwargs)
        dtype = self.working_dtype(x, modules[0])
        if x.dtype != dtype and not is_autocast(x):
            return super().forward(x)
        # Under autocast base and adapter would each cast x.
        x_NI = x.to(dtype).reshape(-1, x.shape[-1])
        y_NO = tuned_product(cast(nn.Linear, self.base_layer), x_NI, [module.delta_in(dtype) for module in modules])
        return y_NO.view(*x.shape[:-1], y_NO.shape[-1])

    def _forward_banked(self, x: torch.Tensor, seats_B: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.merged:
            raise ValueError(f"{self.module_name}: a bank needs the base weight. Call unmerge_adapter first.")
        result: torch.Tensor = self.base_layer(x, *args, **kwargs)
        return result if self.disable_adapters else self._add_banked(result, x, seats_B)

    def extra_repr(self) -> str:
        backend = self.quantization_backend
        return "" if backend is None else f"quantization_backend={backend.backend_name!r}"

    def _add_banked(self, result: torch.Tensor, x: torch.Tensor, seats_B: torch.Tensor) -> torch.Tensor:
        assert self.bank is not None
        x_NI = x.to(self.working_dtype(x, self.bank.module)).reshape(-1, x.shape[-1])
        return self.bank.add(result.reshape(-1, result.shape[-1]), x_NI, seats_B).view(result.shape)

    def add_to_rows(self, result: torch.Tensor, x: torch.Tensor, adapter_names: list[str]) -> torch.Tensor:
        """Get the base's output with the update of each row's adapter: adapters on one basis in one product."""
        if self.bank is not None and (seats_B := self.bank.seats.of_rows(adapter_names, x.device)) is not None:
            result = self._add_banked(result, x, seats_B)
        live = {name: self.module(name) for name in dict.fromkeys(adapter_names) if name in self.spectune_adapter}
        for names in self._groups.of(live):
            if len(names) == 1:
                result = super().add_to_rows(result, x, [name if name in names else "" for name in adapter_names])
                continue
            place = {name: i for i, name in enumerate(names)}
            rows_B = torch.tensor([place.get(name, len(names)) for name in adapter_names], device=x.device)
            lead = live[names[0]]
            x_NI = x.to(self.working_dtype(x, lead)).reshape(-1, x.shape[-1])
            cores, pattern = stacked_cores([live[name] for name in names])
            y_NO = result.reshape(-1, result.shape[-1])
            result = add_rows(y_NO, x_NI, lead, cores.index_select(0, rows_B), pattern).view(result.shape)
        return result


def is_plain(base: nn.Module) -> bool:
    """Ask whether a layer is a product with its weight and nothing else: nobody sees that its output is added into."""
    if type(base) not in PLAIN or type(base._parameters["weight"]) is not nn.Parameter:
        return False
    return not (base._forward_hooks or base._forward_pre_hooks or base._backward_hooks or "forward" in base.__dict__)


def tuned_product(base: nn.Linear, x_NI: torch.Tensor, deltas: list[Delta]) -> torch.Tensor:
    """Get x (W + dW)^T + b by the road with the fewest multiplications for these shapes, tokens and dtype.

    Usually x W^T + b, into which every update is added through its factors. A wide update (svft and svdiff on a full
    basis) may be cheaper built: in float32 as x (W + dW)^T, in half precision, where W + dW would round the update
    away, as a second product. A dense core between frozen factors may be built, too (`with_built_core`). The sum is W
    itself while dW is zero, so all roads begin at the base's very output.
    """
    training = torch.is_grad_enabled()
    fused = type(base) is nn.Linear and base.weight.dtype == x_NI.dtype and x_NI.dtype.itemsize >= 4
    if fused and len(deltas) == 1 and not base.weight.requires_grad and is_core_built(deltas[0], len(x_NI)):
        return with_built_core(x_NI, base.weight, base.bias, deltas[0])
    wide = [delta for delta in deltas if is_dense_cheaper(delta, x_NI.shape[0], fused, training)]
    if wide and fused:
        weight_OI = base.weight
        for delta in wide:
            weight_OI = weight_OI + dense(delta)
        y_NO = F.linear(x_NI, weight_OI, base.bias)
    elif type(base) is Conv1D:
        y_NO = torch.addmm(base.bias, x_NI, base.weight)
    else:
        y_NO = base(x_NI)
    for delta in deltas:
        if delta not in wide:
            y_NO = add(y_NO, delta, x_NI)
        elif not fused:
            y_NO = y_NO.addmm_(x_NI, dense(delta).T)
    return y_NO


class SpectralConvLinear(SpectralAdapted):
    """A convolution, as a linear map of flattened patches. (PEFT's all-linear knows tuner layers by "Linear".)

    The right factor is a convolution with Q output channels, core and left factor act on channels. With
    groups every group sees other inputs, so there the dense kernel is built; it is small, being grouped.
    """

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        base, modules = self.get_base_layer(), self.active_modules()
        fused = base.groups != 1 and modules and not (args or kwargs or self.merged or self.disable_adapters)
        if not fused or x.dtype.itemsize < 4 or is_autocast(x) or not is_plain(self.base_layer):
            return super().forward(x, *args, **kwargs)
        kernel = base.weight
        for module in modules:  # the kernel of a merge, so that merging changes no output
            kernel = kernel + dense(module.training_delta()).reshape(self.stored_shape).to(kernel.dtype)
        return base._conv_forward(x, kernel, base.bias)

    def update(self, module: SpectralModule, x: torch.Tensor) -> torch.Tensor:
        dtype = self.working_dtype(x, module)
        base, delta, x = self.get_base_layer(), module.delta_in(dtype), x.to(dtype)
        if base.groups != 1:
            grouped: torch.Tensor = base._conv_forward(x, dense(delta).reshape(self.stored_shape), None)
            return grouped
        channels = 1 - len(self.stored_shape)  # counted from the end: a single sample has no batch axis
        kernel = delta.right_QI.reshape(-1, *self.stored_shape[1:])
        z_NQ = base._conv_forward(x, kernel, None).movedim(channels, -1)
        return F.linear(through_core(z_NQ, delta.core), delta.left_OP).movedim(-1, channels)


class SpectralEmbedding(SpectralAdapted):
    """A table of vectors, as a linear map of one-hot rows: looked up in the right factor, never multiplied out."""

    def update(self, module: SpectralModule, x: torch.Tensor) -> torch.Tensor:
        delta = module.training_delta()
        z_NQ = F.embedding(x, delta.right_QI.T)
        added = F.linear(through_core(z_NQ, delta.core), delta.left_OP)
        scale = self._get_embed_scale()
        return added if scale is None else added * scale


class SpectralOwnLinear(SpectralAdapted):
    """A layer whose class has its own forward, which runs on the tuned weight, as if it were merged."""

    runs_own_forward = True

    def forward(self, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        if kwargs.pop("adapter_names", None) is not None and not self.disable_adapters:
            raise OptionError(
                f"{self.module_name}: a {type(self.get_base_layer()).__name__} runs on one weight, so all rows of a "
                f"batch must use the same adapter. Run one adapter at a time, or train without this layer."
            )
        if self.disable_adapters and self.merged:
            self.unmerge()
        if self.disable_adapters or self.merged or not self.active_modules():
            return self.base_layer(*args, **kwargs)
        base = self.get_base_layer()
        run = forward_of(base)
        with at_hand(base), reading(base, self.layout.attribute, self.tuned_weight()):
            return run(*args, **kwargs)


KINDS: dict[str, type[SpectralAdapted]] = {
    "linear": SpectralLinear,
    "conv": SpectralConvLinear,
    "embedding": SpectralEmbedding,
    "attention": SpectralAttentionLinear,
}


def kind_of(layer: nn.Module, name: str) -> type[SpectralAdapted]:
    """Get the kind of adapted layer for a layer; `WeightError` or `LeftOutError` if there is none."""
    backend = backend_of(layer)
    kind = KINDS[layout_of(layer, name, backend).kind]
    own = backend is None and kind is not SpectralAttentionLinear and has_own_forward(layer, name)
    return SpectralOwnLinear if own else kind
