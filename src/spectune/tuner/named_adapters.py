"""What a tuner does with the adapters that a call names: switch, merge, weigh and mix them, or refuse the names."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import AuxiliaryTrainingWrapper

from ..adapter.rows import ROWS, rows_repeated
from ..errors import AdapterError, OptionError, nearest
from .layer import SpectralLayer
from .mixed_rows import rows_named
from .origin import Origin

FUSE = "For saved adapters of any method: spectune fuse A B -o AB --weights 1."


class NamedAdapters(BaseTuner):
    """Every call that takes names of adapters: with names that do not exist it changes nothing and lists them all."""

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Make these adapters, and no others, the active ones."""
        self._refuse_unknown_adapters("Trying to activate", adapter_name)
        super().set_adapter(adapter_name, inference_mode=inference_mode)

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Let the numbers of these adapters train, or freeze them."""
        self._refuse_unknown_adapters("Trying to change the gradients of", adapter_names)
        super().set_requires_grad(adapter_names, requires_grad)

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Merge these adapters, or the active ones, into the base; `unmerge_adapter` puts the base back."""
        self._refuse_unknown_adapters("Trying to merge", adapter_names)
        super().merge_adapter(adapter_names, safe_merge)

    def _unload_and_optionally_merge(self, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> Any:
        self._refuse_unknown_adapters("Trying to merge", adapter_names)
        return super()._unload_and_optionally_merge(*args, adapter_names=adapter_names, **kwargs)

    def set_scale(self, adapter_name: str, scale: float) -> None:
        """Set the strength of one adapter in every layer: 1 as trained, 0 for none."""
        self._refuse_unknown_adapters("Trying to scale", adapter_name)
        for module in self.model.modules():
            if isinstance(module, SpectralLayer):
                module.set_scale(adapter_name, scale)

    def add_weighted_adapter(
        self, adapters: list[str], weights: list[float], adapter_name: str, combination_type: str = "linear", **svd: Any
    ) -> None:
        """Add an adapter whose update is sum_i weights_i dW_i, exactly.

        Possible where updates are linear in the trained numbers and share one basis: svft without a gate, and
        orthogonal_adaptation of one concept. For every other method `OptionError`: activate several adapters with
        `set_adapter([...])` and weigh them with `set_scale`, or add saved ones with `spectune fuse`; both are exact.
        """
        if combination_type != "linear" or svd:
            asked = ", ".join(
                f"{name}={value!r}" for name, value in {"combination_type": combination_type, **svd}.items()
            )
            raise OptionError(f"{asked}: only combination_type='linear' is supported, without options. {FUSE}")
        if len(adapters) != len(weights) or not adapters:
            raise OptionError(f"{len(weights)} weights for {len(adapters)} adapters. Give one for each.")
        self._refuse_unknown_adapters("Trying to weigh", adapters)
        methods = [self.peft_config[name].build_method() for name in adapters]
        if any(method != methods[0] for method in methods) or not methods[0].is_linear():
            raise OptionError(
                f"{', '.join(adapters)}: updates of {methods[0].name} cannot be added by adding their numbers, or the "
                f"options differ. Activate them together with set_adapter({adapters}) and weigh them with set_scale. "
                f"{FUSE}"
            )
        config = self.peft_config[adapter_name] = copy.deepcopy(self.peft_config[adapters[0]])
        config.origin = config.origin and Origin()  # no file has what the new adapter holds
        self.inject_adapter(self.model, adapter_name)
        for layer in self.model.modules():
            if isinstance(layer, SpectralLayer) and adapter_name in layer.spectune_adapter:
                _add_up(layer, adapters, weights, adapter_name)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Pass `adapter_names` of a forward call on to every layer, for batches whose rows use different adapters.

        `generate` repeats every row for beams or several answers; the names, and the rows of a bank, follow it.
        """
        names = kwargs.pop("adapter_names", None)
        copies = max(kwargs.get("num_beams") or 1, kwargs.get("num_return_sequences") or 1)
        if names is None:
            with nullcontext() if copies == 1 else rows_repeated(copies):
                yield
            return
        if self.training:
            raise ValueError("Cannot pass `adapter_names` when the model is in training mode.")
        self._refuse_unknown_adapters("Trying to infer with", names, self._residents())
        wrappers = (SpectralLayer, AuxiliaryTrainingWrapper)
        with rows_named([module for module in self.modules() if isinstance(module, wrappers)], names, copies):
            yield

    def _residents(self) -> set[str]:
        """Get the names that a row may have besides those of adapters: the base's, and those in a bank."""
        banks = [layer.bank for layer in self.model.modules() if isinstance(layer, SpectralLayer) and layer.bank]
        if (rows := ROWS.get()) is not None and any(bank.bank is rows.bank for bank in banks):
            raise OptionError(
                "adapter_names was given inside of `with bank(...)`, which names the rows. Use one of them."
            )
        return {"__base__", *(name for bank in banks for name in bank.seats.of)}

    def _refuse_unknown_adapters(
        self, doing: str, names: str | Iterable[str] | None, others: Iterable[str] = ()
    ) -> None:
        """Raise `AdapterError` that lists every name without an adapter. (PEFT's words: its users look for them.)"""
        asked = [names] if isinstance(names, str) else list(names or ())
        known = {*self.peft_config, *others}
        unknown = [name for name in dict.fromkeys(asked) if name not in known]
        if unknown:
            raise AdapterError(
                f"{doing} non-existing adapter(s): {', '.join(unknown)}. {nearest(unknown[0], list(self.peft_config))}"
            )


@torch.no_grad()
def _add_up(layer: SpectralLayer, adapters: list[str], weights: list[float], adapter_name: str) -> None:
    target = layer.module(adapter_name)
    for name in target.own_names:
        parts = [
            weight * getattr(layer.module(source), name)
            for source, weight in zip(adapters, weights, strict=True)
            if source in layer.spectune_adapter
        ]
        getattr(target, name).copy_(torch.stack(parts).sum(0))
