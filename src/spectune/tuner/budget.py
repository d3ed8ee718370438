"""A budget of trained numbers, shared out over the layers by what examples say of each number."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from statistics import median
from typing import TYPE_CHECKING, Any

import torch

from ..adapter import kind_of_layer
from ..checkpoint.patterns import rank_pattern
from ..errors import OptionError, nearest, printable
from ..methods import Method
from ..methods.contract import Tensors
from ..records import Spectrum
from ..spectrum import is_first
from .number_scores import SCORES

if TYPE_CHECKING:
    from .config import SpectralConfig

# The options that limit a layer's size; another one is the size itself.
LIMITS = ("r", "basis_rank")

Offer = tuple[torch.Tensor, torch.Tensor]
"""For size 1, 2, ... of one layer: what the numbers that this size adds score together, and how many they are."""


def check_budget(config: SpectralConfig, method: Method) -> None:
    """Raise `OptionError` for a budget that this method cannot share out, or a score that does not exist."""
    if config.budget_by not in SCORES:
        raise OptionError(f"budget_by={config.budget_by!r} does not exist. {nearest(config.budget_by, list(SCORES))}")
    if config.budget is None:
        if config.budget_by != next(iter(SCORES)):
            raise OptionError(f"budget_by={config.budget_by!r} shares out a budget, and there is none. Give budget=…")
        return
    if config.budget < 1:
        raise OptionError(f"budget={config.budget} must be at least 1.")
    if method.size_option() is None or not method.sizes(64, 64) or method.shared_by():
        raise OptionError(
            f"budget={config.budget} cannot be shared out with these options of {method.name}. It works with "
            "one_sided, svdiff, spectral_a and spectral_r (top columns), and svft with pattern dense, plain or chosen, "
            "all without core, full_basis and share."
        )


def refuse_given_sizes(config: SpectralConfig) -> None:
    """Raise `OptionError` where a config with a budget says already how large the layers are."""
    given: dict[str, Any] = {"rank_pattern": config.rank_pattern, "off_diagonals": config.off_diagonals}
    size = config.build_method().size_option()
    if size is not None and size not in LIMITS:
        given[size] = getattr(config, size)
    for option, value in given.items():
        if value:
            raise OptionError(
                f"{option}={value} does not go with budget={config.budget}, which decides on it. Leave one of them out."
            )


def allot(budget: int, offers: Mapping[str, Offer], least: int, most: str) -> dict[str, int]:
    """Get layer -> size: every number that scores more than one threshold, for the whole model, is trained.

    A size counts with all its numbers, by their mean score; where a later size scores more than an earlier one, both
    are taken together, since sizes only grow. Every layer gets `least` or more, and what is left over goes to the next
    best steps that fit into it. `most` says what limits a layer.

    Raises `OptionError` for a budget below `least` of each layer, or above what all layers can take.
    """
    fixed = sum(int(costs[:least].sum()) for _, costs in offers.values())
    limit = sum(int(costs.sum()) for _, costs in offers.values())
    if not fixed <= budget <= limit:
        if budget < fixed:
            reason = f"less than {len(offers)} layers need at least ({fixed:,}). Raise it, or adapt fewer layers"
        else:
            reason = f"more than all layers can train with {most} ({limit:,}). Lower it, or allow a layer more"
        raise OptionError(f"budget={budget:,} is {reason}.")
    steps = {layer: _falling(gains[least:].double(), costs[least:]) for layer, (gains, costs) in offers.items()}
    layers = torch.cat([torch.full((len(mean),), i) for i, mean in enumerate(steps.values())])
    order = torch.cat([*steps.values()]).argsort(descending=True, stable=True)
    layers, costs = layers[order], torch.cat([costs[least:] for _, costs in offers.values()])[order]
    above = int((costs.cumsum(0) <= budget - fixed).sum())
    taken = torch.bincount(layers[:above], minlength=len(offers)).tolist()
    left, full = budget - fixed - int(costs[:above].sum()), set()
    for layer, cost in zip(layers[above:].tolist(), costs[above:].tolist(), strict=True) if left else ():
        if cost <= left and layer not in full:
            taken[layer] += 1
            left -= cost
        else:
            full.add(layer)
    return {layer: least + more for layer, more in zip(offers, taken, strict=True)}


def _falling(gains: torch.Tensor, costs: torch.Tensor) -> torch.Tensor:
    """Get the mean score of each step's numbers, with steps put together until it never rises."""
    mean = gains / costs
    if bool((mean[1:] <= mean[:-1]).all()):
        return mean
    blocks: list[tuple[float, float, int]] = []
    for gain, cost in zip(gains.tolist(), costs.tolist(), strict=True):
        block = (gain, cost, 1)
        while blocks and blocks[-1][0] * block[1] < block[0] * blocks[-1][1]:
            before = blocks.pop()
            block = (before[0] + block[0], before[1] + block[1], before[2] + block[2])
        blocks.append(block)
    return torch.cat([torch.full((count,), gain / cost, dtype=torch.float64) for gain, cost, count in blocks])


def with_sizes(config: SpectralConfig, sizes: Mapping[str, int]) -> SpectralConfig:
    """Get the config with the size of each layer: the most common one as its option, the others in rank_pattern."""
    option = config.build_method().size_option()
    assert option is not None
    sized = copy.copy(config)
    size, pattern = rank_pattern(sizes)
    setattr(sized, option, size)
    sized.rank_pattern = pattern
    return sized


def _print_sizes(config: SpectralConfig, sizes: Mapping[str, int], numbers: Mapping[str, int]) -> None:
    """Print, on stderr, what each kind of layer got."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    kinds: dict[str, list[str]] = {}
    for layer in sizes:
        kinds.setdefault(kind_of_layer(layer), []).append(layer)
    head = f"budget={config.budget:,} by {config.budget_by}: {sum(numbers.values()):,} numbers in {len(sizes)} layers"
    option, table = config.build_method().size_option(), Table("kind")
    for name in ("layers", f"{option}: least", "median", "most", "numbers"):
        table.add_column(name, justify="right")
    for kind, layers in kinds.items():
        got = [sizes[layer] for layer in layers]
        figures = (len(got), min(got), median(got), max(got), sum(numbers[layer] for layer in layers))
        table.add_row(Text(printable(kind)), *(f"{figure:,.15g}" for figure in figures))
    console = Console(stderr=True)
    console.print(head, soft_wrap=True)
    console.print(table)


def within_budget(
    config: SpectralConfig,
    methods: Mapping[str, Method],
    spectra: Mapping[str, Spectrum],
    scores: Mapping[str, Tensors],
) -> tuple[SpectralConfig, dict[str, Method]]:
    """Get the config with each layer's size, and the methods of these sizes; say on stderr what each kind got."""
    method, shapes = config.build_method(), {layer: basis.shape[:2] for layer, basis in spectra.items()}
    offers = {layer: methods[layer].offer(*shapes[layer], scores[layer]) for layer in spectra}
    option = method.size_option()
    limit = option if option in LIMITS else LIMITS[-1]
    most = getattr(config, limit)
    assert option is not None and config.budget is not None
    sizes = allot(config.budget, offers, method.least_size, "all directions" if most is None else f"{limit}={most}")
    numbers = {layer: int(offers[layer][1][:size].sum()) for layer, size in sizes.items()}
    if is_first():
        _print_sizes(config, sizes, numbers)
    return with_sizes(config, sizes), {layer: methods[layer].sized(size) for layer, size in sizes.items()}
