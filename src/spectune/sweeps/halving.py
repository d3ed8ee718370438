"""`Halving`: stops hopeless learning rates while one is chosen, by asynchronous successive halving (ASHA).

Li et al., A System for Massively Parallel Hyperparameter Tuning (MLSys 2020), as Optuna's `SuccessiveHalvingPruner` has
it: rates are compared by their validation losses after a quarter and after half of the steps, and one goes on if it is
in the better half of those that got there so far, or the best of fewer than four. The first one there always goes on,
and, which is our own, so does one whose loss is within `MARGIN` of the best: it is not hopeless.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from threading import Lock
from typing import Any

from ..errors import MissingExtraError, OptionError
from .config import Cell, SweepConfig, cell
from .record import Stopped, SweepRecord

FACTOR = 2
"""Of so many rates one goes on, and the next look is after so many times the steps; the paper has 4, for hundreds of
settings. Chosen for grids of three to eight rates."""
FIRST = 4
"""The first look is after 1 / FIRST of the steps: before, it is mostly the warm-up that is compared. Chosen."""
MARGIN = 0.2
"""Chosen on three grids (docs/compare.md): without it, the rates that won at the end were stopped for losses 1% to 11%
above the best; the hopeless ones were at least 20% above it."""


class StoppedEarly(Exception):  # noqa: N818
    """Raised where a run tells its steps, with a `Stopped`: ends the run."""


@dataclass
class Trial:
    """One rate among those of its study: the validation losses of its run so far."""

    halving: Halving
    of: tuple[str, str]
    losses: dict[int, float] = field(default_factory=dict)
    asked: Any = None
    """Optuna's trial."""

    def told(self, step: int, steps: int, loss: float) -> None:
        """Take a validation loss; `StoppedEarly` if the rate is hopeless."""
        with self.halving.turn:
            stopped = None if step in self.losses else self._judged(step, steps, loss)
        if stopped is not None:
            raise StoppedEarly(stopped)

    def read(self, record: SweepRecord) -> None:
        """Take the losses of a run that is over, as they were told."""
        losses, steps = [], 0
        if record.result is not None:
            losses, steps = record.result.validation_losses, record.result.steps
        elif record.stopped is not None:
            losses, steps = record.stopped.validation_losses, record.stopped.steps
        with self.halving.turn:
            for step, loss in losses:
                if step not in self.losses:
                    self._judged(step, steps, loss)

    def _judged(self, step: int, steps: int, loss: float) -> Stopped | None:
        self.losses[step] = loss
        study = self.halving.study(self.of, steps)
        self.asked = self.asked or study.ask()
        self.asked.report(loss, step)
        if step >= steps or not self.asked.should_prune():
            return None
        there = [trial.intermediate_values[step] for trial in study.trials if step in trial.intermediate_values]
        best = min((value for value in there if value == value), default=loss)
        if loss <= best + MARGIN * abs(best):
            return None
        reason = f"validation loss {loss:.4g} at step {step} of {steps}; the best of {len(there)} rates had {best:.4g}"
        if self.halving.jobs > 1:
            reason += f"; {self.halving.jobs} runs worked at a time, so another timing may stop others"
        return Stopped(step=step, steps=steps, reason=reason, validation_losses=list(self.losses.items()))


class Halving:
    """The studies of a sweep: one for each method on each task."""

    def __init__(self, sweep: SweepConfig) -> None:
        """`OptionError` for a sweep where no run could stop, `MissingExtraError` without Optuna."""
        require_looks(sweep)
        try:
            import optuna
        except ImportError as error:
            raise MissingExtraError(
                f"stop: asha: cannot import optuna ({error}). Run: pip install 'spectune[optuna]'"
            ) from None
        self._optuna, self.jobs, self.turn = optuna, 1, Lock()
        self._studies: dict[tuple[str, str], Any] = {}

    def study(self, of: tuple[str, str], steps: int) -> Any:
        """Get the study of one method on one task."""
        if of not in self._studies:
            said = self._optuna.logging.get_verbosity()
            self._optuna.logging.set_verbosity(self._optuna.logging.WARNING)
            pruner = self._optuna.pruners.SuccessiveHalvingPruner(max(1, steps // FIRST), FACTOR)
            sampler = self._optuna.samplers.RandomSampler(0)  # nothing is drawn: the grid is given
            self._studies[of] = self._optuna.create_study(direction="minimize", pruner=pruner, sampler=sampler)
            self._optuna.logging.set_verbosity(said)
        return self._studies[of]

    def trial(self, of: Cell) -> Trial:
        """Get the place of a run among the other rates."""
        return Trial(self, (of.task, of.method))


def require_looks(sweep: SweepConfig) -> None:
    """Refuse `stop` where no run could stop: nothing is chosen, or no validation loss is measured in time."""
    if not sweep.chooses:
        raise OptionError("stop: asha stops rates while one is chosen, but every method has one rate. Leave it out.")
    for task in sweep.tasks:
        for name, method in sweep.methods.items():
            rates = method.rates(task)
            config = cell(sweep, task, name, rates[0], sweep.seeds[0]).config
            every, steps = config.training.validate_every, config.training.steps
            if len(rates) == 1 and not sweep.grow:
                continue
            if config.recipe == "reward":
                raise OptionError(
                    f"{task}, {name}: stop: asha needs validation losses, and rewards have none. Leave it out."
                )
            if every is None:
                raise OptionError(
                    f"{task}, {name}: stop: asha compares validation losses during training, and none is measured. Set "
                    f"training.validate_every, such as {max(1, (steps or 400) // FIRST)} steps."
                )
            if steps is not None and every >= steps:
                raise OptionError(
                    f"{task}, {name}: stop: asha: training.validate_every={every} measures nothing before the end of "
                    f"{steps} steps. Set {max(1, steps // FIRST)}."
                )
