"""`tuned_weights`: how much each adapter counts in a merge, found by what the tasks keep of their validation scores."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import OptionError
from .company import Kept

if TYPE_CHECKING:
    from ..fusion import Fused

# A task that keeps 7% less than the others counts twice as much in the next round. Chosen on one merge of five tasks.
POWER = 10.0


@dataclass(frozen=True)
class Tried:
    """One merge: the weights, and what each task keeps of its validation score."""

    weights: tuple[float, ...]
    shares: tuple[float, ...]

    @property
    def mean(self) -> float:
        """The mean share, in which more than the adapter's own score does not count."""
        return sum(min(share, 1.0) for share in self.shares) / len(self.shares)


def tuned_weights(
    runs: Sequence[str | Path],
    merge: Callable[[list[float] | None], Fused],
    rounds: int,
    on_round: Callable[[Tried], object] = lambda tried: None,
) -> tuple[Fused, list[Tried]]:
    """Get the merge that keeps most of the tasks' validation scores, and every merge that was tried.

    w_i <- w_i (mean share / share_i)^10, scaled back to the first sum; `rounds` merges in all. `runs` are those of the
    adapters, in their order; `merge` makes a merge by weights, None for the rule's own. The test examples are not
    looked at. Our own. `OptionError` for fewer than two rounds, `DataError` for a run without validation examples.
    """
    if rounds < 2:
        raise OptionError(f"tune={rounds}: the first merge has the given weights, so at least 2 are needed.")
    tasks = [Kept.of(run, "validation") for run in runs]
    weights, tried, best = None, list[Tried](), None
    for _ in range(rounds):
        fused = merge(weights)
        with tempfile.TemporaryDirectory() as folder:
            fused.save(Path(folder) / "merged", as_lora=True)
            shares = [task.measure(str(len(tried)), Path(folder) / "merged") for task in tasks]
        tried.append(Tried(tuple(fused.report.weights), tuple(shares)))
        on_round(tried[-1])
        if best is None or tried[-1].mean > max(one.mean for one in tried[:-1]):
            best = fused
        weights = _next(tried[-1])
    assert best is not None
    return best, tried


def _next(tried: Tried) -> list[float]:
    kept = [max(min(share, 1.0), 0.1) for share in tried.shares]  # one task that fails must not drown the others
    mean = sum(kept) / len(kept)
    raised = [weight * (mean / share) ** POWER for weight, share in zip(tried.weights, kept, strict=True)]
    return [weight * sum(tried.weights) / sum(raised) for weight in raised]
