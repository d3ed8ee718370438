"""`share_out`: each weight is decomposed by one process of a distributed run, and all get the same numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from ..errors import SpectuneError, WeightError
from ..records import Quality, Spectrum, Weight
from .engine import Request, requested_places


def processes() -> int:
    """Get the number of processes of the distributed run, or 1 without one."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Get the number of this process, or 0 without a distributed run."""
    return dist.get_rank() if processes() > 1 else 0


def is_first() -> bool:
    """Ask whether this is the process that writes files for all."""
    return rank() == 0


def all_have(it: bool) -> bool:
    """Ask whether every process of the distributed run has it; all must ask."""
    if processes() == 1:
        return it
    answers: list[Any] = [None] * processes()
    dist.all_gather_object(answers, it)
    return all(answers)


def as_the_first(it: Any) -> Any:
    """Get what the first process has of it; all must ask."""
    if processes() == 1:
        return it
    sent = [it]
    dist.broadcast_object_list(sent, src=0)
    return sent[0]


def share_out(
    weights: Sequence[Weight], request: Request, solve: Callable[[Sequence[Weight]], list[Spectrum]]
) -> list[Spectrum]:
    """Get the spectra of all weights on every process, bit for bit the same.

    The process of rank 0 has the model. Weights go, the most expensive first, to whichever process has the least to do;
    a process without the values of rank 0 (empty weights where FSDP loads on rank 0 only) gets none and only
    receives. An error on one process is raised on all of them.
    """
    owners = assign([tuple(weight.W_OI.shape) for weight in weights], _holders(weights))
    mine = [place for place, owner in enumerate(owners) if owner == rank()]
    spectra, qualities = found_by_each(lambda: dict(zip(mine, solve([weights[place] for place in mine]), strict=True)))
    return [
        send(weight, spectra.get(place), qualities[place], request, owners[place])
        for place, weight in enumerate(weights)
    ]


def found_by_each(
    solve: Callable[[], dict[int, Spectrum]],
) -> tuple[dict[int, Spectrum], dict[int, Quality]]:
    """Get the spectra that this process finds, by place, and the qualities of all; all must call it.

    An error on one process is raised on all of them.
    """
    spectra: dict[int, Spectrum] = {}
    failure: str | None = None
    try:
        spectra = solve()
    except SpectuneError as error:
        failure = str(error)
    report = (failure, {place: found.quality for place, found in spectra.items()})
    reports: list[Any] = [report] * processes()
    if processes() > 1:
        dist.all_gather_object(reports, report)
    for failed, _ in reports:
        if failed is not None:
            raise WeightError(failed)
    return spectra, {place: quality for _, found in reports for place, quality in found.items()}


def assign(shapes: Sequence[tuple[int, ...]], workers: Sequence[int]) -> list[int]:
    """Get the worker of every weight: longest first to the least loaded (Graham 1969), at a cost of O I each."""
    load = dict.fromkeys(workers, 0)
    owners = [0] * len(shapes)
    for place in sorted(range(len(shapes)), key=lambda place: (-_cost(shapes[place]), place)):
        owners[place] = min(workers, key=lambda worker: (load[worker], worker))
        load[owners[place]] += _cost(shapes[place])
    return owners


def _cost(shape: tuple[int, ...]) -> int:
    return int(torch.Size(shape).numel())


def _holders(weights: Sequence[Weight]) -> list[int]:
    """Get the ranks whose weights are those of rank 0, by shapes and sums."""
    sums = [_sum(weight.W_OI) for weight in weights]
    all_sums: list[Any] = [None] * processes()
    dist.all_gather_object(all_sums, sums)
    for rank, others in enumerate(all_sums):
        if [shape for shape, _ in others] != [shape for shape, _ in all_sums[0]]:
            raise WeightError(
                f"process {rank} adapts {len(others)} weights and process 0 adapts {len(all_sums[0])}, or their shapes "
                "differ. Attach the same adapter on every process, or set svd.share to false."
            )
    return [rank for rank, others in enumerate(all_sums) if others == all_sums[0]]


def _sum(W_OI: torch.Tensor) -> tuple[tuple[int, ...], str]:
    # As text, so that a sum that is not a number equals itself.
    return tuple(W_OI.shape), "" if W_OI.is_meta else float(W_OI.abs().sum(dtype=torch.float64)).hex()


def send(weight: Weight, spectrum: Spectrum | None, quality: Quality, request: Request, owner: int) -> Spectrum:
    """Get the spectrum of one weight from its owner."""
    rows_O, cols_I = weight.W_OI.shape
    places = requested_places(weight, request)
    home = torch.device("cpu") if weight.W_OI.is_meta else weight.W_OI.device
    road = torch.device("cuda", torch.cuda.current_device()) if "nccl" in dist.get_backend() else torch.device("cpu")
    shapes = ((rows_O, len(places)), (len(places),), (len(places), cols_I))
    own = (None, None, None) if spectrum is None else (spectrum.U_OR, spectrum.S_R, spectrum.Vh_RI)
    sent = []
    for shape, tensor in zip(shapes, own, strict=True):
        parcel = torch.empty(shape, dtype=request.dtype, device=road)
        if tensor is not None:
            parcel.copy_(tensor)
        dist.broadcast(parcel, src=owner)
        sent.append(parcel.to(home))
    return Spectrum(sent[0], sent[1], sent[2], places, quality, weight.name)
