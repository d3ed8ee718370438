"""Runs in company: what each task keeps of its score after a merge."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from ..errors import AdapterError, DataError
from ..recipes.metrics import better_is_smaller
from ..recipes.recipe import Recipe
from ..tuner import load_attached
from .folder import Run
from .load import load_run

UNTOUCHED = "untouched body"


def load_with(run: str | Path, adapter: str | Path | None) -> tuple[Recipe, nn.Module]:
    """Get a run's recipe and its base with the run's own head and another adapter (None: without any)."""
    recipe, loaded = load_run(run)
    tuned: Any = loaded
    if not hasattr(tuned, "unload"):
        raise AdapterError(
            f"{run}: this run did not train one adapter, so no merge can be measured on it. Leave it out."
        )
    body: nn.Module = tuned.unload()
    return recipe, (body if adapter is None else load_attached(body, adapter)).eval()


@dataclass(frozen=True)
class Kept:
    """What one run's task scores: with the run's own adapter, on the untouched body, and after each merge."""

    run: Path
    metric: str
    split: str
    own: float
    after: dict[str, float] = field(default_factory=dict)
    """Merge -> figure."""

    @classmethod
    def of(cls, run: str | Path, only: str | None = None) -> Kept:
        """Get the task with the first metric that the run recorded: on the split `only`, else test, else validation."""
        recorded = Run.open(run).result.metrics
        wanted = ("test", "validation") if only is None else (only,)
        split = next((split for split in wanted if split in recorded), None)
        if split is None:
            raise DataError(f"{run}: the run has no {only or 'held-out'} examples to measure a merge on. Leave it out.")
        metric, own = next(iter(recorded[split].items()))
        found = cls(Path(run), metric, split, own)
        found.measure(UNTOUCHED, None)
        return found

    def measure(self, merge: str, adapter: str | Path | None) -> float:
        """Measure the task after a merge, and get the share that is kept."""
        recipe, model = load_with(self.run, adapter)
        self.after[merge] = recipe.evaluate(model, self.split)[self.metric]
        return self.share(merge)

    def share(self, merge: str) -> float:
        """Get what is left of the run's own figure; of a loss, own by merged."""
        parts = self.after[merge], self.own
        over, under = reversed(parts) if better_is_smaller(self.metric) else parts
        return over / under if under else 0.0
