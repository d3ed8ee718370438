"""The bases of weights that DeepSpeed's `zero.Init` has cut: no process ever holds all weights, or all bases."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ..adapter import SpectralModule, gathered
from ..adapter.saved import LayerRanks
from ..errors import OptionError, WeightError
from ..records import Quality, Spectrum, Weight
from ..spectrum import BasisCache, Request, obtain, open_cache
from ..spectrum.distributed import assign, found_by_each, processes, rank, send
from .base_weight import Layout, layout_of
from .bases import basis_request
from .config import SpectralConfig

Sent = Callable[[], Spectrum]
"""Sends the basis of one layer from the process that found it to all. Every process must call these in one order."""


@dataclass(frozen=True)
class CutWeight:
    """A weight of which each process holds a part."""

    name: str
    parameter: Any
    layout: Layout

    def outline(self) -> Weight:
        """Get the weight on the meta device: its shape and dtype."""
        return Weight(self.name, self.layout.to_matrix(outline(self.parameter)))

    def whole(self, keep: bool) -> Weight:
        """Get a whole copy if this process is to `keep` it, else the outline; all processes must call it."""
        with gathered(self.parameter):
            if keep:
                return Weight(self.name, self.layout.to_matrix(self.parameter.detach().clone()))
        return self.outline()


def outline(stored: torch.Tensor) -> torch.Tensor:
    """Get a tensor of the same shape and dtype without numbers for one that ZeRO-3 has cut; others as they are."""
    if not hasattr(stored, "ds_id"):
        return stored
    return torch.empty(stored.ds_shape, dtype=stored.dtype, device="meta")  # type: ignore[attr-defined]


def whole_copy(stored: torch.Tensor) -> torch.Tensor:
    """Get a whole copy of a tensor that ZeRO-3 has cut, others as they are; all processes must call it."""
    with gathered(stored):
        return stored.detach().clone() if hasattr(stored, "ds_id") else stored.detach()


def refuse_unfit(is_prepared: bool, layout: Layout, name: str) -> None:
    """Raise `WeightError` for a partitioned weight that cannot get an adapter.

    A model that `deepspeed.initialize` has prepared would not gather what is added now. The output projection of an
    attention with packed weights is decomposed apart, without the other processes.
    """
    if is_prepared:
        raise WeightError(
            f"{name}: the base weight is partitioned by DeepSpeed ZeRO-3, and DeepSpeed has already prepared this "
            f"model, so an adapter added now would not be trained. Attach the adapter before deepspeed.initialize."
        )
    if layout.kind == "attention":
        raise WeightError(
            f"{name}: a MultiheadAttention that zero.Init has partitioned is not supported. Exclude it, or load the "
            f"model without zero.Init (zero3_init_flag: false)."
        )


def cut_weights(model: nn.Module, targets: Callable[[str], Any]) -> Iterator[CutWeight]:
    """Get the weights of the layers that `targets` accepts and ZeRO-3 has cut."""
    # deepspeed.initialize numbers the modules, too; all but some inside of a `z3_leaf_module`.
    is_prepared = any(hasattr(module, "ds_id") for module in model.modules())
    for path, module in model.named_modules():
        if not path or ".base_layer" in path or ".spectune_" in path or not targets(path):
            continue
        layer: Any = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
        try:
            layout = layout_of(layer, path)
        except WeightError:
            continue  # raised again when PEFT asks for this layer
        if hasattr(stored := getattr(layer, layout.attribute), "ds_id"):
            refuse_unfit(is_prepared, layout, path)
            yield CutWeight(path, stored, layout)


def bases_of_cut(
    weights: Iterable[CutWeight], config: SpectralConfig, ranks: LayerRanks, tick: Callable[[str], None]
) -> dict[str, Sent]:
    """Get name of a weight -> what sends its basis.

    Each weight is gathered once and decomposed by one process, which keeps the basis until the layer is adapted. At
    any time a process holds one gathered weight, one copy to work on, and the bases that it has found.
    """
    asked = [(weight, basis_request(weight.name, weight.outline().W_OI, config, ranks)) for weight in weights]
    jobs = [_Job(weight, request) for weight, request in asked if request is not None]
    owners = assign([job.weight.parameter.ds_shape for job in jobs], range(processes()))
    queues = [[job for job, owner in zip(jobs, owners, strict=True) if owner == one] for one in range(processes())]
    cache, found = open_cache(config.svd_options.cache_dir), dict[str, Sent]()
    for turn in itertools.zip_longest(*queues):
        spectra, qualities = found_by_each(_mine(turn, cache))
        for owner, job in enumerate(turn):
            if job is not None:
                tick(job.weight.name)
                found[job.weight.name] = partial(job.send, spectra.get(owner), qualities[owner], owner)
    return found


@dataclass(frozen=True)
class _Job:
    weight: CutWeight
    request: Request

    def send(self, spectrum: Spectrum | None, quality: Quality, owner: int) -> Spectrum:
        sent = send(self.weight.outline(), spectrum, quality, self.request, owner)
        return sent.to(self.weight.parameter.device)


def _mine(turn: Sequence[_Job | None], cache: BasisCache | None) -> Callable[[], dict[int, Spectrum]]:
    """Gather one weight for each process, and get what decomposes this process's own."""
    own: list[tuple[Weight, Request]] = []
    for owner, job in enumerate(turn):
        if job is not None:
            weight = job.weight.whole(owner == rank())
            own += [(weight, job.request)] if owner == rank() else []
    return lambda: {rank(): spectrum for weight, request in own for spectrum in obtain([weight], request, cache)}


def refuse_parts(model: nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    """Raise `OptionError` for tensors of a file of which this process has nothing."""
    for name, parameter in model.named_parameters():
        whole = getattr(parameter, "ds_numel", parameter.numel())
        if name in tensors and whole and not tensors[name].numel():
            raise OptionError(
                f"{name}: DeepSpeed ZeRO-3 has partitioned this adapter, so no process has all of it. Call "
                f"model.save_pretrained(folder, state_dict=accelerator.get_state_dict(engine))."
            )


def cut_basis(module: SpectralModule, base: torch.Tensor) -> None:
    """Cut the frozen basis of a new adapter as its base weight is cut."""
    module.bases_as_parameters()
    frozen = [p for name, p in module.named_parameters(recurse=False) if name not in module.own_names]
    base.convert_to_zero_parameters(frozen)  # type: ignore[attr-defined]
