"""How rounding the base moves its singular directions, and the rotation that a sketch then shows."""

from __future__ import annotations

import torch

from ..records import Spectrum
from ..thin_svd import thin_svd

# Change of a sketch row that the model leaves to chance (directions outside the kept ones, second
# order), for rows of length 1. Measured on all-MiniLM-L6-v2, r = 8, 32, 384: best of 3e-4, 3e-3, 3e-2.
SKETCH_NOISE = 3e-3
# A turn beyond three standard deviations is not the rounding that the prior describes. The usual bound
# of a Gaussian; chosen, and the figures at `align.ALWAYS_ALLOWED` are measured with it.
MOST_SPREADS = 3.0
# Neighbours closer than this many expected changes are one cluster: their rotation may be of any size.
# Chosen: the prior angle between neighbours is then at least 1/10 rad, beyond which first order fails.
CLUSTER_SPACING = 10.0


class Prior:
    """How far each pair of directions may have rotated, and the estimate of how far it did."""

    def __init__(self, spectrum: Spectrum, tolerance: float) -> None:
        S_R = spectrum.S_R.detach().double().cpu()
        self.dtype = S_R.dtype if spectrum.U_OR.dtype == torch.float64 else torch.float32
        change = max(change_of_base(spectrum, tolerance), torch.finfo(torch.float64).tiny)
        # Variances of the joint and of the opposite turn; 1 is "anything", half of it for each.
        self.joint_RR = _variance(S_R[:, None] - S_R, change)
        self.opposite_RR = _variance(S_R[:, None] + S_R, change)
        self.order_R = S_R.argsort(descending=True, stable=True)
        steps = S_R[self.order_R].diff().abs()
        self.clusters = torch.tensor_split(
            self.order_R, (1 + (steps > CLUSTER_SPACING * change).nonzero().flatten()).tolist()
        )

    def gross_turn(self, stored_RT: torch.Tensor, probe_RT: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Get the turns of any size: signs everywhere, rotations within each cluster."""
        turns = self._estimate(stored_RT, probe_RT, self.joint_RR, self.opposite_RR)
        return self._polar_per_cluster(turns[0]), self._polar_per_cluster(turns[1])

    def _polar_per_cluster(self, X_RR: torch.Tensor) -> torch.Tensor:
        turn_RR = torch.zeros_like(X_RR)
        for cluster_r in self.clusters:
            left_rr, _, right_rr = thin_svd(X_RR[cluster_r[:, None], cluster_r])
            turn_RR[cluster_r[:, None], cluster_r] = left_rr @ right_rr
        return turn_RR.mT.to(self.dtype)

    def small_turn(self, stored_RT: torch.Tensor, turned_RT: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Get the turns that are left, between all pairs: Cayley's orthogonal matrix of the skew estimate."""
        joint_RR = self.joint_RR.clone().fill_diagonal_(0)
        opposite_RR = self.opposite_RR.clone().fill_diagonal_(0)
        X_RR, Y_RR = self._estimate(stored_RT - turned_RT, turned_RT, joint_RR, opposite_RR)
        half_U_RR, half_V_RR = ((turn_RR.mT - turn_RR).to(self.dtype) / 4 for turn_RR in (X_RR, Y_RR))
        return _cayley(half_U_RR), _cayley(half_V_RR)

    def _estimate(
        self,
        wanted_RT: torch.Tensor,
        probe_RT: torch.Tensor,
        joint_RR: torch.Tensor,
        opposite_RR: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Get (X_RR, Y_RR), wanted ~ [X left probe, Y right probe], most probable under the prior.

        Row i, with D the variances of its turns and F their probes:  x = D F^T (F D F^T + noise)^-1 wanted,
        a system of only 2 width equations, whatever R is.
        """
        R, T = probe_RT.shape
        left_Rw, right_Rw = probe_RT.chunk(2, dim=1)
        mirror_RT = torch.cat([left_Rw, -right_Rw], dim=1)
        spread_RTT = sum(
            (variance_RR @ (p_RT[:, :, None] * p_RT[:, None, :]).reshape(R, T * T)).reshape(R, T, T)
            for variance_RR, p_RT in ((joint_RR, probe_RT), (opposite_RR, mirror_RT))
        )
        noise_TT = SKETCH_NOISE**2 / T * torch.eye(T, dtype=probe_RT.dtype)
        z_RT = torch.linalg.solve(spread_RTT + noise_TT, wanted_RT[:, :, None]).squeeze(2)
        joint_turn_RR = _limited(joint_RR * (z_RT @ probe_RT.mT), joint_RR)
        opposite_turn_RR = _limited(opposite_RR * (z_RT @ mirror_RT.mT), opposite_RR)
        return joint_turn_RR + opposite_turn_RR, joint_turn_RR - opposite_turn_RR


def _variance(distance_RR: torch.Tensor, change: float) -> torch.Tensor:
    return (change / distance_RR).square().clamp_max(1.0) / 2


def _limited(turn_RR: torch.Tensor, variance_RR: torch.Tensor) -> torch.Tensor:
    """Get the turns cut to MOST_SPREADS: a foreign sketch would stretch the prior as far as it needs."""
    limit_RR = MOST_SPREADS * variance_RR.sqrt()
    return turn_RR.clamp(-limit_RR, limit_RR)


def _cayley(half_RR: torch.Tensor) -> torch.Tensor:
    """Get (I - A)^-1 (I + A), orthogonal for a skew A, a turn by 2 A at first order."""
    one_RR = torch.eye(half_RR.shape[0], dtype=half_RR.dtype)
    return torch.linalg.solve(one_RR - half_RR, one_RR + half_RR)


def change_of_base(spectrum: Spectrum, tolerance: float) -> float:
    """Get the standard deviation of u_i^T (change of W) v_j: that of one entry of the change.

    Rounding is spread evenly over its interval, so it is tolerance / sqrt(3) of an entry of W, whose
    size is |W|_F / sqrt(O I). The values left out are not known: below a leading choice each is at most
    the least kept one; for another choice the spectrum is taken to fall in a straight line (chosen).
    """
    O, I, R = spectrum.shape
    S_R = spectrum.S_R.detach().double()
    K, least = min(O, I), float(S_R.min())
    energy = float(S_R.square().sum()) + (K - R) * least**2
    if sorted(spectrum.columns) != list(range(R)):
        energy = K * strongest(spectrum) ** 2 / 3
    return float(tolerance / 3**0.5 * (energy / (O * I)) ** 0.5)


def strongest(spectrum: Spectrum) -> float:
    """Get S[0] of the weight, extrapolated along a straight line through (K, 0) if it was not kept."""
    K = min(spectrum.shape[:2])
    return float(spectrum.S_R.max()) / (1 - min(spectrum.columns) / K)
