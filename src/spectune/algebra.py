"""Pure functions on the records; forward, dense weight, merge and LoRA factors are written here, once.

Everything is differentiable and works in the dtype that it is given.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from .records import Delta, SparseCore
from .thin_svd import thin_svd

# Multiplying N x Q by a sparse core one coefficient at a time gathers N x C numbers; a dense P x Q core costs one
# GEMM. Measured, forward and backward in float32 on one CPU core: at P = Q = 384, 1024 and 2048 both cost the same at
# about 1.2 P, 3 P and 5 P coefficients, so a gathered one costs as much as 400 of a GEMM's.
GATHERED_COSTS = 400
# An update narrower than this part of the weight costs at most an eighth of the base's product in factors, and building
# it saves half of that. Chosen.
LEAST_BUILT_SHARE = 16
# Products with a multiple of so many rows fill the processor's vectors: x Vh^T of 2048 x 384 numbers took 1.88 ms with
# 78 directions and 1.28 ms with two rows of zeros more (one CPU core, float32).
FULL_VECTORS = 16


def through_core(z_NQ: torch.Tensor, core: torch.Tensor | SparseCore) -> torch.Tensor:
    """Get z_NQ core^T, shape (..., P), by the cheapest way for this kind of core."""
    if not isinstance(core, SparseCore):
        return z_NQ * core if core.ndim == 1 else F.linear(z_NQ, core)
    rows_P = core.shape[0]
    if core.values_C.shape[0] * GATHERED_COSTS > rows_P * core.shape[1]:
        dense_PQ = core.values_C.new_zeros(core.shape).index_put((core.rows_C, core.cols_C), core.values_C)
        return F.linear(z_NQ, dense_PQ)
    terms_NC = z_NQ[..., core.cols_C] * core.values_C
    return terms_NC.new_zeros(*z_NQ.shape[:-1], rows_P).index_add(-1, core.rows_C, terms_NC)


def apply(delta: Delta, x_NI: torch.Tensor) -> torch.Tensor:
    """Get x_NI dW^T, shape (..., O), without building dW."""
    return F.linear(through_core(F.linear(x_NI, delta.right_QI), delta.core), delta.left_OP)


def add(y_NO: torch.Tensor, delta: Delta, x_NI: torch.Tensor) -> torch.Tensor:
    """Get y_NO + x_NI dW^T, written into y_NO; two axes each, one dtype for all.

    The last product adds into the base's output, so no second N x O tensor is made or read.
    Autograd keeps x_NI only where `right_QI` trains; with frozen factors it keeps N x Q.
    """
    return y_NO.addmm_(through_core(F.linear(x_NI, delta.right_QI), delta.core), delta.left_OP.T)


def is_dense_cheaper(delta: Delta, tokens: int, fused: bool, training: bool) -> bool:
    """Ask whether building dW for x (W + dW)^T costs fewer multiplications than x W^T plus the three factors of dW.

    Built, dW costs 2 O P I and, where the core is a matrix, 2 O P Q; its gradient as much again, and 2 N O I for
    g^T x. In factors a token costs 2 (I Q + P O + core), and that again for its gradient, where the core is a matrix
    with 2 P Q more for the core's own. `fused` is false where W + dW would round dW away (half precision): then the
    product with dW is one of its own. A diagonal core on all K = d directions of a d x d weight: dW is built from
    N > 2 d / 3 tokens on, without gradients from d / 2, with a product of its own from 2 d. Measured at d = 384 and
    1024 in float32 and bfloat16 on one CPU core, 24 cases: the faster way, or one within noise of it.

    False for an update less than half as wide as the weight: dW would be larger than all that such an adapter holds.
    """
    (rows_O, cols_I), (P, Q), core = delta.shape, delta.width, delta.core
    if min(rows_O, cols_I) > P + Q:
        return False
    in_core = P * Q if not isinstance(core, SparseCore) and core.ndim == 2 else 0
    if isinstance(core, SparseCore):
        in_core = min(core.values_C.shape[0] * GATHERED_COSTS, P * Q)
    through_factors = tokens * (cols_I * Q + P * rows_O + in_core)
    building = rows_O * P * cols_I + (rows_O * in_core if in_core else 0)
    product = tokens * rows_O * cols_I
    if not training:
        return building + (0 if fused else product) < through_factors
    of_core = tokens * P * Q if in_core else 0
    return 2 * building + product + (0 if fused else 2 * product) < 2 * through_factors + of_core


def is_core_built(delta: Delta, tokens: int) -> bool:
    """Ask whether a training step by `with_built_core` costs fewer multiplications than the three factors of dW.

    Only where the core is the trained matrix itself, between frozen factors. Building dW costs O Q (P + I), and again
    in the backward, which then needs N (I Q + P O + P Q) for the core's gradient and nothing more for the input's.
    With P = Q directions of a d x d weight, building dW is cheaper for more than d tokens; dW is then no larger than
    the activations of one layer. A step of MiniLM (P = 78, 2048 tokens, one CPU core) takes 0.93 of LoRA's time, in
    factors 0.98.
    """
    core = delta.core
    if isinstance(core, SparseCore) or core.ndim != 2 or not (core.requires_grad and core.is_leaf):
        return False
    if not torch.is_grad_enabled() or delta.left_OP.requires_grad or delta.right_QI.requires_grad:
        return False
    (rows_O, cols_I), (P, Q) = delta.shape, delta.width
    if min(rows_O, cols_I) > LEAST_BUILT_SHARE * min(P, Q):
        return False
    building = rows_O * Q * (P + cols_I)
    through_factors = tokens * (cols_I * Q + P * rows_O + P * Q)
    return 2 * building < through_factors + tokens * P * Q


def with_built_core(
    x_NI: torch.Tensor, weight_OI: torch.Tensor, bias_O: torch.Tensor | None, delta: Delta
) -> torch.Tensor:
    """Get x_NI (W + dW)^T + b for a trained matrix as core between frozen factors; dW is built and not kept.

    Autograd keeps x Vh^T (N x Q) and builds dW again, so that the input's gradient costs what the base's alone does.
    Cannot be differentiated twice.
    """
    assert isinstance(delta.core, torch.Tensor)
    with torch.no_grad():
        tuned_OI = torch.addmm(weight_OI, delta.left_OP @ delta.core, delta.right_QI)
        z_NQ = F.linear(x_NI, _with_full_vectors(delta.right_QI))
    product: torch.Tensor = _BuiltCore.apply(  # type: ignore[no-untyped-call]
        x_NI, z_NQ, tuned_OI, weight_OI, bias_O, delta.left_OP, delta.core, delta.right_QI
    )
    return product


def _with_full_vectors(rows_QI: torch.Tensor) -> torch.Tensor:
    return F.pad(rows_QI, (0, 0, 0, -rows_QI.shape[0] % FULL_VECTORS))


class _BuiltCore(torch.autograd.Function):
    """`with_built_core`: gradients reach the input, the core, and a bias that trains."""

    @staticmethod
    def forward(
        x_NI: torch.Tensor,
        z_NQ: torch.Tensor,
        tuned_OI: torch.Tensor,
        weight_OI: torch.Tensor,
        bias_O: Any,
        *delta: Any,
    ) -> torch.Tensor:
        return F.linear(x_NI, tuned_OI, bias_O)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: torch.Tensor) -> None:
        _, z_NQ, _, weight_OI, _, left_OP, core_PQ, right_QI = inputs
        ctx.save_for_backward(z_NQ, weight_OI, left_OP, core_PQ, right_QI)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, g_NO: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        z_NQ, weight_OI, left_OP, core_PQ, right_QI = ctx.saved_tensors
        of_input, of_bias, of_core = (ctx.needs_input_grad[i] for i in (0, 4, 6))
        x = g_NO @ torch.addmm(weight_OI, left_OP @ core_PQ, right_QI) if of_input else None
        core = None
        if of_core:
            P, Q = core_PQ.shape
            core = (F.linear(g_NO, _with_full_vectors(left_OP.T)).T @ z_NQ)[:P, :Q]
        return x, None, None, None, g_NO.sum(0) if of_bias else None, None, core, None


def dense(delta: Delta) -> torch.Tensor:
    """Get dW_OI itself, in the dtype of the factors."""
    left_OQ = through_core_from_left(delta.left_OP, delta.core)
    return left_OQ @ delta.right_QI


def dense_stack(deltas: Sequence[Delta]) -> torch.Tensor:
    """Get dW_BOI of B updates of weights of one shape, in one batched product where they are equally wide."""
    if len({delta.right_QI.shape for delta in deltas}) > 1:
        return torch.stack([dense(delta) for delta in deltas])
    left_BOQ = torch.stack([through_core_from_left(delta.left_OP, delta.core) for delta in deltas])
    return left_BOQ @ torch.stack([delta.right_QI for delta in deltas])


def through_core_from_left(left_OP: torch.Tensor, core: torch.Tensor | SparseCore) -> torch.Tensor:
    """Get left_OP core_PQ, shape (O, Q)."""
    if not isinstance(core, SparseCore):
        return left_OP * core if core.ndim == 1 else left_OP @ core
    transposed = SparseCore(core.cols_C, core.rows_C, core.values_C, (core.shape[1], core.shape[0]))
    return through_core(left_OP, transposed)


def scale(delta: Delta, factor: float) -> Delta:
    """Get factor * dW in the same form."""
    core = delta.core
    if isinstance(core, SparseCore):
        return replace(delta, core=replace(core, values_C=core.values_C * factor))
    return replace(delta, core=core * factor)


def to_factors(delta: Delta) -> tuple[torch.Tensor, torch.Tensor]:
    """Get (B_OP, A_PI) with B A = dW exactly: the two matrices of a LoRA of rank min(P, Q).

    A sparse core first loses its empty rows and columns, so that few coefficients give a low rank.
    """
    left_OP, core, right_QI = delta.left_OP, delta.core, delta.right_QI
    if isinstance(core, SparseCore):
        delta = _without_empty_lines(delta, core)
        left_OP, core, right_QI = delta.left_OP, delta.core_matrix(), delta.right_QI
    if core.ndim == 1:
        return left_OP * core, right_QI
    rows_P, cols_Q = core.shape
    return (left_OP, core @ right_QI) if rows_P <= cols_Q else (left_OP @ core, right_QI)


def _without_empty_lines(delta: Delta, core: SparseCore) -> Delta:
    used_P, rows_C = core.rows_C.unique(return_inverse=True)
    used_Q, cols_C = core.cols_C.unique(return_inverse=True)
    small = SparseCore(rows_C, cols_C, core.values_C, (len(used_P), len(used_Q)))
    return Delta(delta.left_OP[:, used_P], small, delta.right_QI[used_Q])


def rank(delta: Delta, tolerance: float | None = None) -> int:
    """Get the numerical rank of dW: how many singular values exceed tolerance * the largest.

    QR of the two factors, then the singular values of the small middle; never an O x I SVD. The
    default tolerance is max(O, I) times the machine epsilon of the dtype.
    """
    S_P = singular_values(delta)
    if S_P.numel() == 0 or S_P[0] == 0:
        return 0
    if tolerance is None:
        tolerance = max(delta.shape) * torch.finfo(S_P.dtype).eps
    return int((tolerance * S_P[0] < S_P).sum())


def singular_values(delta: Delta) -> torch.Tensor:
    """Get the singular values of dW, descending, by QR of its factors."""
    B_OP, A_PI = to_factors(delta)
    R_left = torch.linalg.qr(B_OP, mode="r").R
    R_right = torch.linalg.qr(A_PI.T, mode="r").R
    return thin_svd(R_left @ R_right.T)[1]


def truncate(B_OP: torch.Tensor, A_PI: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Get the best factors of lower rank, and |B A - best|_F as a fraction of |B A|_F.

    QR of both factors, then the SVD of the small P x P middle (Eckart-Young); never an SVD of B A itself. The
    singular values are shared evenly between the two factors.
    """
    left_OP, R_left = torch.linalg.qr(B_OP)
    right_IP, R_right = torch.linalg.qr(A_PI.T)
    X_PP, S_P, Yh_PP = thin_svd(R_left @ R_right.T)
    total = float(torch.linalg.vector_norm(S_P))
    lost = float(torch.linalg.vector_norm(S_P[rank:])) / total if total else 0.0
    root_R = S_P[:rank].sqrt()
    return left_OP @ X_PP[:, :rank] * root_R, root_R[:, None] * (Yh_PP[:rank] @ right_IP.T), lost


def fix_signs(U_OR: torch.Tensor, Vh_RI: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Get the same singular directions with canonical signs: each u's largest entry is positive.

    A pair (u, v) and (-u, -v) are equally right; a solver returns either. This choice is stable
    unless two entries of u tie, so it helps but does not replace the alignment on load.
    """
    places_R = U_OR.abs().argmax(dim=0)
    signs_R = torch.sign(U_OR.gather(0, places_R[None]).squeeze(0))
    signs_R = torch.where(signs_R == 0, torch.ones_like(signs_R), signs_R)
    return U_OR * signs_R, Vh_RI * signs_R[:, None]
