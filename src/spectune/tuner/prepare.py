"""`prepare`: compute directions from examples, in one pass before an adapter is attached."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, _maybe_include_all_linear_layers
from torch import nn

from ..adapter.saved import LayerRanks
from ..errors import OptionError, WeightError
from ..methods import Method
from ..records import Spectrum, Weight
from ..spectrum import DataSpectra, Moments, OthersInputs, is_first
from .base_weight import backend_of, keep_unpacked, layout_of
from .bases import find_bases, find_basis, plain_weight
from .budget import refuse_given_sizes, within_budget
from .config import SpectralConfig
from .example_pass import AnyBatch, LossFunction, Pass, sum_of_outputs
from .from_file import chosen_layers
from .full_precision import bases_of_quantised
from .model import SpectralTuner
from .number_scores import NumberScores
from .progress import ticking
from .usual_layers import choose_usual_layers

AWAY_SHARE = 0.9
"""Of the energy of other tasks' inputs that an adapter leaves alone; chosen."""


def prepare(
    model: nn.Module,
    config: SpectralConfig,
    batches: Iterable[AnyBatch],
    *,
    loss: LossFunction | None = None,
    save: str | Path | None = None,
    away_from: Iterable[AnyBatch] | None = None,
    away_share: float = AWAY_SHARE,
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
    adapter's file will not hold them.

    `away_from` are batches of other tasks, or of neutral text, that the adapter should leave alone (labels are not
    needed): of each layer's inputs x there, the leading directions Q of sum x x^T that hold `away_share` of its trace
    are kept out of the right directions, V^T Q = 0. Whatever is trained then, dW Q = 0 but for the rounding of V to
    bfloat16, so of those inputs the layer changes only what lies in the rest.

    `config.directions` says what is collected:

    - gradient: left singular vectors from sum_k G_k G_k^T, right from sum_k G_k^T G_k, G_k the gradient of the loss of
      batch k with respect to the weight (the factors of Shampoo, Gupta et al., arXiv 1802.09568).
    - gradient_mean: the SVD of mean_k G_k (LoRA-GA, arXiv 2407.05000; LoRA-SB, arXiv 2411.19557).
    - activation: right from sum x x^T over input tokens x, uncentred; left from sum g g^T, g the gradient with respect
      to the output of a token (the factors of KFAC, Martens & Grosse, arXiv 1503.05671).
    - weight_x_activation: the best approximation of W x over the inputs: U from the SVD of W C^(1/2), C = sum x x^T,
      then the SVD of U^T W (CorDA, arXiv 2406.05223).

    Raises `OptionError` for a config that needs no examples, no batches, a model without a loss, layers that are not
    linear or that no batch went through, and an `away_from` that leaves a layer too few directions.
    """
    _refuse(config, save)
    if away_from is not None:
        _refuse_away(config, away_share)
    keep_unpacked(model)
    layers, examples = layers_of(model, config), Pass(model, batches, loss)
    others = None if away_from is None else Pass(model, away_from, sum_of_outputs, "away_from")
    prepared, spectra = copy.copy(config), _directions(examples, layers, config, others, away_share)
    if _is_scored(config):
        prepared, spectra = _scored(examples, layers, spectra, prepared)
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


def _refuse_away(config: SpectralConfig, share: float) -> None:
    if config.directions == "weight":
        raise OptionError(
            "away_from: directions='weight' are the weight's own and cannot be turned. Name directions of data."
        )
    if not 0 < share < 1:
        raise OptionError(f"away_share={share}: it must lie between 0 and 1.")


def _is_scored(config: SpectralConfig) -> bool:
    """Ask whether examples also say which numbers train."""
    return config.budget is not None or config.build_method().needs_examples()


def _directions(
    examples: Pass, layers: Mapping[str, Any], config: SpectralConfig, others: Pass | None, share: float
) -> dict[str, Spectrum]:
    """Get layer -> the directions that the config asks for: the weight's own, or by a pass."""
    if config.directions == "weight":
        return _bases_of_weights(examples.model, layers, config)
    if _is_scored(config):
        asks = f"budget={config.budget}" if config.budget is not None else f"pattern={config.pattern!r}"
        examples.refuse_single_use(f"{asks} with directions={config.directions!r}")
    asked = wanted(layers, config)
    moments = {name: Moments(config.directions, name, *seen) for name, seen in asked.items()}
    examples.through(moments, layers)
    if others is not None:
        inputs = {name: OthersInputs(name, *seen) for name, seen in asked.items()}
        others.through(inputs, layers)
        for name, seen in moments.items():
            seen.away_IK = inputs[name].directions(share)
    return {name: seen.spectrum(Weight(name, _matrix(layers[name], name))) for name, seen in moments.items()}


def _scored(
    examples: Pass, layers: Mapping[str, Any], spectra: dict[str, Spectrum], config: SpectralConfig
) -> tuple[SpectralConfig, dict[str, Spectrum]]:
    """Get the config with each layer's size, and the directions with the places, that a pass chooses."""
    ranks = LayerRanks(config.rank_pattern)
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
