"""A run that diverges is stopped at the step where it is seen, and nothing of that step is saved."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from transformers import TrainerCallback

from .config import RunConfig
from .processes import anywhere
from .rates import KNOWN, head_learning_rate, learning_rate, method_of


class StopAtDivergence(TrainerCallback):
    """Ends the loop at the first loss that is NaN or infinite, or trained number where a checkpoint would hold it.

    A step whose gradient overflows leaves a finite loss behind it and numbers that are not: they are looked at whenever
    they would be saved, and the last step is always saved.
    """

    def __init__(self, trained: Sequence[torch.Tensor]) -> None:
        self.trained, self.found = list(trained), ""
        self.step = 0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if control.should_save and anywhere(not all_finite(self.trained)):
            self._stop(f"trained numbers are NaN or infinite after step {state.global_step}", state, control)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        if logs and not math.isfinite(loss := float(logs.get("loss", 0.0))):
            self._stop(
                f"the loss is {'NaN' if math.isnan(loss) else 'infinite'} at step {state.global_step}", state, control
            )

    def _stop(self, what: str, state: Any, control: Any) -> None:
        if not self.found:
            self.found, self.step = f"{what} of {state.max_steps}", state.global_step
        control.should_save = control.should_evaluate = False
        control.should_training_stop = True


def all_finite(tensors: Sequence[torch.Tensor]) -> bool:
    """Ask whether every number is finite, under ZeRO-3 of this process's part."""
    parts = (getattr(tensor, "ds_tensor", tensor).detach() for tensor in tensors)
    return all(bool(torch.isfinite(part).all()) for part in parts)


def remedies(config: RunConfig, step: int) -> str:
    """Get what to try after a divergence: one sentence."""
    half = "float16" in (config.training.precision, config.dtype)
    if step <= 1:
        first = "It was so before anything was learned, so the rate is not the cause: look at the examples and the base"
        return first + (", or try bfloat16 or float32 in place of float16." if half else ".")
    head = config.adapter == "head"
    rate = head_learning_rate(config) if head else learning_rate(config)
    key = "head_learning_rate" if head else "learning_rate"
    known = KNOWN.get(method_of(config))
    usual = "" if known is None else f" ({known.low:g} to {known.high:g} is known to work for {method_of(config)})"
    other = ", or bfloat16 in place of float16" if half else ""
    return (
        f"Try a lower rate, as training.{key}={rate / 10:g} with --overwrite{usual}{other}; `spectune lr` proposes one."
    )
