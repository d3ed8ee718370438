"""The public door of the room: `decompose`, and the table of solvers behind it."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from ..algebra import fix_signs
from ..errors import OptionError, WeightError, nearest
from ..records import Quality, Spectrum, Weight
from .columns import AnyColumns, Choice, choose
from .exact import PARTIAL_SHARE, exact, gram
from .found import Found
from .randomized import block_width, randomized, randomized_batch


class Solver(Protocol):
    """Finds the chosen directions of a finite float32 or float64 matrix."""

    def __call__(self, W_OI: torch.Tensor, choice: Choice, *, tolerance: float, seed: int) -> Found: ...


SOLVERS: dict[str, Solver] = {"exact": exact, "gram": gram, "randomized": randomized}

# `auto` takes block Krylov where this many blocks fit into K, and gives it up when the basis reaches
# K / GIVE_UP_SHARE. Measured: a real 384^2 weight (24 blocks at r = 8) needs 9 blocks, more than a third of
# K; real and power-law spectra at 2048^2 take 5 to 9, a flat one 28 at r = 8.
BLOCKS_IN_K = 24
GIVE_UP_SHARE = 2
# The Gram matrix saves the SVD's work on the longer side, so from some aspect on it is the faster one. Chosen.
GRAM_ASPECT = 1.5
# Up to this K, on the CPU, a few eigenvectors of the Gram matrix come faster than block Krylov. Measured with one
# thread, r = 16: real 576^2 weights 19 ms against 28 (10 steps), 1536 x 576 27 against 48; not so at 1024^2.
GRAM_UP_TO = 640
# Squares of entries must neither overflow nor vanish in float32 (3e38, 1e-38). Derived.
PLAIN_RANGE = (1e-12, 1e12)
# Weights that are solved together: large enough to fill a GPU, small next to a model. Chosen.
BATCH_BYTES = 64 * 2**20
DTYPES = (torch.float32, torch.float64)
# Devices with float64 and torch.linalg; the work for others (mps, ...) is done on the CPU.
LINALG_DEVICES = ("cpu", "cuda")


def decompose(
    weight: Weight | torch.Tensor,
    rank: int | None = None,
    *,
    solver: str = "auto",
    columns: AnyColumns = "top",
    tolerance: float = 1e-4,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Spectrum:
    """Get `rank` singular directions of a weight (all K for None), signs canonical, quality measured.

    W_OI ~ U_OR diag(S_R) Vh_RI + what is left out, on the weight's device, in `dtype` (float32 or
    float64). `tolerance` is the largest wanted angle in radians between the found and the true leading
    subspace, as far as the gap at the cut allows certifying it; direct solvers reach roundoff / gap.
    `columns` names the directions ("top", "bottom", "random", a start index, a list of places), `solver`
    one of SOLVERS or "auto"; `quality.solver` says which one ran. Equal seeds give equal bits on one
    machine; the global random state is not touched. Warns when an explicit `randomized` gives up.
    Raises `WeightError` or `OptionError`.
    """
    weight = weight if isinstance(weight, Weight) else Weight("weight", weight)
    request = Request(rank, columns, solver, tolerance, seed, dtype)
    (spectrum,) = _decompose_alike([weight], request)
    return spectrum


@dataclass(frozen=True)
class Request:
    """The arguments of `decompose`, as one record."""

    rank: int | None = None
    columns: AnyColumns = "top"
    solver: str = "auto"
    tolerance: float = 1e-4
    seed: int = 0
    dtype: torch.dtype = torch.float32


def decompose_many(
    weights: Sequence[Weight],
    request: Request = Request(),
    on_done: Callable[[Weight], None] | None = None,
) -> list[Spectrum]:
    """Get the spectra of many weights, in their order; those of equal shape are solved together.

    Same results as `decompose` for each, up to roundoff. A batch is at most BATCH_BYTES of weights in the dtype of
    the work, so that no copy of the whole model is made. `on_done` is called with each finished weight.
    """
    spectra: dict[int, Spectrum] = {}
    for places in batches([tuple(weight.W_OI.shape) for weight in weights], request.dtype):
        found = _decompose_alike([weights[place] for place in places], request)
        spectra |= zip(places, found, strict=True)
        for place in places if on_done else ():
            on_done(weights[place])  # type: ignore[misc]
    return [spectra[place] for place in range(len(weights))]


def batches(shapes: Sequence[tuple[int, ...]], dtype: torch.dtype) -> Iterator[list[int]]:
    """Get the places of equal shapes together, at most BATCH_BYTES in each batch, in the order of their first."""
    alike: dict[tuple[int, ...], list[int]] = {}
    for place, shape in enumerate(shapes):
        alike.setdefault(shape, []).append(place)
    for shape, places in alike.items():
        count = max(1, BATCH_BYTES // max(1, math.prod(shape) * dtype.itemsize))
        for start in range(0, len(places), count):
            yield places[start : start + count]


def _decompose_alike(weights: list[Weight], request: Request) -> list[Spectrum]:
    """Get the spectra of weights of one shape."""
    for weight in weights:
        _check_options(weight.name, request.solver, request.tolerance, request.dtype)
    choices = [_choice(weight, request.columns, request.rank, request.seed) for weight in weights]
    plain = [_plain(weight, request.dtype) for weight in weights]
    found = _solve([W_OI for W_OI, _ in plain], choices[0], request)
    spectra = []
    for weight, (W_OI, scale), one in zip(weights, plain, found, strict=True):
        spectrum = _spectrum(weight, W_OI, one, choices[0], scale)
        if not spectrum.quality.converged:
            _warn(spectrum)
        spectra.append(spectrum)
    return spectra


def _check_options(name: str, solver: str, tolerance: float, dtype: torch.dtype) -> None:
    if solver != "auto" and solver not in SOLVERS:
        raise OptionError(f"{name}: unknown solver={solver!r}. {nearest(solver, ('auto', *SOLVERS))}")
    if dtype not in DTYPES:
        raise OptionError(f"{name}: cannot compute in {dtype}. Choose torch.float32 or torch.float64.")
    if not 0 < tolerance < math.inf:
        raise OptionError(f"{name}: tolerance={tolerance} is not a positive angle. Give a positive number of radians.")


def requested_places(weight: Weight, request: Request) -> tuple[int, ...]:
    """Get the places in the descending spectrum of this weight that a request names."""
    return _choice(weight, request.columns, request.rank, request.seed).places


def _choice(weight: Weight, columns: AnyColumns, rank: int | None, seed: int) -> Choice:
    """Get the places; the inner message gains the weight's name and shape."""
    W_OI, name = weight.W_OI, weight.name
    shape = "x".join(map(str, W_OI.shape))
    if W_OI.ndim != 2:
        raise WeightError(
            f"{name}: the weight is {W_OI.ndim}-D ({shape or 'scalar'}), but only a matrix has singular directions. "
            "Flatten it to out x in, or exclude the layer."
        )
    if W_OI.numel() == 0:
        raise WeightError(f"{name}: the {shape} weight is empty. Exclude the layer.")
    try:
        return choose(columns, rank, min(W_OI.shape), seed)
    except WeightError as error:
        raise WeightError(f"{name}: {str(error).replace('{shape}', shape)}") from None
    except OptionError as error:
        raise OptionError(f"{name}: {error}") from None


