"""`prepare`: compute directions from examples, in one pass before an adapter is attached."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, _maybe_include_all_linear_layers
from torch import nn

from ..adapter import in_eval_mode
from ..adapter.saved import LayerRanks
from ..errors import OptionError, WeightError
from ..methods import Method
from ..records import Spectrum, Weight
from ..spectrum import DataSpectra, Moments, is_first, processes
from .base_weight import backend_of, keep_unpacked, layout_of
from .bases import find_bases, find_basis, plain_weight
from .budget import refuse_given_sizes, within_budget
from .config import SpectralConfig
from .from_file import chosen_layers
from .full_precision import bases_of_quantised
from .model import SpectralTuner
from .number_scores import NumberScores
from .progress import ticking
from .usual_layers import choose_usual_layers

AnyBatch = Mapping[str, Any]
LossFunction = Callable[[nn.Module, Any], torch.Tensor]


def prepare(
    model: nn.Module,
    config: SpectralConfig,
    batches: Iterable[AnyBatch],
    *,
    loss: LossFunction | None = None,
    save: str | Path | None = None,
) -> SpectralConfig:
    """Get a copy of the config that holds the directions which these examples choose, ready for `get_peft_model`.

        config = SpectralConfig(method="svft", pattern="banded", basis_rank=64, directions="gradient")
        config = spectune.prepare(model, config, batches)      # about 16 batches of 16 training examples
        model = get_peft_model(model, config)

    One forward and backward pass a batch, in eval mode, through the model as it is: fit a new head first, since the
    gradients of a random one say nothing. What is kept of it are two matrices a layer, whatever the number of batches:
    O x O and I x I, or sketches of 2 R + 16 columns where a side is over 1,024. No weight is changed, and quantised
    weights stay quantised. In a distributed run each process brings its own batches and all get the same directions.

    svft `pattern="chosen"` also takes its places from the examples, whatever the directions are: those where the mean
    square of U^T G_k V is largest. `budget` shares trained numbers out over the layers by the gradients of these
    numbers, and says in a table (on stderr) what each kind of layer got. With directions of data both take a second
    pass, so `batches` must then be a list.

    `batches` hold keyword arguments of the model, with labels; `loss(model, batch)` is for models that do not return
    one. `save` is a folder, or a .safetensors file: the directions become a basis file of their own there, and the
    adapter's file will not hold them. `config.directions` says what is collected:

    - gradient: left singular vectors from sum_k G_k G_k^T, right from sum_k G_k^T G_k, G_k the gradient of the loss of
      batch k with respect to the weight (the factors of Shampoo, Gupta et al., arXiv 1802.09568).
    - gradient_mean: the SVD of mean_k G_k (LoRA-GA, arXiv 2407.05000; LoRA-SB, arXiv 2411.19557).
    - activation: right from sum x x^T over input tokens x, uncentred; left from sum g g^T, g the gradient with respect
      to the output of a token (the factors of KFAC, Martens & Grosse, arXiv 1503.05671).
    - weight_x_activation: the best approximation of W x over the inputs: U from the SVD of W C^(1/2), C = sum x x^T,
      then the SVD of U^T W (CorDA, arXiv 2406.05223).

    Raises `OptionError` for a config that needs no examples, no batches, a model without a loss, and layers that are
    not linear or that no batch went through.
    """
    _refuse(config, save)
    keep_unpacked(model)
    layers, examples = layers_of(model, config), _Pass(model, config, batches, loss)
    prepared, spectra = copy.copy(config), _directions(examples, layers)
    if _is_scored(config):
        prepared, spectra = _scored(examples, layers, spectra)
    if config.directions == "weight" and not config.build_method().needs_examples():
        spectra = {}  # found again when the adapter is attached, as when it is loaded
    prepared.spectra = DataSpectra(config.directions, spectra, examples.count)
    if save is not None:
        prepared.basis_id = prepared.spectra.identity
        if is_first():
            prepared.spectra.save(save)
    return prepared


def _refuse(config: SpectralConfig, save: str | Path | None) -> None:
    if config.basis is not None:
        raise OptionError(f"basis={config.basis!r} holds directions already. Leave it out, or attach at once.")
    if not config.needs_examples:
        raise OptionError(
            "directions='weight' needs no examples. Name directions of data, or attach the adapter at once."
        )
    if config.budget is not None:
        refuse_given_sizes(config)
    if _is_scored(config) and save is not None:
        raise OptionError(f"save={str(save)!r}: {config.needs_examples} belongs to one adapter. Leave save out.")


def _is_scored(config: SpectralConfig) -> bool:
    """Ask whether examples also say which numbers train."""
    return config.budget is not None or config.build_method().needs_examples()


def _directions(examples: _Pass, layers: Mapping[str, Any]) -> dict[str, Spectrum]:
    """Get layer -> the directions that the config asks for: the weight's own, or by a pass."""
    config = examples.config
    if config.directions == "weight":
        return _bases_of_weights(examples.model, layers, config)
    if _is_scored(config):
        asks = f"budget={config.budget}" if config.budget is not None else f"pattern={config.pattern!r}"
        examples.refuse_single_use(f"{asks} with directions={config.directions!r}")
    moments = {name: Moments(config.directions, name, *seen) for name, seen in wanted(layers, config).items()}
    examples.through(moments, layers)
    return {name: seen.spectrum(Weight(name, _matrix(layers[name], name))) for name, seen in moments.items()}


