"""`fill_cache`: the bases of a whole checkpoint, a few weights in memory at a time, each stored before the next."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from ..checkpoint import Checkpoint, Target
from ..errors import OptionError
from ..records import Weight
from .cache import BasisCache
from .columns import Choice, choose
from .engine import BLOCKS_IN_K, Request, batches, decompose_many, direct_solver
from .entry import Key
from .randomized import block_width

# Krylov blocks that room is made for on either side, doubled when a basis grows; flat spectra took 28 at r = 8.
BLOCKS_FORESEEN = 2 * 32
DOUBLE = torch.float64.itemsize


@dataclass(frozen=True)
class Done:
    """One weight that is now in the cache or, with a reason, is not."""

    name: str
    bytes_read: int
    cached: bool
    """It was in the cache before."""
    left_out: str = ""


def fill_cache(
    checkpoint: Checkpoint,
    targets: Sequence[Target],
    request: Request,
    cache: BasisCache,
    *,
    dtype: torch.dtype | None = None,
    max_memory: int | None = None,
) -> Iterator[Done]:
    """Store the bases of these weights, and yield each as it is done.

    Weights are read when their turn comes; equal shapes are solved together, as far as `max_memory` bytes allow
    (for weights and work, besides Python and torch themselves). `dtype` rounds them first, as loading the model in
    that dtype will. Cached ones are only checked, so an interrupted run continues where it stopped. Where the direct
    solvers would need more than `max_memory`, only block Krylov is tried, and a weight on which it does not converge
    is left out. `OptionError`, before any work, if a single weight needs more than that.
    """
    plans = [_plan(target, checkpoint, request, max_memory) for target in targets]
    if max_memory is not None:
        _refuse_too_large(targets, plans, max_memory)
    cache.claim()
    for places in batches([target.shape for target in targets], request.dtype):
        need, asked = plans[places[0]]
        count = len(places) if max_memory is None else max(1, min(len(places), max_memory // need))
        for start in range(0, len(places), count):
            part = [targets[place] for place in places[start : start + count]]
            yield from _fill(checkpoint, part, asked, cache, dtype)


def _plan(target: Target, checkpoint: Checkpoint, request: Request, limit: int | None) -> tuple[int, Request]:
    """Get (bytes that one weight of this kind needs at once, the request with the solver that needs no more)."""
    choice = choose(request.columns, request.rank, min(target.shape), request.seed)
    stored = checkpoint.dtypes[target.tensor].itemsize
    iterative = memory_of_krylov(target.shape, choice, request.dtype, stored)
    direct = memory_of_direct(target.shape, choice, request.dtype, stored)
    may_iterate = block_width(choice.leading, choice.K) * BLOCKS_IN_K <= choice.K
    if limit is not None and direct > limit and request.solver == "auto" and may_iterate:
        return iterative, replace(request, solver="randomized")
    return (iterative if request.solver == "randomized" else max(iterative, direct)), request


def memory_of_krylov(shape: tuple[int, int], choice: Choice, dtype: torch.dtype, stored: int) -> int:
    """Get the bytes for a weight as stored, as W and in a batch, and the rows of both Krylov bases."""
    (rows_O, cols_I), size = shape, dtype.itemsize
    rows = min(2 * choice.K, BLOCKS_FORESEEN * block_width(choice.leading, choice.K))
    return rows_O * cols_I * (stored + 2 * size) + rows * (rows_O + cols_I) * size


def memory_of_direct(shape: tuple[int, int], choice: Choice, dtype: torch.dtype, stored: int) -> int:
    """Get the bytes for a weight as stored and as W, and the work of its direct solver.

    gram: W in float64, W^T W, its copy and its eigenvectors; exact: both factors and the workspace of gesdd (4 K^2).
    """
    (rows_O, cols_I), K, size = shape, choice.K, dtype.itemsize
    work = (rows_O * cols_I + 3 * K * K) * DOUBLE
    if direct_solver(torch.empty(shape, dtype=dtype, device="meta"), choice) == "exact":
        work = (rows_O * K + K * cols_I + 4 * K * K) * size
    return rows_O * cols_I * (stored + size) + work


def _refuse_too_large(targets: Sequence[Target], plans: list[tuple[int, Request]], max_memory: int) -> None:
    too_large = [(need, target.name) for (need, _), target in zip(plans, targets, strict=True) if need > max_memory]
    if too_large:
        need, name = max(too_large)
        raise OptionError(
            f"{name}: decomposing this weight needs {need / 2**30:.2f} GiB, more than --max-memory "
            f"({max_memory / 2**30:.2f} GiB); {len(too_large)} of {len(targets)} weights are too large. Raise "
            "--max-memory, lower --r, or --exclude them."
        )


def _fill(
    checkpoint: Checkpoint, targets: list[Target], request: Request, cache: BasisCache, dtype: torch.dtype | None
) -> Iterator[Done]:
    """Read weights of one shape, solve those that the cache lacks, and store them."""
    keys, done = {}, []
    for target in targets:
        W_OI = target.matrix(checkpoint)
        size = W_OI.nbytes
        key = Key.of(Weight(target.name, W_OI if dtype is None else W_OI.to(dtype)))
        if cache.find(key, request) is None:
            keys[target.name] = (key, size)
        else:
            done.append(Done(target.name, size, cached=True))
    yield from done
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".* randomized did not converge")  # said in `left_out`
        spectra = decompose_many([key.turned_weight for key, _ in keys.values()], request)
    for (name, (key, size)), spectrum in zip(keys.items(), spectra, strict=True):
        cache.store(key, spectrum, request)
        reason = "" if spectrum.quality.converged else "block Krylov did not converge within --max-memory"
        yield Done(name, size, cached=False, left_out=reason)
