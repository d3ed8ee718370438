"""Spectra of data: singular directions that a layer's inputs and gradients choose, in place of its weight.

A pass over some examples at the pretrained weights gives every weight its inputs x and the gradients g of the loss with
respect to its outputs; G = g^T x is then the gradient of the weight. `Moments` adds them up, batch by batch.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator

import torch
import torch.distributed as dist

from ..errors import OptionError
from ..records import Quality, Spectrum, Weight
from ..thin_svd import thin_svd
from .data_spectra import unorthogonal
from .distributed import processes

DIRECTIONS = {
    "weight": "the weight's own singular vectors",
    "gradient": "eigenvectors of sum G G^T and sum G^T G over batches (Shampoo's factors)",
    "gradient_mean": "singular vectors of the mean gradient",
    "activation": "eigenvectors of sum g g^T and sum x x^T over tokens (KFAC's factors)",
    "weight_x_activation": "the weight's singular directions in the metric of its inputs, C = mean x x^T",
}
# Up to this side a second moment is kept whole (4 MB in float32) and its eigenvectors are exact; beyond it is sketched.
WHOLE_SIDE = 1024
# Columns of a sketch beyond twice the wanted directions. Tropp et al., arXiv 1706.05736: a few suffice. Chosen.
MORE_COLUMNS = 16
# Cosine at which a direction lies no longer beside those of `OthersInputs`: float64's rounding is far below. Chosen.
OVERLAP = 1e-5


class SecondMoment:
    """sum_n y_n y_n^T of rows y, whole or as a sketch of it, and its leading eigenvectors.

    The sketch is Y = A Omega with a fixed Gaussian Omega; A ~ Y (Omega^T Y)^-1 Y^T, the Nystrom approximation, needs
    one pass and side x (2 R + 16) numbers (Tropp et al., arXiv 1706.05736, algorithm 3).
    """

    def __init__(self, side: int, rank: int, seed: int, device: torch.device) -> None:
        width = 2 * rank + MORE_COLUMNS
        self.probe: torch.Tensor | None = None
        if side > max(WHOLE_SIDE, width):
            stream = torch.Generator().manual_seed(seed)
            self.probe = torch.linalg.qr(torch.randn(side, width, generator=stream))[0].to(device)
        self.sum = torch.zeros(side, side if self.probe is None else width, device=device)

    def add(self, rows_NA: torch.Tensor) -> None:
        """Add the moment of some rows."""
        self.sum += rows_NA.mT @ (rows_NA if self.probe is None else rows_NA @ self.probe)

    def eigen(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Get the eigenvalues, descending, and the eigenvectors as columns, in float64.

        A whole moment is solved in the float32 that it was summed in: its rounding is that of the sum, in half the
        time.
        """
        if self.probe is None:
            values, vectors = torch.linalg.eigh((self.sum + self.sum.mT) / 2)
            return values.flip(0).double(), vectors.flip(1).double()
        sum_AA = self.sum.double()
        probe = self.probe.double()
        # A small multiple of the identity keeps Omega^T Y positive, and is taken off again.
        shift = torch.finfo(torch.float32).eps * torch.linalg.matrix_norm(sum_AA)
        shifted = sum_AA + shift * probe
        middle = probe.mT @ shifted
        root, fault = torch.linalg.cholesky_ex((middle + middle.mT) / 2)
        if int(fault):  # nothing was added, or next to nothing
            return torch.zeros(probe.shape[1], dtype=probe.dtype, device=probe.device), torch.linalg.qr(probe)[0]
        vectors, roots, _ = thin_svd(torch.linalg.solve_triangular(root, shifted.mT, upper=False).mT)
        return (roots.square() - shift).clamp_min(0), vectors


class OthersInputs:
    """The inputs of a layer for examples that an adapter should leave alone."""

    def __init__(self, name: str, shape: tuple[int, int], rank: int, device: torch.device) -> None:
        self.name, self.rank, self.tokens, self.energy = name, rank, 0, torch.zeros((), device=device)
        self.moment = SecondMoment(shape[1], rank, zlib.crc32(name.encode()), device)

    def add(self, x_NI: torch.Tensor, g_NO: torch.Tensor) -> None:
        """Add the inputs of one batch; the gradients say nothing here."""
        self.tokens += len(x_NI)
        self.energy += x_NI.float().square().sum()
        self.moment.add(x_NI.float())

    def add_up(self) -> None:
        """Add what the other processes of a distributed run have seen."""
        self.tokens = _added_up((self.moment.sum, self.energy), self.tokens)

    @torch.no_grad()
    def directions(self, share: float) -> torch.Tensor:
        """Get as columns Q_IK the fewest leading eigenvectors of sum x x^T that hold a share of its trace.

        `OptionError` if they leave fewer than the rank for the adapter, or if a sketch (sides over 1,024) holds less.
        """
        values_J, vectors_IJ = self.moment.eigen()
        held_J = values_J.cumsum(0) / self.energy.double()
        count = int((held_J < share).sum()) + 1
        if count > len(held_J):
            raise OptionError(
                f"{self.name}: away_share={share}: the {len(held_J)} directions that are kept of these inputs hold "
                f"{float(held_J[-1]):.2f} of their energy. Name a smaller share."
            )
        if len(vectors_IJ) - count < self.rank:
            raise OptionError(
                f"{self.name}: away_share={share} takes {count} of {len(vectors_IJ)} directions, and the adapter needs "
                f"{self.rank}. Name a smaller share, or a smaller basis_rank."
            )
        return torch.linalg.qr(vectors_IJ[:, :count])[0]  # found in float32: as good as orthonormal only now


