"""Rotate a recomputed basis to match the one that an adapter was trained in: `sketch` on save, `align` on load.

Singular vectors are unique up to sign, and up to a rotation where values (nearly) repeat; another
LAPACK, device or dtype of the base returns different ones. A sketch is a few random probes of every direction;
it shows which signs and rotations were meant, and whether this is the same weight at all.
"""

from __future__ import annotations

import math

import numpy as np
import torch

from ..errors import AdapterError
from ..records import Spectrum
from .prior import Prior, change_of_base, strongest

# Of the Gaussian probes. Part of the file format: never change it.
SKETCH_SEED = 20240522
# bfloat16 keeps 8 binary digits: rounding changes an entry by at most 2^-9 of it. The largest change of
# the base that turning may explain; float16 rounds 8 times finer.
BFLOAT16_ROUNDING = 2.0**-9
# Small turns after the first, gross one. Measured, as below: two are enough for top directions, but left
# one bfloat16 copy's bottom directions at 0.11, above its tolerance of 0.04; with four it is at 0.011.
SMALL_TURNS = 4
# A sketch that is met this closely is not turned further. A sketch is kept in float32, whose rounding is 3e-8 of it;
# the same solver finds a basis again to the last bits, another one on the same weight leaves 5e-6 to 6e-5. Measured.
NOTHING_TO_TURN = 1e-6
# Up to this R a sketch resolves any rotation of all R directions by itself; above, the closeness of
# the singular values says which neighbours matter: 10 probes a side reach 20 of them. Measured.
FULLY_RESOLVED = 16
SPARE_COLUMNS = 4
WIDE_WIDTH = 10
# When a base is refused. Measured on 12 weights of all-MiniLM-L6-v2, R = 4 ... 384, top directions: a
# bfloat16 copy leaves at most 0.0051 of the sketch unexplained (float16 0.0006), 5% noise at least 0.029,
# a random weight 0.98. Where the gap is small, rounding mixes in directions that were not kept: up to 2.9
# times `change / gap / sqrt(R)` (0.08 for random columns). The ceiling is a third of a foreign weight's.
ALWAYS_ALLOWED = 0.01
ALLOWED_PER_MIXING = 3.0
NEVER_ALLOWED = 0.35


