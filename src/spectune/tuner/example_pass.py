"""`Pass`: examples go through a model as it is, and its layers report what they see."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, Protocol

import torch
from torch import nn

from ..adapter import in_eval_mode
from ..errors import OptionError
from ..spectrum import processes
from .progress import ticking

AnyBatch = Mapping[str, Any]
LossFunction = Callable[[nn.Module, Any], torch.Tensor]


class Seen(Protocol):
    """What one layer has seen."""

    tokens: int

    def add(self, x_NI: torch.Tensor, g_NO: torch.Tensor) -> None:
        """Add the inputs of one batch and the gradients of the loss with respect to the outputs."""

    def add_up(self) -> None:
        """Add what the other processes of a distributed run have seen."""


class Pass:
    """The batches, gone through as often as needed, with the layers reporting."""

    def __init__(
        self,
        model: nn.Module,
        batches: Iterable[AnyBatch],
        loss: LossFunction | None,
        name: str = "batches",
    ) -> None:
        self.model, self.batches, self.loss, self.name = model, batches, loss, name
        self.count = 0
        """Batches of one pass."""

    def refuse_single_use(self, reason: str) -> None:
        """Raise `OptionError` for batches that can be read only once."""
        if isinstance(self.batches, Iterator):
            raise OptionError(f"batches: {reason} reads them twice, and this iterator ends after once. Pass a list.")

    def through(self, seen: Mapping[str, Seen], layers: Mapping[str, nn.Module]) -> None:
        """Add what each layer sees of all batches, on all processes."""
        self.count = 0
        with _watched(self.model, layers, seen) as mask, ticking("{} batches of examples passed") as tick:
            for batch in self.batches:
                placed = {name: _on_device(value, self.model) for name, value in batch.items()}
                mask[:] = [placed.get("attention_mask")]
                _backward(self.model, placed, self.loss)
                self.count += 1
                tick("")
        if processes() > 1:
            for one in seen.values():
                one.add_up()
        self._refuse_unseen(seen)

    def _refuse_unseen(self, seen: Mapping[str, Seen]) -> None:
        unseen = [name for name, one in seen.items() if not one.tokens]
        if len(unseen) == len(seen):
            raise OptionError(
                f"{self.name}: there are none, or the loss does not depend on the layers. Pass some examples."
            )
        if unseen:
            raise OptionError(
                f"{unseen[0]}: this layer got no gradient of {self.name}. Exclude it, or pass examples that use it."
            )


@contextmanager
def _watched(
    model: nn.Module, layers: Mapping[str, nn.Module], seen: Mapping[str, Seen]
) -> Iterator[list[torch.Tensor | None]]:
    """Have the layers report while the block runs; the list that it gets holds the attention mask of the batch."""
    mask: list[torch.Tensor | None] = [None]
    trains = {parameter: parameter.requires_grad for parameter in model.parameters()}
    with ExitStack() as stack:
        for name, layer in layers.items():
            stack.callback(layer.register_forward_hook(_reporter(seen[name], mask), with_kwargs=True).remove)
        stack.enter_context(in_eval_mode(model))
        try:
            model.requires_grad_(False)  # no gradient of a weight is ever made by autograd
            yield mask
        finally:
            for parameter, value in trains.items():
                parameter.requires_grad_(value)


def _reporter(seen: Seen, mask: list[torch.Tensor | None]) -> Callable[..., Any]:
    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: torch.Tensor) -> torch.Tensor | None:
        if not torch.is_grad_enabled():  # the first pass of gradient checkpointing
            return None
        x, kept = (args[0] if args else next(iter(kwargs.values()))).detach(), mask[0]
        if not output.requires_grad:  # nothing before this layer asks for a gradient
            output.requires_grad_(True)

        def add(g: torch.Tensor) -> None:
            if kept is not None and x.shape[:-1] == kept.shape:
                seen.add(x[kept.bool()], g[kept.bool()])
            else:
                seen.add(x.reshape(-1, x.shape[-1]), g.reshape(-1, g.shape[-1]))

        output.register_hook(add)
        return output.clone()  # the model may write into what it gets: not into a leaf, and a view would lose its hook

    return hook


def _backward(model: nn.Module, batch: AnyBatch, loss: LossFunction | None) -> None:
    with torch.enable_grad():
        value = loss(model, batch) if loss is not None else getattr(model(**batch), "loss", None)
        if not isinstance(value, torch.Tensor):
            raise OptionError(
                f"{type(model).__name__} returned no loss. Put labels into the batches, or pass loss=(a function of "
                f"model and batch)."
            )
        value.backward()  # type: ignore[no-untyped-call]


def _on_device(value: Any, model: nn.Module) -> Any:
    return value.to(next(model.parameters()).device) if isinstance(value, torch.Tensor) else value


def sum_of_outputs(model: nn.Module, batch: AnyBatch) -> torch.Tensor:
    """Get a loss that depends on every layer, where only the layers' inputs are wanted."""
    found = model(**batch)
    if isinstance(found, torch.Tensor | tuple):
        values = found if isinstance(found, tuple) else (found,)
    else:
        values = tuple(vars(found).values())
    sums = [value.float().sum() for value in values if isinstance(value, torch.Tensor) and value.requires_grad]
    if not sums:
        raise OptionError(f"away_from: {type(model).__name__} returned no tensor that depends on its layers.")
    return torch.stack(sums).sum()
