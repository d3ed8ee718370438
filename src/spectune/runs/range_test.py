"""`range_test`: the loss while the learning rate grows, and the rate that it proposes."""

from __future__ import annotations

import math
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from ..errors import OptionError
from ..recipes.recipe import Recipe
from ..recipes.table import recipe_class
from ..training.config import HEAD, RunConfig
from ..training.loop import OnStep, Watch, quiet_libraries
from ..training.rates import learning_rate, tuned_by, within_known
from .building import build

STEPS = 100
# The ramp reaches this far below and above the run's rate: two powers of ten. Chosen.
REACH = 100.0
# The weight of the past in the running mean. fastai has 0.98, too slow for a hundred steps. Chosen.
KEEP = 0.9
# fastai's rule: a smoothed loss of four times the best has diverged. Losses that start near their best never reach
# it, so rising above the start by as much as was gained counts, too. Chosen.
DIVERGED = 4.0
# The first tenth of the ramp is noise.
SKIP = 0.1
# A loss that falls by less than this share has not moved. Chosen.
MOVED = 0.01


@dataclass(frozen=True)
class RangeTest:
    """Smith (arXiv 1506.01186), section 3.3, with an exponential ramp as in fastai's lr_find."""

    method: str
    rates: list[float]
    losses: list[float]
    smoothed: list[float]
    steepest: float | None
    """The rate at which the smoothed loss falls fastest per power of ten; None if it never falls."""
    diverged: float | None
    """The rate at which it diverged; None if it did not."""
    found: float | None
    """The lower of the steepest rate and a tenth of the diverged one; None if the loss did not move."""
    proposed: float | None
    """The one found, or the nearest rate that is known to work for the method: a hundred steps say little of a run."""
    current: float
    """The run's own rate."""


def range_test(
    config: RunConfig,
    *,
    low: float | None = None,
    high: float | None = None,
    steps: int = STEPS,
    on_step: OnStep | None = None,
) -> RangeTest:
    """Train with an exponential ramp of the adapter's rate, stop when the loss diverges, and propose a rate.

    A new head keeps its own rate. Nothing is saved. From one noisy run, the proposal is good to a factor of about
    three; a sweep on validation data is more reliable.
    """
    current = learning_rate(config)
    low, high = current / REACH if low is None else low, current * REACH if high is None else high
    if not 0 < low < high or steps < 10:
        raise OptionError(f"lr: {steps} steps from {low:g} to {high:g}: give at least 10 steps, and low below high.")
    quiet_libraries()
    rate = "head_learning_rate" if config.adapter == HEAD else "learning_rate"
    training = config.training.model_copy(
        update={"steps": steps, "epochs": None, "validate_every": None, "report_to": [], rate: high}
    )
    recipe: Recipe = recipe_class(config.recipe)(config.model_copy(update={"training": training}))
    model, plan = build(recipe)
    watch, stop = Watch(on_step), _StopAtDivergence()
    with tempfile.TemporaryDirectory() as folder:
        ramp = replace(plan, ramp=low / high)
        trainer = recipe.trainer(model, ramp, Path(folder), [watch, stop], save_strategy="no")
        trainer.train()
    rates = [low * (high / low) ** (step / (steps - 1)) for step in range(len(watch.losses))]
    return read_ramp(tuned_by(config), rates, watch.losses, current)


def read_ramp(method: str, rates: list[float], losses: list[float], current: float) -> RangeTest:
    """Get the proposal from the losses of a ramp."""
    smoothed = running_mean(losses)
    place = divergence(smoothed)
    end = len(smoothed) if place is None else place
    steepest = _steepest(rates[:end], smoothed[:end])
    diverged = None if place is None else rates[place]
    both = [rate for rate in (steepest, None if diverged is None else diverged / 10) if rate is not None]
    found = min(both) if both else None
    return RangeTest(method, rates, losses, smoothed, steepest, diverged, found, within_known(method, found), current)


def running_mean(losses: list[float]) -> list[float]:
    """Get the exponential running mean of the losses, corrected for the short past of the first ones."""
    total, means = 0.0, []
    for step, loss in enumerate(losses, 1):
        total = KEEP * total + (1 - KEEP) * loss
        means.append(total / (1 - KEEP**step))
    return means


def divergence(smoothed: list[float]) -> int | None:
    """Get the first index where a smoothed loss has diverged, or None."""
    best = math.inf
    for place, loss in enumerate(smoothed):
        best = min(best, loss) if math.isfinite(loss) else best
        start = smoothed[0]
        climbed = place > SKIP * len(smoothed) and best < start and loss > start + (start - best)
        if not math.isfinite(loss) or (best > 0 and loss > DIVERGED * best) or climbed:
            return place
    return None


def _steepest(rates: list[float], smoothed: list[float]) -> float | None:
    if not smoothed or smoothed[0] - min(smoothed) < MOVED * abs(smoothed[0]):
        return None
    first = max(1, int(SKIP * len(smoothed)))
    # Over a few steps on each side, since between neighbours the slope is mostly noise.
    reach = max(1, len(smoothed) // 20)
    best, found = 0.0, None
    for i in range(first, len(smoothed)):
        a, b = max(0, i - reach), min(len(smoothed) - 1, i + reach)
        if b > a and rates[b] > rates[a]:
            slope = (smoothed[b] - smoothed[a]) / math.log10(rates[b] / rates[a])
            if slope < best:
                best, found = slope, rates[i]
    return found


class _StopAtDivergence(TrainerCallback):
    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        if logs and "loss" in logs:
            self.losses.append(float(logs["loss"]))
            if divergence(running_mean(self.losses)) is not None:
                control.should_training_stop = True