def sketch_width(R: int) -> int:
    """Get the number of probes per side for R directions: 2 * width >= R + 4 up to R = 16, 10 above."""
    return -(-(R + SPARE_COLUMNS) // 2) if R <= FULLY_RESOLVED else WIDE_WIDTH


def sketch(spectrum: Spectrum, width: int, seed: int = SKETCH_SEED) -> torch.Tensor:
    """Get the fingerprint of a basis that an adapter file stores: float32, R x 2 width, on the CPU.

    T_RT = [U_OR^T G_Ow, Vh_RI H_Iw] / sqrt(2 width);  G, H standard normal, so a row has length ~1.
    The stream of numpy's RandomState is frozen: the same probes on every machine and version.
    """
    return _probe(spectrum, width, seed).float()


def _probe(spectrum: Spectrum, width: int, seed: int) -> torch.Tensor:
    random = np.random.RandomState(seed)
    O, I, _ = spectrum.shape
    G_Ow, H_Iw = (torch.from_numpy(random.standard_normal((side, width))) for side in (O, I))
    U_OR, Vh_RI = spectrum.U_OR.detach().double().cpu(), spectrum.Vh_RI.detach().double().cpu()
    probes_RT: torch.Tensor = torch.cat([U_OR.mT @ G_Ow, Vh_RI @ H_Iw], dim=1)
    return probes_RT / math.sqrt(2 * width)


def align(
    spectrum: Spectrum,
    stored_RT: torch.Tensor,
    tolerance: float = BFLOAT16_ROUNDING,
    seed: int = SKETCH_SEED,
) -> tuple[Spectrum, float]:
    """Get the spectrum rotated to match a stored sketch, and the share of the sketch that this does not explain.

    U = U' X_U, Vh = X_V^T Vh', both X orthogonal; S stays. `tolerance` is how far an entry of the base may
    have been rounded, as a fraction of it. A change e of the base turns directions i, j by about
        (X_U + X_V) / 2: e / |s_i - s_j|;   (X_U - X_V) / 2: e / (s_i + s_j),
    so these are the spreads of a Gaussian prior, and each row of X is its best estimate given the
    sketch (ridge regression). Directions of close values rotate freely, others hardly: U diag(S) Vh moves by
    about e. U and Vh rotate differently only where s is near zero. A basis that already matches is
    returned as it is, without that work, which grows with R^3. The unexplained share is
    |stored - sketch(result)|_F / |stored|_F: ~0.002 for a rounded base, about 1.2 for another weight.
    Cannot resolve more than 2 width directions of one exactly repeated value. Raises `AdapterError`.
    """
    stored_RT = _checked(spectrum, stored_RT)
    width = stored_RT.shape[1] // 2
    probe_RT = _probe(spectrum, width, seed)
    if (unexplained := _unexplained(stored_RT, probe_RT)) <= NOTHING_TO_TURN:
        return spectrum, unexplained
    prior = Prior(spectrum, tolerance)
    turn_U_RR, turn_V_RR = prior.gross_turn(stored_RT, probe_RT)
    turned_RT = _turn(probe_RT, turn_U_RR, turn_V_RR)
    for _ in range(SMALL_TURNS):
        if _unexplained(stored_RT, turned_RT) <= NOTHING_TO_TURN:
            break  # other signs, or equal values, were all there was
        small_U_RR, small_V_RR = prior.small_turn(stored_RT, turned_RT)
        turn_U_RR, turn_V_RR = turn_U_RR @ small_U_RR, turn_V_RR @ small_V_RR
        turned_RT = _turn(probe_RT, turn_U_RR, turn_V_RR)
    return _turned(spectrum, turn_U_RR, turn_V_RR), _unexplained(stored_RT, turned_RT)


def _unexplained(stored_RT: torch.Tensor, found_RT: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(stored_RT - found_RT) / torch.linalg.vector_norm(stored_RT))


def _checked(spectrum: Spectrum, stored_RT: torch.Tensor) -> torch.Tensor:
    R = spectrum.shape[2]
    found = "x".join(map(str, stored_RT.shape))
    if stored_RT.ndim != 2 or stored_RT.shape[0] != R or stored_RT.shape[1] < 2 or stored_RT.shape[1] % 2:
        raise AdapterError(
            f"{spectrum.name}: the stored sketch is {found}, but {R} directions need {R} x an even number. Load the "
            "adapter with the rank and columns that it was trained with."
        )
    if not bool(torch.isfinite(stored_RT).all()) or not bool(stored_RT.any()):
        raise AdapterError(
            f"{spectrum.name}: the stored sketch of the {R} directions is all zeros, or contains NaN or infinity. The "
            "file is damaged: copy it again."
        )
    return stored_RT.detach().double().cpu()


def _turn(probe_RT: torch.Tensor, turn_U_RR: torch.Tensor, turn_V_RR: torch.Tensor) -> torch.Tensor:
    """Get the sketch of the turned basis without touching the basis."""
    left_Rw, right_Rw = probe_RT.chunk(2, dim=1)
    return torch.cat([turn_U_RR.mT.double() @ left_Rw, turn_V_RR.mT.double() @ right_Rw], dim=1)


def _turned(spectrum: Spectrum, turn_U_RR: torch.Tensor, turn_V_RR: torch.Tensor) -> Spectrum:
    U_OR = spectrum.U_OR @ turn_U_RR.to(spectrum.U_OR)
    Vh_RI = turn_V_RR.mT.to(spectrum.Vh_RI) @ spectrum.Vh_RI
    return Spectrum(U_OR, spectrum.S_R, Vh_RI, spectrum.columns, spectrum.quality, spectrum.name)


def sketch_tolerance(spectrum: Spectrum, tolerance: float = BFLOAT16_ROUNDING) -> float:
    """Get the unexplained share above which a spectrum from `align` must belong to another base weight.

    0.01 + 3 change / (gap sqrt(R)), at most 0.35; change and gap in units of the weight. Rounding to
    `tolerance` stays under it, so a base with a small gap at the cut is told apart less sharply.
    """
    gap = spectrum.quality.gap * strongest(spectrum)
    mixing = change_of_base(spectrum, tolerance) / gap if gap > 0 else math.inf
    allowed = ALWAYS_ALLOWED + ALLOWED_PER_MIXING * mixing / spectrum.shape[2] ** 0.5
    return float(min(allowed, NEVER_ALLOWED))
