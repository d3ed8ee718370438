"""How much of an update is kept: `Cut`, and the best factors of a matrix under it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..algebra import singular_values, truncate
from ..errors import OptionError
from ..records import Delta, Weight
from ..spectrum import decompose

# Up to this side all singular values are found at once: a second at most. Above, the first guess is this many
# directions, doubled until they are enough, all of them beyond an eighth. Chosen, not measured.
ALL_AT_ONCE = 1024
FIRST_GUESS = 32
MOST_GUESSED = 8
# |dW|^2 minus the squares of the found values is known in float32 to about this share; a finer limit needs them all.
FINEST_TAIL = 1e-5


@dataclass(frozen=True, kw_only=True)
class Cut:
    """Where the singular values of an update are cut off. With a share and a rank, the rank is the upper limit."""

    rank: int | None = None
    """Keep at most this many directions."""
    energy: float | None = None
    """Keep at least this share of |dW|_F^2, above 0 and up to 1; 1 drops only what is roundoff."""
    frobenius: float | None = None
    """Lose at most this share of |dW|_F, from 0 to below 1; F is the same as an energy of 1 - F^2."""

    def __post_init__(self) -> None:
        if self.rank is None and self.energy is None and self.frobenius is None:
            raise OptionError("nothing says how much to keep. Give a rank, an energy or a frobenius.")
        if self.rank is not None and (isinstance(self.rank, bool) or self.rank < 1):
            raise OptionError(f"rank={self.rank} must be at least 1.")
        if self.energy is not None and not 0 < self.energy <= 1:
            raise OptionError(f"energy={self.energy}: the share to keep must be above 0 and at most 1, such as 0.99.")
        if self.frobenius is not None and not 0 <= self.frobenius < 1:
            raise OptionError(
                f"frobenius={self.frobenius}: the share to lose must be at least 0 and below 1, such as 0.1."
            )

    @property
    def allowed(self) -> float | None:
        """The share of |dW|_F^2 that may be lost; None if only a rank is given."""
        shares = [] if self.energy is None else [1 - self.energy]
        shares += [] if self.frobenius is None else [self.frobenius**2]
        return min(shares, default=None)

    def rank_for(self, S_K: torch.Tensor, longest_side: int) -> int:
        """Get the smallest rank, at least 1, that keeps enough of these descending singular values.

        Values below longest_side * epsilon * S_K[0] are roundoff and count as zero.
        """
        most = len(S_K) if self.rank is None else min(self.rank, len(S_K))
        if self.allowed is None:
            return most
        squares_K = S_K.double() ** 2
        roundoff = longest_side * torch.finfo(S_K.dtype).eps * float(S_K[0])
        squares_K[S_K.double() <= roundoff] = 0
        lost_K = squares_K.flip(0).cumsum(0).flip(0)  # by keeping 0, 1, ... directions
        needed = int((lost_K > self.allowed * lost_K[0]).sum())
        return max(1, min(needed, most))


@dataclass(frozen=True, eq=False)
class Factors:
    """B_OP A_PI, the singular values split evenly between the two, and the share that they leave out."""

    B_OP: torch.Tensor
    A_PI: torch.Tensor
    lost: float
    """|dW - B A|_F, as a fraction of |dW|_F."""


def best_factors(dW: Weight, cut: Cut) -> Factors:
    """Get the best factors of a dense update under a cut (Eckart-Young), in float32.

    The right singular vectors come from `decompose`; the left factor is dW times them, so a small angle error in
    them only costs its square.
    """
    Vh_RI = _directions(dW, cut)
    dW_OI = dW.W_OI.to(Vh_RI.dtype)
    B_OP, A_PI, _ = truncate(dW_OI @ Vh_RI.mT, Vh_RI, len(Vh_RI))
    lost = torch.linalg.vector_norm(torch.addmm(dW_OI, B_OP, A_PI, alpha=-1)) / torch.linalg.vector_norm(dW_OI)
    return Factors(B_OP, A_PI, float(lost))


def cut_factors(B_OP: torch.Tensor, A_PI: torch.Tensor, cut: Cut) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Get the best factors of B A under a cut, and |B A - best|_F as a fraction of |B A|_F.

    QR of both factors and the SVD of their P x P middle; B A is never built. Factors that need no cut are returned
    unchanged, so that nothing is rounded.
    """
    S_P = singular_values(Delta(B_OP, B_OP.new_ones(len(A_PI)), A_PI))
    # A factor of more columns than rows has fewer singular values than columns; the rest are zero.
    rank = cut.rank_for(S_P, max(len(B_OP), A_PI.shape[1]))
    return (B_OP, A_PI, 0.0) if rank == len(A_PI) else truncate(B_OP, A_PI, rank)


def _directions(dW: Weight, cut: Cut) -> torch.Tensor:
    K, longest_side = min(dW.W_OI.shape), max(dW.W_OI.shape)
    if cut.allowed is None:
        return decompose(dW, min(cut.rank or K, K)).Vh_RI
    total = float(torch.linalg.vector_norm(dW.W_OI, dtype=torch.float64)) ** 2
    guess = K if K <= ALL_AT_ONCE or cut.allowed < FINEST_TAIL else FIRST_GUESS
    while True:
        spectrum = decompose(dW, guess)
        # Everything not found yet counts as one more value; a rank beyond the found ones means: find more.
        rest = spectrum.S_R.new_tensor([max(total - float((spectrum.S_R.double() ** 2).sum()), 0.0)]).sqrt()
        values = spectrum.S_R if guess == K else torch.cat([spectrum.S_R, rest])
        rank = cut.rank_for(values, longest_side)
        if rank <= guess:
            return spectrum.Vh_RI[:rank]
        guess = 2 * guess if 2 * guess * MOST_GUESSED <= K else K