def _plain(weight: Weight, dtype: torch.dtype) -> tuple[torch.Tensor, float]:
    """Get (W / scale, scale) in `dtype`: cast once, finite, scaled by a power of two only if it must be."""
    W_OI, name = weight.W_OI.detach(), weight.name
    if not W_OI.dtype.is_floating_point:
        raise WeightError(
            f"{name}: a weight in {W_OI.dtype} (quantised?) cannot be decomposed. Dequantise it to a floating dtype "
            "first, or exclude the layer."
        )
    if W_OI.is_meta:
        raise WeightError(f"{name}: the weight is on the meta device and has no values. Load it first.")
    device = W_OI.device if W_OI.device.type in LINALG_DEVICES else torch.device("cpu")
    # float64 is narrowed only after scaling; everything else fits into float32 as it is.
    wide_OI = W_OI.to(device, torch.promote_types(W_OI.dtype, dtype))
    low, high = (float(bound) for bound in torch.aminmax(wide_OI))
    largest = max(-low, high)
    if not (math.isfinite(low) and math.isfinite(high)):
        bad = int((~torch.isfinite(wide_OI)).sum())
        raise WeightError(
            f"{name}: {bad} of the weight's {W_OI.numel()} entries are NaN or infinite. Repair the checkpoint or "
            "exclude the layer."
        )
    limits = torch.finfo(dtype)
    if largest and not limits.tiny <= largest <= limits.max / math.sqrt(W_OI.numel()):
        raise WeightError(
            f"{name}: the largest entry, {largest:.3g}, is out of range for computing in {dtype}. Pass "
            "dtype=torch.float64, rescale the weight or exclude the layer."
        )
    scale = 1.0
    if largest and not PLAIN_RANGE[0] <= largest <= PLAIN_RANGE[1]:
        scale = 2.0 ** math.frexp(largest)[1]
        wide_OI = wide_OI / scale
    return wide_OI.to(dtype), scale


