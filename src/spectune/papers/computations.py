"""Published claims that need no training: counts of trained numbers, lemmas, the cost of the decomposition."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from ..algebra import dense
from ..methods import Method, build_method
from ..records import Delta, SparseCore, Spectrum
from ..spectrum import decompose

Shape = tuple[int, int]


@dataclass(frozen=True)
class Computed:
    """One claim: the paper's figure, the computed one, and whether they agree (None if that cannot be said)."""

    claim: str
    published: str
    found: str
    agrees: bool | None = None


# Model -> how often each O x I weight is adapted, for the modules that the papers name.
DEBERTA = {(768, 768): 36}
MISTRAL = {(4096, 4096): 64, (1024, 4096): 64, (14336, 4096): 32}  # q o, k v, gate
LLAMA_3 = {(4096, 4096): 32, (1024, 4096): 64, (14336, 4096): 64, (4096, 14336): 32}  # q, k v, up gate, down
GEMMA_2B = {(2048, 2048): 36, (256, 2048): 36, (16384, 2048): 36, (2048, 16384): 18}  # q o, k v, up gate, down
VIT_QV = {(768, 768): 24}
ONE_1024 = {(1024, 1024): 1}

# What is counted, on which weights, with which options, and the printed count (None for a formula).
COUNTS: list[tuple[str, str, dict[str, Any], dict[Shape, int], str, int | None]] = [
    ("DeBERTaV3-base q, k, v", "spectral_a", {"r": 24}, DEBERTA, "0.72% of 184M: 1,327,104", 1_327_104),
    ("Mistral-7B q, k, v, o, gate", "spectral_a", {"r": 8}, MISTRAL, "0.16% of 7.24B: 11,534,336", 11_534_336),
    ("Llama-3-8B q, k, v, up, down, gate", "spectral_a", {"r": 8}, LLAMA_3, "r (n + m) summed: 18,874,368", 18_874_368),
    ("Gemma-2B, seven kinds", "svft", {"pattern": "plain"}, GEMMA_2B, "0.19M", 190_000),
    ("Gemma-2B, seven kinds", "svft", {"pattern": "random", "off_diagonals": 16}, GEMMA_2B, "6.35M", 6_350_000),
    ("ViT-B query, value", "svft", {"pattern": "plain"}, VIT_QV, "18.5K", 18_500),
    ("one 1024 x 1024 weight", "spectral_r", {"r": 32}, ONE_1024, "2 r^2 = 2,048 (half of them redundant)", None),
    ("one 1024 x 1024 weight", "svdiff", {}, ONE_1024, "n = 1,024", 1_024),
    ("one 1024 x 1024 weight", "lidb", {"r": 1}, ONE_1024, "(a + b) r = 150", 150),
    ("one 1024 x 1024 weight", "specadapt", {"r": 1}, ONE_1024, "2 d r = 2,048 (and r^2 for the model)", 2_048),
]
# Printed counts are rounded to two or three digits.
ROUNDED = 0.03


def parameter_table() -> list[Computed]:
    """Get the counts of trained numbers that papers print."""
    rows = []
    for where, name, options, weights, printed, expected in COUNTS:
        method = build_method(name, options)
        found = sum(times * method.trainable_count(*shape) for shape, times in weights.items())
        said = ", ".join(f"{key}={value}" for key, value in options.items())
        agrees = None if expected is None else abs(found - expected) <= ROUNDED * expected
        rows.append(Computed(f"{name}({said}) on {where}", printed, f"{found:,}", agrees))
    return rows


def lemmas() -> list[Computed]:
    """Get each lemma's quantity on one random weight in float64, and the lemma's value."""
    rows, cols, r = 10, 12, 3
    W_OI = _gaussian(rows, cols, seed=0)
    full, top = (decompose(W_OI, k, solver="exact", dtype=torch.float64) for k in (None, r))
    # Lemma 3.1's least rank: the tuned part becomes minus the next r components.
    scale_R = full.S_R[r : 2 * r] / full.S_R[:r]
    spectral_a = build_method("spectral_a", {"r": r})
    added = (-full.U_OR[:, r : 2 * r] * scale_R - top.U_OR, full.Vh_RI[r : 2 * r] - top.Vh_RI)
    least = _rank(W_OI + dense(_update(spectral_a, top, *added)))
    lora = _rank(W_OI - (full.U_OR[:, :r] * full.S_R[:r]) @ full.Vh_RI[:r])
    found = [
        _equal("3.1: rank capacity of spectral_a with r = 3 is 2 r", 2 * r, _rank(W_OI) - least),
        _equal("3.1: rank capacity of LoRA with r = 3 is r", r, _rank(W_OI) - lora),
    ]
    method = build_method("spectral_r", {"r": r})
    angles = {n: _gaussian(*s, seed=i + 1) for i, (n, s) in enumerate(method.trained_shapes(rows, cols).items())}
    turned_OI = W_OI + dense(method.delta(top, angles, method.frozen(top)))
    change = float((torch.linalg.svdvals(turned_OI) - torch.linalg.svdvals(W_OI)).abs().max())
    found.append(_zero("4.1: spectral_r keeps every singular value; largest change", change))
    moved = float(torch.linalg.norm(turned_OI - W_OI) / torch.linalg.norm(W_OI))
    claim = "4.1: … although the weight changes; relative change"
    found.append(Computed(claim, "above 0", f"{moved:.2f}", moved > 0))
    return [*found, *_svft_lemmas(W_OI)]


