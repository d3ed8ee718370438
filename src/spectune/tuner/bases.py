"""The bases of all weights of a new adapter, computed before any layer is changed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ..adapter.saved import LayerRanks
from ..errors import WeightError
from ..methods import Method
from ..records import Spectrum, Weight
from ..spectrum import Request, obtain, open_cache, processes
from .base_weight import backend_of, layout_of
from .config import SpectralConfig
from .directions import data_basis


def find_bases(
    weights: Iterable[Weight], config: SpectralConfig, ranks: LayerRanks, tick: Callable[[str], None]
) -> dict[str, Spectrum]:
    """Get name of a weight -> basis.

    Equal shapes are solved together, the cache is asked first, and the processes of a distributed run share the
    work.
    """
    asked: dict[Request, list[Weight]] = {}
    for weight in weights:
        if (request := basis_request(weight.name, weight.W_OI, config, ranks)) is not None:
            asked.setdefault(request, []).append(weight)
    svd, share = config.svd_options, is_shared(config)
    bases: dict[str, Spectrum] = {}
    for request, weights in asked.items():
        cache = open_cache(svd.cache_dir)
        spectra = obtain(weights, request, cache, share=share, on_done=lambda weight: tick(weight.name))
        bases |= {weight.name: spectrum for weight, spectrum in zip(weights, spectra, strict=True)}
    return bases


def is_shared(config: SpectralConfig) -> bool:
    """Ask whether the processes of a distributed run share the work of a new adapter.

    A saved one is never waited for: scripts load it on the first process alone, to evaluate it there.
    """
    return config.svd_options.share and config.origin is None


def weights_of_layers(model: nn.Module, targets: Callable[[str], Any]) -> Iterator[Weight]:
    """Get the plainly stored weights of the layers that `targets` accepts.

    Quantised weights are left out: `bases_of_quantised` finds their bases, or `find_basis`, on the dequantised weight.
    """
    for path, module in model.named_modules():
        # A second adapter meets the layers that the first has adapted; their insides are not targets.
        if not path or ".base_layer" in path or ".spectune_" in path or not targets(path):
            continue
        layer: Any = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
        if getattr(module, "merged", False) or backend_of(layer) is not None:
            continue
        refuse_offloaded(layer, path, model)
        try:
            layout = layout_of(layer, path)
            stored = plain_weight(layer, layout.attribute, path)
            if not stored.is_meta or processes() > 1:  # the numbers may come from another process
                yield Weight(path, layout.to_matrix(stored))
        except WeightError:
            continue  # PEFT has not asked for this layer yet; if it does, the refusal is raised there


def refuse_offloaded(layer: nn.Module, name: str, model: nn.Module) -> None:
    """Raise `WeightError` for a layer whose weight accelerate keeps on the disk or another device between forwards.

    PEFT takes accelerate's hooks off before it loads an adapter; the map of devices still tells it.
    """
    spread = "_hf_hook" in layer.__dict__ or hasattr(model, "hf_device_map")
    if spread and any(parameter.is_meta for parameter in layer.parameters(recurse=False)):
        raise WeightError(
            f"{name}: the base weight is offloaded (device_map or an offload folder), and an adapter needs it. "
            "Load the base without offloading, attach or load the adapter, then call accelerate's dispatch_model."
        )


def plain_weight(layer: nn.Module, attribute: str, name: str) -> torch.Tensor:
    """Get a layer's stored tensor; `WeightError` when this process holds only a part of it."""
    stored: torch.Tensor = getattr(layer, attribute)
    if hasattr(stored, "ds_id"):
        raise WeightError(
            f"{name}: this weight is partitioned by DeepSpeed ZeRO-3, and is needed whole here. Load the model without "
            f"zero.Init (zero3_init_flag: false), or use ZeRO-2."
        )
    if hasattr(stored, "device_mesh"):  # a DTensor; importing its class would cost a second at start
        raise WeightError(
            f"{name}: the base weight is already sharded (FSDP2 or tensor parallel), so an adapter added now would not "
            f"be. Attach the adapter first, then call fully_shard."
        )
    return stored.detach()


def basis_request(path: str, W_OI: torch.Tensor, config: SpectralConfig, ranks: LayerRanks) -> Request | None:
    """Get the engine's request for one weight; None if the method, data or the file provides the basis."""
    try:
        rank, columns = config.method_for(path, ranks.of(path), *W_OI.shape).basis(*W_OI.shape)
    except WeightError:
        return None  # raised again, with the layer's name, when the layer is adapted
    if rank == 0 or config.basis_is_in_file or config.basis_is_prepared:
        return None
    svd = config.svd_options
    columns = tuple(columns) if isinstance(columns, list) else columns
    return Request(rank, columns, svd.solver, svd.tolerance, svd.seed)


def find_basis(name: str, W_OI: torch.Tensor, method: Method, config: SpectralConfig) -> Spectrum:
    """Get the basis of a single weight."""
    rank, columns = method.basis(*W_OI.shape)
    if config.basis_is_prepared:
        return data_basis(config, name, W_OI.detach(), rank)
    svd = config.svd_options
    request = Request(rank, columns, svd.solver, svd.tolerance, svd.seed)
    (spectrum,) = obtain([Weight(name, W_OI.detach())], request, open_cache(svd.cache_dir))
    return spectrum