def _solve(weights: list[torch.Tensor], choice: Choice, request: Request) -> list[Found]:
    tolerance, seed = request.tolerance, request.seed
    if request.solver == "randomized":
        return randomized_batch(_stack(weights), choice, tolerance=tolerance, seed=seed)
    if request.solver != "auto":
        return [SOLVERS[request.solver](W_OI, choice, tolerance=tolerance, seed=seed) for W_OI in weights]
    small = choice.K <= GRAM_UP_TO and direct_solver(weights[0], choice) == "gram"
    if small or block_width(choice.leading, choice.K) * BLOCKS_IN_K > choice.K:
        return [_directly(W_OI, choice, request) for W_OI in weights]
    most_rows = choice.K // GIVE_UP_SHARE
    found = randomized_batch(_stack(weights), choice, tolerance=tolerance, seed=seed, most_rows=most_rows)
    return [
        one if one.converged else _directly(W_OI, choice, request) for W_OI, one in zip(weights, found, strict=True)
    ]


def _stack(weights: list[torch.Tensor]) -> torch.Tensor:
    return weights[0][None] if len(weights) == 1 else torch.stack(weights)


def _directly(W_OI: torch.Tensor, choice: Choice, request: Request) -> Found:
    return SOLVERS[direct_solver(W_OI, choice)](W_OI, choice, tolerance=request.tolerance, seed=request.seed)


def direct_solver(W_OI: torch.Tensor, choice: Choice) -> str:
    """Get the faster direct solver: squaring loses nothing that float32 could show, but it would in float64."""
    if W_OI.dtype != torch.float32:
        return "exact"
    few = not W_OI.is_cuda and PARTIAL_SHARE * choice.leading <= choice.K
    return "gram" if few or max(W_OI.shape) >= GRAM_ASPECT * min(W_OI.shape) else "exact"


def _spectrum(weight: Weight, W_OI: torch.Tensor, found: Found, choice: Choice, scale: float) -> Spectrum:
    quality = _measure(W_OI, found, choice)
    U_OR, Vh_RI = fix_signs(found.U_OR, found.Vh_RI)
    spectrum = Spectrum(U_OR, found.S_R * scale, Vh_RI.contiguous(), choice.places, quality, weight.name)
    return spectrum.to(weight.W_OI.device)


def _measure(W_OI: torch.Tensor, found: Found, choice: Choice) -> Quality:
    """Get the quality of the kept directions by multiplying with W; no solver is trusted."""
    U_OR, Vh_RI = found.U_OR, found.Vh_RI
    largest = float(found.values_J[0]) or 1.0
    residual = residual_of(W_OI, U_OR, found.S_R, Vh_RI) / largest
    bent_RR = torch.stack([U_OR.mT @ U_OR, Vh_RI @ Vh_RI.mT])
    bent_RR.diagonal(dim1=1, dim2=2).sub_(1)
    orthogonality = float(bent_RR.abs().max())
    gap = gap_at(found.values_J, choice.places, choice.K) / largest
    return Quality(found.solver, residual, orthogonality, gap, found.steps, found.converged)


def residual_of(W_OI: torch.Tensor, U_OR: torch.Tensor, S_R: torch.Tensor, Vh_RI: torch.Tensor) -> float:
    """Get max_i of |W v_i - s_i u_i| and |W^T u_i - s_i v_i|."""
    right_R = torch.linalg.vector_norm(torch.addmm(U_OR * S_R, W_OI, Vh_RI.mT, beta=-1), dim=0)
    left_R = torch.linalg.vector_norm(torch.addmm(S_R[:, None] * Vh_RI, U_OR.mT, W_OI, beta=-1), dim=1)
    return float(torch.maximum(right_R, left_R).max())


def gap_at(values_J: torch.Tensor, places: Sequence[int], K: int) -> float:
    """Get the least distance between a kept value and one left out; infinite when all are kept."""
    if len(places) == K:
        return math.inf
    kept_J = torch.zeros(len(values_J), dtype=torch.bool)
    kept_J[list(places)] = True
    # The values descend, so a kept one is nearest to a neighbour of the other kind.
    border_J = kept_J[1:] != kept_J[:-1]
    return float((values_J[:-1] - values_J[1:])[border_J].min().clamp_min(0))


def _warn(spectrum: Spectrum) -> None:
    quality = spectrum.quality
    warnings.warn(
        f"{spectrum.name}: randomized did not converge in {quality.steps} steps: residual {quality.residual:.1e}, "
        f"gap {quality.gap:.1e} (fractions of the largest singular value). Use solver='auto' or a wider tolerance.",
        stacklevel=4,
    )
