"""The closed form against the problem it solves."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from spectune.algebra import dense, rank
from spectune.errors import OptionError
from spectune.fusion import Part
from spectune.fusion.gradient import Gradient

from .parts import COLS, inputs, lora_part


def parts_on(*counts: int) -> tuple[list[Part], list[torch.Tensor]]:
    """Adapters whose examples send so many inputs into the layer."""
    rows = [inputs(seed, count) for seed, count in enumerate(counts)]
    parts = [lora_part(f"{seed}", 3, 10 * seed) for seed in range(len(counts))]
    return [replace(p, gram_II=x.mT @ x) for p, x in zip(parts, rows, strict=True)], rows


def loss(parts: list[Part], rows: list[torch.Tensor], found_OI: torch.Tensor, weights: list[float]) -> torch.Tensor:
    terms = [
        w * ((dense(p.delta) - found_OI) @ x.mT).square().sum() for p, x, w in zip(parts, rows, weights, strict=True)
    ]
    return torch.stack(terms).sum()


@pytest.mark.parametrize("weights", [[1.0, 1.0], [0.3, 2.0]])
def test_it_is_the_minimum_of_the_weighted_errors(weights: list[float]) -> None:
    parts, rows = parts_on(40, 30)
    found = dense(Gradient(eps=0.0).fuse(parts, weights).delta)
    at = found.clone().requires_grad_()
    loss(parts, rows, at, weights).backward()
    scale = loss(parts, rows, torch.zeros_like(found), weights)
    assert at.grad.abs().max() < 1e-9 * scale
    assert 0.01 < loss(parts, rows, found, weights) / scale < 0.99


def test_eps_is_a_pull_towards_no_change() -> None:
    parts, rows = parts_on(40, 30)
    gram = parts[0].gram_II + parts[1].gram_II
    ridge = 0.1 * gram.diagonal().mean()
    found = dense(Gradient(eps=0.1).fuse(parts, [1.0, 1.0]).delta).requires_grad_()
    (loss(parts, rows, found, [1.0, 1.0]) + ridge * found.square().sum()).backward()
    assert found.grad.abs().max() < 1e-9 * float(gram.trace())


def test_with_few_inputs_it_is_the_smallest_change_that_fits_all() -> None:
    parts, rows = parts_on(5, 6)
    X_IN = torch.cat(rows).mT
    wanted_ON = torch.cat([dense(p.delta) @ x.mT for p, x in zip(parts, rows, strict=True)], dim=1)
    smallest = wanted_ON @ torch.linalg.pinv(X_IN)
    limit = dense(Gradient(eps=0.0).fuse(parts, [1.0, 1.0]).delta)
    torch.testing.assert_close(limit, smallest, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(limit @ X_IN, wanted_ON, rtol=1e-7, atol=1e-7)
    near = dense(Gradient(eps=1e-9).fuse(parts, [1.0, 1.0]).delta)
    torch.testing.assert_close(near, smallest, rtol=1e-5, atol=1e-5)


def test_the_result_is_a_lora_of_the_summed_rank() -> None:
    parts, _ = parts_on(40, 30, 20)
    assert rank(Gradient().fuse(parts, [1.0] * 3).delta) == 9


def test_it_does_not_lose_to_lbfgs() -> None:
    parts, rows = parts_on(40, 30)
    tuned = torch.zeros_like(dense(parts[0].delta), requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [tuned], lr=1, max_iter=500, history_size=25, line_search_fn="strong_wolfe",
        tolerance_grad=1e-16, tolerance_change=1e-16,
    )  # fmt: skip

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        value = loss(parts, rows, tuned, [1.0, 1.0])
        value.backward()
        return value

    optimizer.step(closure)
    ours = dense(Gradient().fuse(parts, [1.0, 1.0]).delta)
    assert loss(parts, rows, ours, [1.0, 1.0]) <= (1 + 1e-12) * loss(parts, rows, tuned.detach(), [1.0, 1.0])


@pytest.mark.parametrize(
    ("gram", "line"),
    [
        (None, "layer: rule 'gradient' needs the inputs that 0 sees in this layer"),
        (torch.eye(COLS - 1), f"layer: the activations of 0 are {COLS - 1}x{COLS - 1} or not finite"),
        (torch.full((COLS, COLS), torch.nan), "or not finite"),
    ],
)
def test_activations_that_do_not_fit_are_refused(gram: torch.Tensor | None, line: str) -> None:
    (part,), _ = parts_on(40)
    with pytest.raises(OptionError, match=line):
        Gradient().fuse([replace(part, gram_II=gram)], [1.0])


def test_an_eps_below_roundoff_is_refused_and_not_hidden() -> None:
    (part,), _ = parts_on(4)
    with pytest.raises(OptionError, match="layer: eps=1e-12 is too small for activations summed in float32"):
        Gradient(eps=1e-12).fuse([replace(part, gram_II=part.gram_II.float())], [1.0])
    with pytest.raises(OptionError, match="must be positive"):
        Gradient().fuse([part], [0.0])
    with pytest.raises(OptionError, match="eps=-1"):
        Gradient(eps=-1.0)


def test_a_layer_that_no_input_reached_is_left_unchanged() -> None:
    (part,), _ = parts_on(4)
    fused = Gradient().fuse([replace(part, gram_II=torch.zeros_like(part.gram_II))], [1.0])
    assert not dense(fused.delta).any()
