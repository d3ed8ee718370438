"""`obtain`: the spectra of many weights, from the cache if it has them, split between processes if several run."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ..records import Spectrum, Weight
from .cache import BasisCache
from .distributed import processes, share_out
from .engine import Request, batches, decompose_many
from .entry import Key


def obtain(
    weights: Sequence[Weight],
    request: Request,
    cache: BasisCache | None = None,
    *,
    share: bool = False,
    on_done: Callable[[Weight], None] | None = None,
) -> list[Spectrum]:
    """Get the spectra of many weights, in their order.

    Cached ones are read and checked; the rest is computed, equal shapes together, and stored if the cache
    may be written. With `share`, under torch.distributed, each weight is computed by one process and sent to all:
    every process must make this call, with the same weights in the same order. Raises what `decompose` raises.
    """

    def here(part: Sequence[Weight]) -> list[Spectrum]:
        return _obtain_here(part, request, cache, on_done)

    return share_out(weights, request, here) if share and processes() > 1 else here(weights)


def _obtain_here(
    weights: Sequence[Weight], request: Request, cache: BasisCache | None, on_done: Callable[[Weight], None] | None
) -> list[Spectrum]:
    if cache is None:
        return decompose_many(weights, request, on_done)
    cache.claim()  # before the work, which would be lost
    spectra: dict[int, Spectrum] = {}
    # Batch by batch, so that what a long run has solved is on the disk before it goes on.
    for places in batches([tuple(weight.W_OI.shape) for weight in weights], request.dtype):
        keys = {place: Key.of(weights[place]) for place in places}
        found = {place: cache.find(key, request) for place, key in keys.items()}
        missing = [place for place in places if found[place] is None]
        solved = decompose_many([weights[place] for place in missing], request)
        for place, spectrum in zip(missing, solved, strict=True):
            cache.store(keys[place], spectrum, request)
            found[place] = spectrum
        spectra |= {place: spectrum for place, spectrum in found.items() if spectrum is not None}
        for place in places if on_done else ():
            on_done(weights[place])  # type: ignore[misc]
    return [spectra[place] for place in range(len(weights))]