class Moments:
    """What one weight has seen, as far as its kind of directions needs it."""

    def __init__(self, directions: str, name: str, shape: tuple[int, int], rank: int, device: torch.device) -> None:
        self.directions, self.name, self.rank = directions, name, rank
        self.tokens = 0
        self.away_IK: torch.Tensor | None = None
        """Orthonormal directions that the right ones keep out of."""
        rows_O, cols_I = shape
        seed = zlib.crc32(name.encode())
        left = directions in ("gradient", "activation")
        self.left = SecondMoment(rows_O, rank, seed, device) if left else None
        self.right = SecondMoment(cols_I, rank, seed, device) if directions != "gradient_mean" else None
        self.mean = torch.zeros(shape, device=device) if directions == "gradient_mean" else None

    def add(self, x_NI: torch.Tensor, g_NO: torch.Tensor) -> None:
        """Add the inputs of one batch and the gradients of the loss with respect to the outputs."""
        x_NI, g_NO = x_NI.float(), g_NO.float()
        self.tokens += len(x_NI)
        if self.directions == "gradient":
            assert self.left is not None and self.right is not None
            G_OI = g_NO.mT @ x_NI
            self.left.add(G_OI.mT)
            self.right.add(G_OI)
        elif self.mean is not None:
            self.mean += g_NO.mT @ x_NI
        else:
            assert self.right is not None
            self.right.add(x_NI)
            if self.left is not None:
                self.left.add(g_NO)

    def add_up(self) -> None:
        """Add what the other processes of a distributed run have seen."""
        self.tokens = _added_up(self._sums(), self.tokens)

    def _sums(self) -> Iterator[torch.Tensor]:
        yield from (moment.sum for moment in (self.left, self.right) if moment is not None)
        if self.mean is not None:
            yield self.mean

    @torch.no_grad()
    def spectrum(self, weight: Weight) -> Spectrum:
        """Get the leading directions, signed so that S_i = u_i^T W v_i, what the weight has along them, is positive."""
        W_OI = weight.W_OI.double()
        U_OR, V_IR, kept = self._sides(W_OI)
        self._refuse_overlap(V_IR)
        S_R = (U_OR * (W_OI @ V_IR)).sum(0)
        V_IR = V_IR * torch.where(S_R < 0, -1.0, 1.0)
        off = max(unorthogonal(U_OR), unorthogonal(V_IR))
        quality = Quality(solver=self.directions, residual=1 - kept, orthogonality=off, gap=0.0)
        found = Spectrum(
            U_OR.float().contiguous(),
            S_R.abs().float(),
            V_IR.mT.float().contiguous(),
            tuple(range(self.rank)),
            quality,
            self.name,
            source=self.directions,
        )
        return _sent_by_the_first(found) if processes() > 1 else found

    def _sides(self, W_OI: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, float]:
        """Get (U_OR, V_IR, the share of what was seen that they hold)."""
        R = self.rank
        if self.mean is not None:
            U_OK, S_K, Vh_KI = thin_svd(self._turned(self.mean.double().mT).mT)
            return U_OK[:, :R], Vh_KI[:R].mT, _share(S_K.square(), R)
        assert self.right is not None
        inputs, V_IJ = self.right.eigen()
        if self.away_IK is not None:
            V_IJ, roots_J, _ = thin_svd(self._turned(V_IJ * inputs.clamp_min(0).sqrt()))
            inputs = roots_J.square()
        if self.left is not None:
            outputs, U_OJ = self.left.eigen()
            return U_OJ[:, :R], V_IJ[:, :R], min(_share(inputs, R), _share(outputs, R))
        U_OJ, S_J, _ = thin_svd(W_OI @ (V_IJ * inputs.clamp_min(0).sqrt()))
        X_RR, _, Yh_RI = thin_svd(self._turned((U_OJ[:, :R].mT @ W_OI).mT).mT)
        return U_OJ[:, :R] @ X_RR, Yh_RI.mT, _share(S_J.square(), R)

    def _turned(self, columns_IJ: torch.Tensor) -> torch.Tensor:
        """Get columns without their part along the directions to keep out of."""
        if self.away_IK is None:
            return columns_IJ
        Q_IK = self.away_IK.to(columns_IJ)
        return columns_IJ - Q_IK @ (Q_IK.mT @ columns_IJ)

    def _refuse_overlap(self, V_IR: torch.Tensor) -> None:
        """Raise `OptionError` if directions beyond the examples' own had to fill the basis up."""
        if self.away_IK is not None and float((self.away_IK.to(V_IR).mT @ V_IR).abs().max()) > OVERLAP:
            raise OptionError(
                f"{self.name}: beside those of away_from the examples have fewer than {self.rank} input directions. "
                f"Pass more examples, or name a smaller away_share or basis_rank."
            )


def _added_up(sums: Iterable[torch.Tensor], tokens: int) -> int:
    """Sum tensors, in place, and a count over all processes."""
    count = torch.tensor(float(tokens))
    for tensor in (*sums, count):
        parcel = tensor.cuda() if "nccl" in dist.get_backend() else tensor.cpu()
        dist.all_reduce(parcel)
        tensor.copy_(parcel)
    return int(count)


def _share(values_J: torch.Tensor, R: int) -> float:
    total = float(values_J.sum())
    return float(values_J[:R].sum()) / total if total > 0 else 0.0


def _sent_by_the_first(found: Spectrum) -> Spectrum:
    """Get the directions of the first process: equal sums need not give equal last bits on two machines."""
    for tensor in (found.U_OR, found.S_R, found.Vh_RI):
        parcel = tensor.cuda() if "nccl" in dist.get_backend() else tensor.cpu()
        dist.broadcast(parcel, src=0)
        tensor.copy_(parcel)
    return found