def _scored(
    examples: _Pass, layers: Mapping[str, Any], spectra: dict[str, Spectrum]
) -> tuple[SpectralConfig, dict[str, Spectrum]]:
    """Get the config with each layer's size, and the directions with the places, that a pass chooses."""
    config, ranks = copy.copy(examples.config), LayerRanks(examples.config.rank_pattern)
    methods = {name: config.method_for(name, ranks.of(name), *basis.shape[:2]) for name, basis in spectra.items()}
    scores = {name: NumberScores(config.budget_by, methods[name].candidates(), one) for name, one in spectra.items()}
    examples.through(scores, layers)
    totals = {name: seen.totals() for name, seen in scores.items()}
    if config.budget is not None:
        config, methods = within_budget(config, methods, spectra, totals)
    chosen = {name: methods[name].chosen(basis, totals[name]) for name, basis in spectra.items()}
    return config, {name: _leading(basis, methods[name]) for name, basis in chosen.items()}


def _leading(basis: Spectrum, method: Method) -> Spectrum:
    """Get the directions of a basis that a method of a smaller size works in."""
    R, _ = method.basis(*basis.shape[:2])
    if basis.shape[2] == R:
        return basis
    U_OR, S_R, Vh_RI = basis.U_OR[:, :R].contiguous(), basis.S_R[:R].clone(), basis.Vh_RI[:R].clone()
    return replace(basis, U_OR=U_OR, S_R=S_R, Vh_RI=Vh_RI, columns=basis.columns[:R])


class _Pass:
    """The batches, gone through as often as needed, with the layers reporting."""

    def __init__(
        self,
        model: nn.Module,
        config: SpectralConfig,
        batches: Iterable[AnyBatch],
        loss: LossFunction | None,
    ) -> None:
        self.model, self.config, self.batches, self.loss = model, config, batches, loss
        self.count = 0
        """Batches of one pass."""

    def refuse_single_use(self, reason: str) -> None:
        """Raise `OptionError` for batches that can be read only once."""
        if isinstance(self.batches, Iterator):
            raise OptionError(f"batches: {reason} reads them twice, and this iterator ends after once. Pass a list.")

    def through(
        self, seen: Mapping[str, Moments] | Mapping[str, NumberScores], layers: Mapping[str, nn.Module]
    ) -> None:
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
        _refuse_unseen(seen)


def _bases_of_weights(model: nn.Module, layers: Mapping[str, Any], config: SpectralConfig) -> dict[str, Spectrum]:
    """Get the weights' own directions, the very ones that the adapter finds when it is attached."""
    plain, ranks = copy.copy(config), LayerRanks(config.rank_pattern)
    plain.spectra = None
    with ticking("decomposed {} weights") as tick:
        weights = (Weight(name, _matrix(layer, name)) for name, layer in layers.items() if backend_of(layer) is None)
        found = find_bases(weights, plain, ranks, tick)
        found |= bases_of_quantised(model, layers.__contains__, plain, ranks, tick)
    for name in layers.keys() - found.keys():  # dequantised, one at a time
        W_OI = _matrix(layers[name], name)
        found[name] = find_basis(name, W_OI, config.method_for(name, ranks.of(name), *W_OI.shape), plain)
    return {name: found[name] for name in layers}


def layers_of(model: nn.Module, config: SpectralConfig) -> dict[str, Any]:
    """Get path -> the base's own layer, for each layer that the config targets."""
    tuner = SpectralTuner.__new__(SpectralTuner)
    choose_usual_layers(complete := copy.copy(config), model)
    complete = tuner._prepare_adapter_config(complete, SpectralTuner.get_model_config(model))
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


def wanted(layers: Mapping[str, Any], config: SpectralConfig) -> dict[str, tuple[tuple[int, int], int, torch.device]]:
    """Get layer -> (shape of its weight, number of directions, device)."""
    ranks, found = LayerRanks(config.rank_pattern), {}
    for name, layer in layers.items():
        W_OI = _matrix(layer, name)
        shape = (W_OI.shape[0], W_OI.shape[1])
        rank, _ = config.method_for(name, ranks.of(name), *shape).basis(*shape)
        found[name] = shape, rank, W_OI.device
    return found


def _matrix(layer: Any, name: str) -> torch.Tensor:
    backend = backend_of(layer)
    layout = layout_of(layer, name, backend)
    stored = plain_weight(layer, layout.attribute, name) if backend is None else backend.get_base_weight(layer)
    if stored.is_meta:
        raise WeightError(f"{name}: the base weight is on the meta device. Load the base model with its weights first.")
    return layout.to_matrix(stored.detach())


@contextmanager
def _watched(
    model: nn.Module, layers: Mapping[str, nn.Module], seen: Mapping[str, Moments] | Mapping[str, NumberScores]
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


def _reporter(seen: Moments | NumberScores, mask: list[torch.Tensor | None]) -> Callable[..., Any]:
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


def _refuse_unseen(moments: Mapping[str, Moments] | Mapping[str, NumberScores]) -> None:
    unseen = [name for name, seen in moments.items() if not seen.tokens]
    if len(unseen) == len(moments):
        raise OptionError("batches: there are none, or the loss does not depend on the layers. Pass some examples.")
    if unseen:
        raise OptionError(f"{unseen[0]}: this layer got no gradient. Exclude it, or pass examples that use it.")
