from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from spectune.errors import OptionError, WeightError
from spectune.records import Weight
from spectune.spectrum import SOLVERS, decompose

from .weights import largest_angle, power_law, with_values, worst_value

# LAPACK's float32 SVD loses some tens of float32's roundoff, 6e-8.
FLOAT32 = 5e-6


def weight(W_OI):
    return Weight("layers.3.q_proj", W_OI)


@pytest.mark.parametrize("solver", ["auto", *SOLVERS])
@pytest.mark.parametrize("columns", ["top", "bottom", "random", 5, [9, 0, 4, 30, 2, 7]])
def test_every_solver_finds_the_directions_that_were_asked_for(solver, columns):
    W_OI = with_values(60, 40, torch.linspace(1, 0.02, 40, dtype=torch.float64))
    found = decompose(weight(W_OI), 6, solver=solver, columns=columns)
    assert found.shape == (60, 40, 6) and len(found.columns) == 6 and found.name == "layers.3.q_proj"
    assert largest_angle(W_OI, found) < 1e-4
    assert worst_value(W_OI, found) < FLOAT32
    if columns == [9, 0, 4, 30, 2, 7]:
        assert found.columns == tuple(columns)


@pytest.mark.parametrize("solver", SOLVERS)
def test_signs_are_canonical_so_solvers_agree_entry_by_entry(solver):
    W_OI = power_law(50, 40, 1.0)
    found, oracle = decompose(W_OI, 5, solver=solver), decompose(W_OI, 5, solver="exact", dtype=torch.float64)
    torch.testing.assert_close(found.U_OR.double(), oracle.U_OR, atol=1e-4, rtol=0)
    assert (found.U_OR.gather(0, found.U_OR.abs().argmax(0)[None]) > 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("inside", [torch.float32, torch.float64])
def test_any_floating_weight_is_computed_in_the_asked_dtype(dtype, inside):
    W_OI = power_law(40, 30).to(dtype)
    before_OI = W_OI.clone()
    found = decompose(W_OI, 4, dtype=inside)
    assert {found.U_OR.dtype, found.S_R.dtype, found.Vh_RI.dtype} == {inside}
    assert worst_value(W_OI.double(), found) < FLOAT32
    assert torch.equal(W_OI, before_OI)


def test_auto_takes_block_krylov_for_few_directions_of_a_large_weight_and_says_so():
    W_OI = power_law(700, 700)
    quality = decompose(W_OI, 8).quality
    assert quality.solver == "randomized" and quality.steps > 0 and quality.converged


@pytest.mark.parametrize(
    ("shape", "columns", "dtype", "solver"),
    [
        ((400, 400), "bottom", torch.float32, "exact"),
        ((400, 200), "bottom", torch.float32, "gram"),
        ((400, 200), "bottom", torch.float64, "exact"),
        ((200, 200), "top", torch.float32, "gram"),
        ((200, 200), range(51), torch.float32, "exact"),
    ],
)
def test_auto_takes_a_direct_solver_elsewhere_and_says_so(shape, columns, dtype, solver):
    found = decompose(power_law(*shape), 8 if isinstance(columns, str) else None, columns=columns, dtype=dtype)
    assert found.quality.solver == solver and found.quality.steps == 0


def test_auto_falls_back_to_a_direct_solver_when_block_krylov_does_not_converge():
    S_K = torch.cat([torch.linspace(1, 0.999, 350, dtype=torch.float64), torch.linspace(0.5, 0.1, 350)])
    W_OI = with_values(700, 700, S_K)
    found = decompose(W_OI, 8)
    assert found.quality.solver == "gram" and found.quality.converged


@pytest.mark.parametrize("solver", SOLVERS)
def test_quality_is_measured_on_the_kept_directions(solver):
    S_K = torch.tensor([4.0, 3.0, 2.0, 1.9, 1.0] + [0.5] * 35, dtype=torch.float64)
    found = decompose(with_values(60, 40, S_K), None, solver=solver, columns=[0, 3])
    assert found.quality.solver == solver
    assert found.quality.residual < FLOAT32 and found.quality.orthogonality < FLOAT32
    assert found.quality.gap == pytest.approx(0.1 / 4, abs=1e-5)  # 1.9 against 2.0, over S[0]


def test_the_gap_does_not_count_the_distance_between_two_kept_values():
    S_K = torch.tensor([4.0, 3.99, 2.0, 1.0], dtype=torch.float64)
    assert decompose(with_values(9, 4, S_K), 2).quality.gap == pytest.approx(1.99 / 4, abs=1e-5)


def test_the_gap_is_infinite_when_nothing_is_left_out():
    assert decompose(power_law(20, 30), None).quality.gap == math.inf


@pytest.mark.parametrize("solver", ["auto", *SOLVERS])
@pytest.mark.parametrize("factor", [2.0**110, 2.0**-110])
def test_very_large_and_very_small_weights_only_scale_the_singular_values(solver, factor):
    W_OI = power_law(40, 30)
    found, plain = decompose(W_OI * factor, 4, solver=solver), decompose(W_OI, 4, solver=solver)
    torch.testing.assert_close(found.S_R / factor, plain.S_R, atol=0, rtol=FLOAT32)
    assert found.quality.residual < FLOAT32


@pytest.mark.parametrize("solver", ["auto", *SOLVERS])
def test_the_global_random_state_is_untouched_and_equal_seeds_give_equal_bits(solver):
    W_OI = power_law(60, 50)
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    one, two = (decompose(W_OI, 4, solver=solver, columns="random", seed=5) for _ in range(2))
    assert torch.equal(torch_state, torch.get_rng_state())
    assert np.array_equal(numpy_state, np.random.get_state()[1])
    assert torch.equal(one.U_OR, two.U_OR) and one.columns == two.columns


def test_the_result_does_not_hold_the_graph_of_a_parameter():
    found = decompose(torch.nn.Parameter(power_law(20, 10)), 2)
    assert not found.U_OR.requires_grad and not found.S_R.requires_grad


def spoiled(value):
    W_OI = torch.ones(32, 512)
    W_OI[3, :2] = value
    return W_OI


@pytest.mark.parametrize(
    ("W_OI", "options", "message"),
    [
        (torch.ones(3, 4, 5), {}, "the weight is 3-D (3x4x5), but only a matrix has singular directions. Flatten"),
        (torch.ones(0, 4), {}, "the 0x4 weight is empty. Exclude the layer."),
        (
            torch.ones(8, 8, dtype=torch.uint8),
            {},
            "a weight in torch.uint8 (quantised?) cannot be decomposed. Dequantise it",
        ),
        (torch.ones(8, 8, device="meta"), {}, "meta device and has no values. Load it first."),
        (spoiled(math.nan), {}, "2 of the weight's 16384 entries are NaN or infinite. Repair the checkpoint"),
        (spoiled(-math.inf), {}, "2 of the weight's 16384 entries are NaN or infinite."),
        (torch.ones(8, 8), {"rank": 0}, "r=0 must be at least 1."),
        (
            torch.ones(32, 512),
            {"rank": 64},
            "r=64 is more than this 32x512 weight has (32). Lower r to 32 or exclude the layer.",
        ),
        (
            torch.ones(8, 8),
            {"rank": None, "columns": [8]},
            "this 8x8 weight has columns 0 to 7, but the list names column 8.",
        ),
        (torch.ones(8, 8), {"rank": None, "columns": [1, 1]}, "names column 1 more than once"),
        (
            torch.full((8, 8), 1e60, dtype=torch.float64),
            {},
            "the largest entry, 1e+60, is out of range for computing in torch.float32. Pass",
        ),
    ],
)
def test_a_weight_that_cannot_be_decomposed_is_refused_by_name(W_OI, options, message):
    with pytest.raises(WeightError) as error:
        decompose(weight(W_OI), **{"rank": 2, **options})
    assert str(error.value).startswith("layers.3.q_proj: ") and message in str(error.value)
    assert "{" not in str(error.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"solver": "randomised"}, "unknown solver='randomised'. Did you mean 'randomized'?"),
        ({"columns": "tops"}, "unknown columns='tops'. Did you mean 'top'?"),
        ({"dtype": torch.float16}, "cannot compute in torch.float16. Choose torch.float32 or torch.float64."),
        ({"tolerance": 0.0}, "tolerance=0.0 is not a positive angle."),
    ],
)
def test_an_option_that_does_not_exist_is_refused(options, message):
    with pytest.raises(OptionError) as error:
        decompose(weight(torch.ones(8, 8)), 2, **options)
    assert str(error.value).startswith("layers.3.q_proj: ") and message in str(error.value)
