"""The one training loop: transformers' Trainer (or trl's) with rates by group and complete checkpoints.

A recipe provides its model, its rows and perhaps a loss; `Plan` says the rest. accelerate is underneath, so the
loop runs on one device, or with DDP, FSDP or DeepSpeed as `accelerate launch` sets it up.
"""

from __future__ import annotations

import os
import statistics
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainerCallback
from transformers.utils import logging

from ..adapter import bases_as_parameters, spectral_modules
from ..errors import OptionError
from .adalora import AllocateBudget
from .engines import refuse_deepspeed_options, refuse_fsdp_options, refuse_output_embedding
from .muon import MUON, SpectralMuon, muon_groups
from .saving import Saving
from .zero import load_whole_models

OnStep = Callable[[int, int, float], None]
"""Called with (step, steps, loss) after each optimizer step."""
Loss = Callable[[nn.Module, dict[str, torch.Tensor]], torch.Tensor]


@dataclass(frozen=True)
class Plan:
    """The loop's options beyond transformers' own arguments."""

    rates: Sequence[tuple[Sequence[nn.Parameter], float]]
    """Parameters with their peak learning rate: adapter (or model), head, other adapters; the rest is frozen."""
    loss: Loss | None = None
    """Replaces the loss that the model returns."""
    muon: float | None = None
    """Muon for the matrices of spectral adapters, and this rate, with AdamW, for what else they train."""
    ramp: float | None = None
    """For a range test: the first group's rate grows exponentially from this share of its peak up to the peak."""


class Loop(Saving):
    """What every run adds to a Trainer: rates by group, its own loss, complete checkpoints."""

    def __init__(self, *args: Any, plan: Plan, **kwargs: Any) -> None:
        self.plan = plan
        super().__init__(*args, **kwargs)
        self._place_bases()
        self.add_callback(AllocateBudget())  # type: ignore[attr-defined]
        for callback in list(self.callback_handler.callbacks):  # type: ignore[attr-defined]
            if type(callback).__name__ == "PrinterCallback":  # it prints every log line as a dict
                self.remove_callback(callback)  # type: ignore[attr-defined]

    def _place_bases(self) -> None:
        """Shard the frozen bases with the model under FSDP2, and keep DDP from sending them."""
        me: Any = self
        modules = [module for _, _, module in spectral_modules(me.model)]
        if self.plan.muon is not None and (me.is_fsdp_enabled or me.is_deepspeed_enabled):
            raise OptionError(
                f"training.optimizer={MUON}: FSDP and DeepSpeed cut matrices into parts, and a part cannot be "
                f"orthogonalised alone. Use DDP, or optimizer: adamw_torch."
            )
        if me.is_fsdp_enabled:
            refuse_fsdp_options(me.accelerator.state.fsdp_plugin)
            refuse_output_embedding(me.model)
            bases_as_parameters(me.model)
        if me.is_deepspeed_enabled:
            refuse_deepspeed_options(me.accelerator.state.deepspeed_plugin, me.model)
            load_whole_models()
        # DDP would send every buffer before every forward.
        tensors = {id(t) for module in modules for t in module.buffers()}
        names = [name for name, buffer in me.model.named_buffers() if id(buffer) in tensors]
        nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(me.model, names)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        me: Any = self
        if me.optimizer is None:
            decayed = set(me.get_decay_parameter_names(me.model))
            matrices = {id(p) for name, p in me.model.named_parameters() if name in decayed}
            if self.plan.muon is not None:
                rates, decay = self.plan.rates, me.args.weight_decay
                me.optimizer = SpectralMuon(muon_groups(me.model, rates, matrices, decay, self.plan.muon))
                return me.optimizer
            groups = []
            for parameters, rate in self.plan.rates:
                for decays in (True, False):
                    part = [p for p in parameters if (id(p) in matrices) == decays]
                    decay = me.args.weight_decay if decays else 0.0
                    groups += [{"params": part, "lr": rate, "weight_decay": decay}] if part else []
            kind, options = me.get_optimizer_cls_and_kwargs(me.args, me.model)
            me.optimizer = kind(groups, **options)
        return me.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        me: Any = self
        ramp = self.plan.ramp
        if ramp is None:
            return super().create_scheduler(num_training_steps, optimizer)  # type: ignore[misc]
        first = {id(p) for p in next(group for group, _ in self.plan.rates if group)}

        def grow(step: int) -> float:
            return ramp ** (1 - min(step / max(num_training_steps - 1, 1), 1.0))

        curves = [
            grow if any(id(p) in first for p in group["params"]) else (lambda step: 1.0)
            for group in me.optimizer.param_groups
        ]
        me.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(me.optimizer, curves)
        me._created_lr_scheduler = True
        return me.lr_scheduler

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        if self.plan.loss is None:
            return super().compute_loss(model, inputs, return_outputs=return_outputs, **kwargs)  # type: ignore[misc]
        loss = self.plan.loss(model, inputs)
        return (loss, {}) if return_outputs else loss

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write none: the run's report replaces trl's model card."""


@cache
def looped(base: type[Trainer]) -> type[Any]:
    """Get a Trainer class (transformers' or trl's) with this loop."""
    return type(f"Run{base.__name__}", (Loop, base), {})


class Watch(TrainerCallback):
    """Keeps the loss, the time and other logged figures of every step, and the validation losses with their steps."""

    def __init__(
        self, on_step: OnStep | None = None, curves: Iterable[str] = (), on_validation: OnStep | None = None
    ) -> None:
        self.on_step, self.on_validation = on_step, on_validation
        self.losses: list[float] = []
        self.curves: dict[str, list[float]] = {name: [] for name in curves}
        self.validation: list[tuple[int, float]] = []
        self.seconds: list[float] = []
        self._started = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for step, loss in self.validation:  # of the part before, where a run goes on
            self._validated(state, step, loss)

    def _validated(self, state: Any, step: int, loss: float) -> None:
        if self.on_validation is not None and state.is_world_process_zero:
            self.on_validation(step, state.max_steps, loss)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._started = _now()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seconds.append(_now() - self._started)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        if logs and "eval_loss" in logs:
            self.validation.append((state.global_step, float(logs["eval_loss"])))
            self._validated(state, *self.validation[-1])
        if logs and "loss" in logs:
            self.read(logs)
            if self.on_step is not None and state.is_world_process_zero:
                self.on_step(state.global_step, state.max_steps, self.losses[-1])

    def read(self, entry: dict[str, Any]) -> None:
        """Take the figures of one step's log; NaN for one that it lacks."""
        self.losses.append(float(entry["loss"]))
        for name, values in self.curves.items():
            values.append(float(entry.get(name, float("nan"))))

    @property
    def step_seconds(self) -> float | None:
        """The median time of a step without the first one, which warms up."""
        return statistics.median(self.seconds[1:] or self.seconds) if self.seconds else None


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def quiet_libraries() -> None:
    """Silence the progress bars and remarks of other libraries: a run has its own."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    # transformers' announcements about its next major release do not concern the user of a run.
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    try:
        import datasets
    except ImportError:
        return
    datasets.disable_progress_bars()
