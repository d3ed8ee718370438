"""Part c: the leading directions of large weights: this engine, torch's SVDs and drivers, a polar-factor experiment."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch

from spectune import Weight, decompose
from spectune.spectrum import Request
from spectune.spectrum.engine import decompose_many

from .llama import SHAPES, TARGETS, llama
from .notebook import Notebook, NotHere, Setting
from .timing import milliseconds, peak_mib

RANKS = (16, 64)
DRIVERS = ("gesvda", "gesvdj", "gesvd")
LOWRANK_STEPS = (2, 4, 8)
# sign(X) by X <- 1.5 X - 0.5 X^3 grows a small eigenvalue by 1.5 a step; stops here or when X^2 stands at I.
MOST_SIGN_STEPS = 40
Triplets = tuple[torch.Tensor, torch.Tensor]


class Known:
    """A weight whose SVD is known: s_i = i^-1/2 between random orthogonal factors."""

    def __init__(self, rows_O: int, cols_I: int, device: str) -> None:
        random = torch.Generator(device).manual_seed(0)
        K = min(rows_O, cols_I)
        kind = {"generator": random, "device": device}
        self.U_OK, self.V_IK = (torch.linalg.qr(torch.randn(n, K, **kind)).Q for n in (rows_O, cols_I))
        self.S_K = torch.arange(1, K + 1, device=device) ** -0.5
        self.W_OI = (self.U_OK * self.S_K) @ self.V_IK.mT

    def angle(self, U_OR: torch.Tensor, V_IR: torch.Tensor) -> float:
        """Get the sine of the largest angle to the true leading subspaces, of both sides."""
        worst = 0.0
        for true_NK, found_NR in ((self.U_OK, U_OR), (self.V_IK, V_IR)):
            true_NR = true_NK[:, : found_NR.shape[1]].double()
            found_NR = torch.linalg.qr(found_NR.double()).Q
            rest_NR = found_NR - true_NR @ (true_NR.mT @ found_NR)
            worst = max(worst, float(torch.linalg.matrix_norm(rest_NR, 2)))
        return worst


def engine(W_OI: torch.Tensor, r: int) -> Triplets:
    found = decompose(W_OI, r)
    return found.U_OR, found.Vh_RI.mT


def full(W_OI: torch.Tensor, r: int, driver: str | None = None) -> Triplets:
    if driver is not None and not W_OI.is_cuda:
        raise NotHere("needs CUDA: the driver is cuSOLVER's")
    U_OK, _, Vh_KI = torch.linalg.svd(W_OI, full_matrices=False, driver=driver)
    return U_OK[:, :r], Vh_KI[:r].mT


def lowrank(W_OI: torch.Tensor, r: int, steps: int) -> Triplets:
    torch.manual_seed(0)
    U_OR, _, V_IR = torch.svd_lowrank(W_OI, q=r + 8, niter=steps)
    return U_OR[:, :r], V_IR[:, :r]


def by_sign(known: Known, r: int) -> Triplets:
    """An experiment, only measured: the projector on the leading subspace as a matrix sign, by Newton and Schulz.

    P = (I + sign(A - mu I)) / 2 with A = V diag(S^2) V^T the smaller Gram matrix and mu between S_r^2 and S_(r+1)^2,
    which is taken as known. Products of K x K alone, the work that a GPU is best at; a random block through P, then QR.
    It is the polar factor of A - mu I. No certificate, and mu would have to be found first.
    """
    W_OI = known.W_OI if known.W_OI.shape[0] >= known.W_OI.shape[1] else known.W_OI.mT
    A_KK = W_OI.mT @ W_OI
    eye_KK = torch.eye(len(A_KK), device=A_KK.device)
    mu = float(known.S_K[r - 1] ** 2 + known.S_K[r] ** 2) / 2
    X_KK = (A_KK - mu * eye_KK) / max(mu, float(known.S_K[0] ** 2) - mu)
    for step in range(MOST_SIGN_STEPS):
        square_KK = X_KK @ X_KK
        if step % 4 == 3 and float((square_KK - eye_KK).abs().max()) < 1e-5:
            break
        X_KK = 1.5 * X_KK - 0.5 * X_KK @ square_KK
    random = torch.Generator(A_KK.device).manual_seed(0)
    block_KR = torch.randn(len(A_KK), r, generator=random, device=A_KK.device)
    V_KR = torch.linalg.qr((block_KR + X_KK @ block_KR) / 2).Q
    U_OR = torch.linalg.qr(W_OI @ V_KR).Q
    return (U_OR, V_KR) if W_OI is known.W_OI else (V_KR, U_OR)


def methods(known: Known, r: int) -> dict[str, Callable[[], Triplets]]:
    """Get what is compared, the cheap ones first."""
    W_OI = known.W_OI
    table: dict[str, Callable[[], Triplets]] = {"spectune": lambda: engine(W_OI, r)}
    for steps in LOWRANK_STEPS:
        table[f"svd_lowrank, {steps} steps"] = lambda steps=steps: lowrank(W_OI, r, steps)
    table["experiment: matrix sign, Newton-Schulz"] = lambda: by_sign(known, r)
    if r == RANKS[0]:  # a full SVD costs the same whatever r is
        table["torch.linalg.svd"] = lambda: full(W_OI, r)
        for driver in DRIVERS:
            table[f"torch.linalg.svd, {driver}"] = lambda driver=driver: full(W_OI, r, driver)
    return table


def is_slow(method: str) -> bool:
    return method.startswith("torch.linalg.svd")


def measure(setting: Setting, known: Known, r: int, method: str) -> dict[str, Any]:
    """Get the median time of a method (one call of a full SVD, three of the others), its angle, its certificate."""
    job = methods(known, r)[method]
    if not is_slow(method):
        job()
    found: list[Triplets] = []
    times = [milliseconds(setting, lambda: found.append(job())) for _ in range(1 if is_slow(method) else 3)]
    row: dict[str, Any] = {"milliseconds": round(statistics.median(times), 3), "rounds": len(times)}
    row["angle"] = known.angle(*found[0])
    if method == "spectune":
        quality = decompose(known.W_OI, r).quality
        row |= {name: getattr(quality, name) for name in ("solver", "steps", "converged", "residual", "gap")}
        row["peak_mib"] = peak_mib(setting, job)
    return row


def whole_model(setting: Setting, shape: str, weights: list[Weight], r: int, method: str) -> dict[str, Any]:
    """Get the seconds of all linear weights of a model, and the worst certificate among them."""
    found: list[Any] = []

    def ours() -> None:
        found.extend(decompose_many(weights, Request(r)))

    def theirs() -> None:
        for weight in weights:
            lowrank(weight.W_OI.float(), r, 4)

    seconds = milliseconds(setting, ours if method == "spectune" else theirs) / 1000
    row: dict[str, Any] = {"milliseconds": round(1000 * seconds, 1), "rounds": 1, "weights": len(weights)}
    if found:
        row |= {"solvers": sorted({one.quality.solver for one in found})}
        row |= {"converged": all(one.quality.converged for one in found)}
        row |= {"residual": max(one.quality.residual for one in found), "gap": min(one.quality.gap for one in found)}
        row |= {"orthogonality": max(one.quality.orthogonality for one in found)}
    return row


def all_weights(setting: Setting, notebook: Notebook, shape: str) -> None:
    model = llama(shape, setting)
    named = model.named_modules()
    weights = [Weight(path, m.weight.detach()) for path, m in named if path.rpartition(".")[2] in TARGETS]
    for r in (r for r in RANKS if r < min(SHAPES[shape][:2]) // 2):
        for method in ("spectune", "svd_lowrank, 4 steps"):
            name = f"all linear weights of {shape}, r = {r}: {method}"
            notebook.row(name, lambda r=r, method=method: whole_model(setting, shape, weights, r, method))


def run(setting: Setting, notebook: Notebook) -> None:
    shapes = [(96, 96), (96, 160)] if setting.tiny else [(4096, 4096), (4096, 14336)]
    known = {f"{rows} x {cols}": Known(rows, cols, setting.device) for rows, cols in shapes}
    rows = [(place, r, method) for place, one in known.items() for r in RANKS for method in methods(one, r)]
    notebook.plan([f"{place}, r = {r}: {method}" for place, r, method in rows])
    for slow in (False, True):
        for place, r, method in rows:
            if is_slow(method) == slow:
                name = f"{place}, r = {r}: {method}"
                notebook.row(name, lambda p=place, r=r, m=method: measure(setting, known[p], r, m))
        if not slow:
            all_weights(setting, notebook, "tiny" if setting.tiny else "8B")
