"""`prepare`: compute directions from examples, in one pass before an adapter is attached."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, _maybe_include_all_linear_layers
from torch import nn

from ..adapter import in_eval_mode
from ..adapter.saved import LayerRanks
from ..errors import OptionError, WeightError
from ..records import Weight
from ..spectrum import DataSpectra, Moments, processes
from .base_weight import backend_of, layout_of
from .bases import plain_weight
from .config import SpectralConfig
from .from_file import chosen_layers
from .model import SpectralTuner

AnyBatch = Mapping[str, Any]
LossFunction = Callable[[nn.Module, Any], torch.Tensor]


def prepare(
    model: nn.Module,
    config: SpectralConfig,
    batches: Iterable[AnyBatch],
    *,
    loss: LossFunction | None = None,
    on_batch: Callable[[int], Any] | None = None,
) -> SpectralConfig:
    """Get a copy of the config that holds the directions which these examples choose, ready for `get_peft_model`.

        config = SpectralConfig(method="svft", pattern="banded", basis_rank=64, directions="gradient")
        config = spectune.prepare(model, config, batches)      # about 16 batches of 32 training examples
        model = get_peft_model(model, config)

    One forward and backward pass a batch, in eval mode, through the model as it is: fit a new head first, since the
    gradients of a random one say nothing. What is kept of it are two matrices a layer, whatever the number of batches:
    O x O and I x I, or sketches of 2 R + 16 columns where a side is over 1,024. No weight is changed, and quantised
    weights stay quantised. In a distributed run each process brings its own batches and all get the same directions.

    `batches` hold keyword arguments of the model, with labels; `loss(model, batch)` is for models that do not return
    one. `on_batch` is called with the number of batches seen. `config.directions` says what is collected:

    - gradient: left singular vectors from sum_k G_k G_k^T, right from sum_k G_k^T G_k, G_k the gradient of the loss of
      batch k with respect to the weight (the factors of Shampoo, Gupta et al., arXiv 1802.09568).
    - gradient_mean: the SVD of mean_k G_k (LoRA-GA, arXiv 2407.05000; LoRA-SB, arXiv 2411.19557).
    - activation: right from sum x x^T over input tokens x, uncentred; left from sum g g^T, g the gradient with respect
      to the output of a token (the factors of KFAC, Martens & Grosse, arXiv 1503.05671).
    - weight_x_activation: the best approximation of W x over the inputs: U from the SVD of W C^(1/2), C = sum x x^T,
      then the SVD of U^T W (CorDA, arXiv 2406.05223).

    Raises `OptionError` for directions="weight", no batches, a model without a loss, and layers that are not linear or
    that no batch went through.
    """
    if config.directions == "weight":
        raise OptionError(
            "directions='weight' needs no examples. Name directions of data, or attach the adapter at once."
        )
    layers = _layers(model, config)
    ranks = LayerRanks(config.rank_pattern)
    moments = {name: _moments(name, layer, config, ranks.of(name)) for name, layer in layers.items()}
    count = 0
    with _watched(model, layers, moments) as mask:
        for count, batch in enumerate(batches, 1):
            placed = {name: _on_device(value, model) for name, value in batch.items()}
            mask[:] = [placed.get("attention_mask")]
            _backward(model, placed, loss)
            if on_batch is not None:
                on_batch(count)
    if processes() > 1:
        for seen in moments.values():
            seen.add_up()
    _refuse_unseen(moments)
    spectra = {name: seen.spectrum(Weight(name, _matrix(layers[name], name))) for name, seen in moments.items()}
    prepared = copy.copy(config)
    prepared.spectra = DataSpectra(config.directions, spectra, count)
    return prepared


def _layers(model: nn.Module, config: SpectralConfig) -> dict[str, Any]:
    """Get path -> the base's own layer, for each layer that the config targets."""
    tuner = SpectralTuner.__new__(SpectralTuner)
    complete = tuner._prepare_adapter_config(copy.copy(config), SpectralTuner.get_model_config(model))
    complete = _maybe_include_all_linear_layers(complete, model)
    found: dict[str, Any] = {}
    for path in sorted(chosen_layers(complete, model)):
        module: Any = model.get_submodule(path)
        layer = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
        if layout_of(layer, path, backend_of(layer)).kind != "linear":
            raise OptionError(
                f"{path}: directions={config.directions!r} work only for linear layers, and this is a "
                f"{type(layer).__name__}. Remove it from target_modules."
            )
        found[path] = layer
    if not found:
        raise OptionError(f"target_modules={config.target_modules!r}: no module of {type(model).__name__} matches.")
    return found


def _moments(name: str, layer: Any, config: SpectralConfig, r: int | None) -> Moments:
    W_OI = _matrix(layer, name)
    shape = (W_OI.shape[0], W_OI.shape[1])
    rank, _ = config.method_for(name, r, *shape).basis(*shape)
    return Moments(config.directions, name, shape, rank, W_OI.device)


def _matrix(layer: Any, name: str) -> torch.Tensor:
    backend = backend_of(layer)
    layout = layout_of(layer, name, backend)
    stored = plain_weight(layer, layout.attribute, name) if backend is None else backend.get_base_weight(layer)
    if stored.is_meta:
        raise WeightError(f"{name}: the base weight is on the meta device. Load the base model with its weights first.")
    return layout.to_matrix(stored.detach())


@contextmanager
def _watched(
    model: nn.Module, layers: Mapping[str, nn.Module], moments: Mapping[str, Moments]
) -> Iterator[list[torch.Tensor | None]]:
    """Have the layers report while the block runs; the list that it gets holds the attention mask of the batch."""
    mask: list[torch.Tensor | None] = [None]
    trains = {parameter: parameter.requires_grad for parameter in model.parameters()}
    with ExitStack() as stack:
        for name, layer in layers.items():
            stack.callback(layer.register_forward_hook(_reporter(moments[name], mask), with_kwargs=True).remove)
        stack.enter_context(in_eval_mode(model))
        try:
            model.requires_grad_(False)  # no gradient of a weight is ever made by autograd
            yield mask
        finally:
            for parameter, value in trains.items():
                parameter.requires_grad_(value)


def _reporter(seen: Moments, mask: list[torch.Tensor | None]) -> Callable[..., Any]:
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


def _refuse_unseen(moments: Mapping[str, Moments]) -> None:
    unseen = [name for name, seen in moments.items() if not seen.tokens]
    if len(unseen) == len(moments):
        raise OptionError("batches: there are none, or the loss does not depend on the layers. Pass some examples.")
    if unseen:
        raise OptionError(f"{unseen[0]}: this layer got no gradient. Exclude it, or pass examples that use it.")
