"""`estimate_seconds`: the time to compute the bases of a model on this machine, from a few timed weights."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence

import torch

from ..checkpoint import Checkpoint
from ..checkpoint.targets import Target
from ..methods import Method
from ..records import Weight
from ..spectrum import decompose
from .budget import fitted
from .figures import median

# How many kinds of work (a shape with a rank) are timed, the most costly first; the rest is scaled. Chosen.
PROBES = 3
# A direct solver's time depends only on the shape, so larger weights are timed on a corner of this side. Chosen.
CORNER = 1024
# `decompose` iterates where this many times R fit into K (spectrum/engine.py takes its blocks, a little wider).
ITERATES_BELOW = 24

Job = tuple[int, int, int]
"""(O, I, R)"""


class DecompositionClock:
    """Times `decompose` on weights of one model; each timing is reused for every method."""

    def __init__(self, base: Checkpoint, targets: Sequence[Target], seconds: Callable[[], float] = time.perf_counter):
        self._base, self._targets, self._seconds = base, targets, seconds
        self._known: dict[Job, float] = {}

    def estimate(self, method: Method) -> float:
        """Get the estimated seconds to compute the bases of all weights for one method, one after the other.

        The most expensive kinds of work are timed, once each; the others are `work` times the median seconds per work
        of the timed ones. 0 if a method needs no basis.
        """
        jobs = jobs_of(method, self._targets)
        by_cost = sorted(jobs, key=lambda job: work(job) * jobs[job], reverse=True)
        timed = {job: self._time(job) for job in by_cost[:PROBES]}
        return scaled(jobs, timed)

    def _time(self, job: Job) -> float:
        if job not in self._known:
            target = next(target for target in self._targets if target.shape == job[:2])
            W_OI = target.matrix(self._base)
            self._known[job] = self._measure(W_OI, job) if iterates(job) else self._corner(W_OI, job)
        return self._known[job]

    def _corner(self, W_OI: torch.Tensor, job: Job) -> float:
        """Time a direct solver on a corner of the same aspect, and scale by the work."""
        shrink = min(1.0, CORNER / min(job[:2]))
        O, I = (max(1, round(side * shrink)) for side in job[:2])
        part = (O, I, min(job[2], O, I))
        return self._measure(W_OI[:O, :I], part) * work(job) / work(part)

    def _measure(self, W_OI: torch.Tensor, job: Job) -> float:
        W_OI = W_OI.float().contiguous()
        start = self._seconds()
        decompose(Weight("timed weight", W_OI), job[2])
        return self._seconds() - start


def jobs_of(method: Method, targets: Sequence[Target]) -> Counter[Job]:
    """Get which decompositions a method needs, and how many of each."""
    found: Counter[Job] = Counter()
    for (O, I), count in Counter(target.shape for target in targets).items():
        here = fitted(method, (O, I))
        if here is not None and (R := here.basis(O, I)[0]):
            found[O, I, R] += count
    return found


def iterates(job: Job) -> bool:
    """Ask whether `decompose` will iterate instead of solving directly."""
    O, I, R = job
    return min(O, I) >= R * ITERATES_BELOW


def work(job: Job) -> float:
    """Get the work of a decomposition, up to a constant: O I R where it iterates, O I K for a direct solver."""
    O, I, R = job
    return float(O * I * (R if iterates(job) else min(O, I)))


def scaled(jobs: Counter[Job], timed: dict[Job, float]) -> float:
    """Get the seconds of all jobs: the timed ones as timed, the others by the timed ones' median speed."""
    if not jobs:
        return 0.0
    rate = median([seconds / work(job) for job, seconds in timed.items()])
    return sum(count * timed.get(job, rate * work(job)) for job, count in jobs.items())