def _svft_lemmas(W_OI: torch.Tensor) -> list[Computed]:
    full, K = decompose(W_OI, solver="exact", dtype=torch.float64), min(W_OI.shape)
    M_K = _gaussian(K, seed=9)
    tuned_OI = W_OI + dense(_update(build_method("svft", {}), full, M_K))
    off = full.U_OR.T @ tuned_OI @ full.Vh_RI.T - torch.diag(full.S_R + M_K)
    found = [_zero("SVFT (a): a diagonal M keeps the singular vectors; largest off-diagonal", float(off.abs().max()))]
    target_OI = _gaussian(*W_OI.shape, seed=10)
    method = build_method("svft", {"pattern": "banded", "off_diagonals": max(W_OI.shape), "full_basis": True})
    nothing = _update(method, full, torch.zeros(W_OI.numel(), dtype=torch.float64))
    M_OI = nothing.left_OP.T @ (target_OI - W_OI) @ nothing.right_QI.T
    assert isinstance(nothing.core, SparseCore)
    reached_OI = W_OI + dense(_update(method, full, M_OI[nothing.core.rows_C, nothing.core.cols_C]))
    gap_OI = target_OI - W_OI
    missed_OI = gap_OI - full.U_OR @ (full.U_OR.T @ gap_OI @ full.Vh_RI.T) @ full.Vh_RI
    found.append(_zero("SVFT (b): a dense M on the full basis reaches every target", _largest(reached_OI - target_OI)))
    missed = float(torch.linalg.norm(missed_OI) / torch.linalg.norm(gap_OI))
    claim = "SVFT (b): on the thin basis of its code, the share of a target that is out of reach"
    found.append(Computed(claim, "not said", f"{missed:.2f}"))
    few = build_method("svft", {"pattern": "random", "off_diagonals": 1})
    values_C = torch.zeros(few.trainable_count(*W_OI.shape), dtype=torch.float64)
    values_C[:4] = 1.0
    reached = _rank(dense(_update(few, full, values_C)))
    return [*found, Computed("SVFT (c): the rank of four coefficients", "at most 4", str(reached), reached <= 4)]


def _update(method: Method, spectrum: Spectrum, *numbers: torch.Tensor) -> Delta:
    """Get the update of these trained numbers, in the method's own order."""
    trained = dict(zip(method.trained_shapes(*spectrum.shape[:2]), numbers, strict=True))
    return method.delta(spectrum, trained, method.frozen(spectrum))


def svd_cost() -> list[Computed]:
    """Get the seconds for the top eight directions, against the full decomposition, of the flattest of weights."""
    rows = []
    for size in (768, 1536):
        W_OI = _gaussian(size, size, seed=size).float() / size**0.5
        whole, full = _seconds(partial(torch.linalg.svd, W_OI, full_matrices=False))
        quick, top = _seconds(partial(decompose, W_OI, 8))
        off = float((top.S_R - full[1][:8]).abs().max() / full[1][0])
        rows.append(
            Computed(
                f"{size} x {size} Gaussian, 8 directions ({torch.get_num_threads()} threads)",
                "the official code does the full SVD",
                f"{quick:.2f} s, full SVD {whole:.2f} s; singular values {off:.0e} off",
                off < 1e-4,
            )
        )
    return rows


def _seconds(work: Callable[[], Any]) -> tuple[float, Any]:
    started = time.perf_counter()
    found = work()
    return time.perf_counter() - started, found


def _gaussian(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def _rank(W_OI: torch.Tensor) -> int:
    # Absolute, since the weight may cancel to nothing; entries are of order one.
    return int(torch.linalg.matrix_rank(W_OI, atol=1e-8, rtol=0.0))


def _largest(W_OI: torch.Tensor) -> float:
    return float(W_OI.abs().max())


def _equal(claim: str, expected: int, found: int) -> Computed:
    return Computed(claim, str(expected), str(found), expected == found)


def _zero(claim: str, found: float) -> Computed:
    return Computed(claim, "0", f"{found:.0e}", found < 1e-9)


COMPUTATIONS: dict[str, Callable[[], Sequence[Computed]]] = {
    "parameter_table": parameter_table,
    "lemmas": lemmas,
    "svd_cost": svd_cost,
}
