"""What a run does with some examples before its first step: a new head is fitted, directions of the data are found."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..errors import OptionError
from ..recipes.recipe import Recipe
from ..training.processes import join
from ..tuner import SpectralConfig
from .drawn_examples import batches_of_others, by_length
from .remembered_pass import remembered

# Examples of the pass that finds directions of the data, and of one batch of it. Of the gradient's energy on unseen
# rows the directions of 256 examples hold one or two points less than those of 512, and those of batches of 16 a little
# more than those of 32 (docs/data-spectra.md).
EXAMPLES = 256
A_BATCH = 16
# More examples hardly change a head of some thousand numbers, and their features are held in memory. Chosen.
MOST_FOR_A_HEAD = 8192
# The squared norm of the head's weight counts this much, whichever does best on validation examples. Chosen.
PENALTIES = (1e-5, 1e-4, 1e-3, 1e-2)
# Every so many training examples are kept for that choice where the run has no validation examples.
KEPT_ASIDE = 10


def directions_of_examples(recipe: Recipe, model: nn.Module, config: Any, has_new_head: bool) -> Any:
    """Get the adapter's config with the directions that training examples choose, where it asks for such.

    They are read if the config names a basis file, or if its cache has them for this model, these examples and options.
    Each process of a distributed run takes its share of the examples.
    """
    if not isinstance(config, SpectralConfig) or not config.needs_examples:
        return config
    if has_new_head and not recipe.config.training.head_first:
        raise OptionError(
            f"adapter.{config.needs_examples}: the gradients of a new random head say nothing. Set "
            f"training.head_first: true."
        )
    away = batches_of_others(recipe.config) if recipe.config.training.away_from else None
    return remembered(recipe, model, config, list(_Batches(recipe)), away)


class _Batches:
    """Batches of this process's share of the drawn examples; the same again in a second pass.

    Texts of like length stand in one batch, so that nearly nothing is padding.
    """

    def __init__(self, recipe: Recipe) -> None:
        self.recipe, processes = recipe, join()
        self.rows = recipe.plain_rows("train")
        drawn = random.Random(recipe.config.seed).sample(range(len(self.rows)), min(EXAMPLES, len(self.rows)))
        self.mine = by_length(self.rows, drawn[processes.process_index :: processes.num_processes])

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        size = min(A_BATCH, self.recipe.config.training.batch_size)
        for start in range(0, len(self.mine), size):
            yield self.recipe.collate([self.rows[i] for i in self.mine[start : start + size]])


def fit_head(recipe: Recipe, model: nn.Module, heads: list[str]) -> None:
    """Give a new head the weights that fit the training examples best while the body is frozen.

    Multinomial logistic regression, or ridge regression for scores, on what reaches the head's last linear layer, by
    L-BFGS; the penalty is chosen by the loss on validation examples. Parts of a head before that layer stay as they
    are.
    """
    if len(heads) != 1:
        raise OptionError(
            f"training.head_first: this run has {len(heads) or 'no'} new head{'s' * (len(heads) > 1)}, and exactly one "
            f"can be fitted. Leave it out."
        )
    path, layer = _last_linear(model, heads[0])
    with _left_out(model, path):
        features_ND, targets_N = _features(recipe, model, "train")
        if "validation" in recipe.splits:
            held_out = _features(recipe, model, "validation")
        else:
            aside_N = torch.arange(len(targets_N)) % KEPT_ASIDE == 0
            held_out = features_ND[aside_N], targets_N[aside_N]
            features_ND, targets_N = features_ND[~aside_N], targets_N[~aside_N]
    fitted = [_fitted(layer, features_ND, targets_N, penalty) for penalty in PENALTIES]
    with torch.no_grad():
        best = min(fitted, key=lambda head: float(_loss(head(held_out[0]), held_out[1])))
        for mine, found in zip(layer.parameters(), best.parameters(), strict=True):
            mine.copy_(found)


def _last_linear(model: nn.Module, head: str) -> tuple[str, nn.Linear]:
    within = model.get_submodule(head).named_modules()
    linear = [(f"{head}.{name}".rstrip("."), part) for name, part in within if isinstance(part, nn.Linear)]
    if not linear:
        raise OptionError(f"training.head_first: the head {head} ends in no linear layer. Leave it out.")
    return linear[-1]


@contextmanager
def _left_out(model: nn.Module, path: str) -> Iterator[None]:
    """Have the model give what reaches a layer in place of that layer's outputs."""
    parent, name = model.get_submodule(path.rpartition(".")[0]), path.rpartition(".")[2]
    layer = getattr(parent, name)
    setattr(parent, name, nn.Identity())
    try:
        yield
    finally:
        setattr(parent, name, layer)


@torch.no_grad()
def _features(recipe: Recipe, model: nn.Module, split: str) -> tuple[torch.Tensor, torch.Tensor]:
    rows, size = recipe.plain_rows(split), 2 * recipe.config.training.batch_size
    drawn = random.Random(recipe.config.seed).sample(range(len(rows)), min(MOST_FOR_A_HEAD, len(rows)))
    drawn = by_length(rows, drawn)
    device, was_training = next(model.parameters()).device, model.training
    model.eval()
    features, targets = [], []
    for start in range(0, len(drawn), size):
        batch = {
            name: t.to(device) for name, t in recipe.collate([rows[i] for i in drawn[start : start + size]]).items()
        }
        targets.append(batch.pop("labels"))
        features.append(recipe.logits(model, batch).double())
    model.train(was_training)
    return torch.cat(features), torch.cat(targets)


def _fitted(layer: nn.Linear, features_ND: torch.Tensor, targets_N: torch.Tensor, penalty: float) -> nn.Linear:
    head = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None).to(features_ND)
    for parameter in head.parameters():
        nn.init.zeros_(parameter)
    solver = torch.optim.LBFGS(head.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> float:
        solver.zero_grad()
        loss = _loss(head(features_ND), targets_N) + penalty * head.weight.square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return float(loss.detach())

    solver.step(closure)
    return head


def _loss(logits_NL: torch.Tensor, targets_N: torch.Tensor) -> torch.Tensor:
    if targets_N.is_floating_point():
        return nn.functional.mse_loss(logits_NL.squeeze(-1), targets_N.to(logits_NL))
    return nn.functional.cross_entropy(logits_NL, targets_N)
