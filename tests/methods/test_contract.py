"""One contract for all methods; a new method passes it by standing in `conftest.CASES`."""

from __future__ import annotations

import pytest
import torch

from spectune.adapter import SpectralModule
from spectune.algebra import apply, dense, rank, to_factors
from spectune.methods import METHODS, Method
from spectune.records import Spectrum

from .cases import CASES

DTYPE = torch.float64


def trained_numbers(method: Method, spectrum: Spectrum, seed: int = 0) -> dict[str, torch.Tensor]:
    """Numbers as after some training: the start plus noise."""
    rows_O, cols_I, _ = spectrum.shape
    generator = torch.Generator().manual_seed(seed)
    start = method.start(rows_O, cols_I)
    return {n: t.to(DTYPE) + 0.3 * torch.randn(t.shape, generator=generator, dtype=DTYPE) for n, t in start.items()}


def test_every_method_is_under_contract() -> None:
    assert {name for name, _ in CASES.values()} == set(METHODS)


def test_delta_is_zero_before_training(method: Method, spectrum: Spectrum) -> None:
    rows_O, cols_I, _ = spectrum.shape
    start = {name: tensor.to(DTYPE) for name, tensor in method.start(rows_O, cols_I).items()}
    delta = method.delta(spectrum, start, method.frozen(spectrum))
    assert torch.count_nonzero(dense(delta)) == 0
    assert torch.count_nonzero(apply(delta, torch.randn(4, cols_I, dtype=DTYPE))) == 0


def test_apply_is_the_dense_update(method: Method, spectrum: Spectrum) -> None:
    delta = method.delta(spectrum, trained_numbers(method, spectrum), method.frozen(spectrum))
    x_NI = torch.randn(4, spectrum.shape[1], dtype=DTYPE)
    torch.testing.assert_close(apply(delta, x_NI), x_NI @ dense(delta).T, rtol=1e-10, atol=1e-10)
    assert dense(delta).abs().max() > 1e-3


def test_factors_multiply_to_the_dense_update(method: Method, spectrum: Spectrum) -> None:
    delta = method.delta(spectrum, trained_numbers(method, spectrum), method.frozen(spectrum))
    B_OP, A_PI = to_factors(delta)
    torch.testing.assert_close(B_OP @ A_PI, dense(delta), rtol=1e-10, atol=1e-10)


def test_the_rank_of_a_generic_update_is_the_promised_lora_rank(method: Method, spectrum: Spectrum) -> None:
    """Neither less than an update needs, nor more than it can use."""
    rows_O, cols_I, _ = spectrum.shape
    for seed in range(3):
        delta = method.delta(spectrum, trained_numbers(method, spectrum, seed), method.frozen(spectrum))
        assert rank(delta) == method.exact_rank(rows_O, cols_I)
        assert torch.linalg.matrix_rank(dense(delta)) == method.exact_rank(rows_O, cols_I)


def test_strength_scales_from_nothing_to_the_trained_update(method: Method, spectrum: Spectrum) -> None:
    trained, indices = trained_numbers(method, spectrum), method.frozen(spectrum)
    none = dense(method.delta(spectrum, trained, indices, 0.0))
    torch.testing.assert_close(none, torch.zeros_like(none), rtol=0, atol=1e-12)
    half = dense(method.delta(spectrum, trained, indices, 0.5))
    assert 0 < torch.linalg.norm(half) < torch.linalg.norm(dense(method.delta(spectrum, trained, indices)))


def test_gradients_agree_with_finite_differences(method: Method, spectrum: Spectrum) -> None:
    trained, indices = trained_numbers(method, spectrum), method.frozen(spectrum)
    x_NI = torch.randn(3, spectrum.shape[1], dtype=DTYPE)

    def output(*tensors: torch.Tensor) -> torch.Tensor:
        return apply(method.delta(spectrum, dict(zip(trained, tensors, strict=True)), indices), x_NI)

    assert torch.autograd.gradcheck(output, tuple(t.requires_grad_() for t in trained.values()))


def test_every_trained_number_gets_a_gradient_within_two_steps(method: Method, spectrum: Spectrum) -> None:
    module = SpectralModule(method, spectrum, embed_basis=False)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    reached = {name: torch.zeros_like(p, dtype=torch.bool) for name, p in module.named_parameters()}
    for step in range(2):
        x_NI = torch.randn(16, spectrum.shape[1], dtype=DTYPE, generator=torch.Generator().manual_seed(step))
        target_NO = torch.randn(16, spectrum.shape[0], dtype=DTYPE, generator=torch.Generator().manual_seed(9))
        optimizer.zero_grad()
        torch.nn.functional.mse_loss(module(x_NI), target_NO).backward()
        for name, parameter in module.named_parameters():
            assert parameter.grad is not None, name
            reached[name] |= parameter.grad != 0
        optimizer.step()
    assert all(mask.all() for mask in reached.values()), {n: m.float().mean().item() for n, m in reached.items()}


def test_trainable_count_is_what_the_module_trains(method: Method, spectrum: Spectrum) -> None:
    module = SpectralModule(method, spectrum, embed_basis=False)
    rows_O, cols_I, _ = spectrum.shape
    shared = sum(torch.Size(shape).numel() for shape in method.shared_shapes(rows_O, cols_I).values())
    assert sum(p.numel() for p in module.parameters()) == method.trainable_count(rows_O, cols_I) + shared
    follower = SpectralModule(method, spectrum, embed_basis=False, owner=module)
    assert sum(p.numel() for p in follower.parameters()) == method.trainable_count(rows_O, cols_I)


def test_a_size_trains_what_its_offer_counts(method: Method, spectrum: Spectrum) -> None:
    rows_O, cols_I, _ = spectrum.shape
    if not method.sizes(rows_O, cols_I) or method.shared_by():
        return
    whole = method.candidates()
    scores = {name: torch.rand(shape) for name, shape in whole.trained_shapes(rows_O, cols_I).items()}
    gains, costs = method.offer(rows_O, cols_I, scores)
    for size in range(method.least_size, len(costs) + 1):
        assert method.sized(size).trainable_count(rows_O, cols_I) == int(costs[:size].sum())
    assert float(gains.sum()) == pytest.approx(sum(float(score.sum()) for score in scores.values()), rel=1e-5)


def test_an_update_is_also_found_in_half_precision(method: Method, spectrum: Spectrum) -> None:
    """`model.half()` turns everything to half, and a merge asks for the update then."""
    trained, frozen = trained_numbers(method, spectrum), method.frozen(spectrum)
    exact = dense(method.delta(spectrum, trained, frozen))
    for dtype in (torch.float16, torch.bfloat16):
        halves = [
            {n: t.to(dtype) if t.is_floating_point() else t for n, t in part.items()} for part in (trained, frozen)
        ]
        found = dense(method.delta(spectrum.to(dtype=dtype), *halves))
        assert found.dtype == dtype
        # bfloat16 keeps 8 binary digits; a few roundings of 0.4% each.
        assert torch.linalg.vector_norm(found.to(DTYPE) - exact) < 0.05 * torch.linalg.vector_norm(exact)
