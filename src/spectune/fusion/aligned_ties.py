"""TIES on the right singular vectors that the updates have in one common decomposition."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from ..thin_svd import thin_svd
from .contract import Part, of_factors
from .core import Core, core_space, elect


@dataclass(frozen=True, kw_only=True)
class AlignedTies(Core):
    """Give all updates the same left singular vectors, then resolve conflicts of sign in their right factors.

    [dW_1, ..., dW_N] = U S [V_1, ..., V_N];   dW = U S TIES(w_1 V_1, ..., w_N V_N),   V_i of P x I

    TIES as for `core`, but on the numbers of V_i along the layer's inputs. A single adapter stays as it is. Needs no
    data, takes weights of 1; the rank of the result is at most the sum of the ranks.

    KnOTS-TIES (Stoica et al., arXiv 2410.19735).
    """

    name: ClassVar[str] = "aligned_ties"
    paper: ClassVar[str] = "Model Merging with SVD to Tie the KnOTS, arXiv 2410.19735"

    def fuse(self, parts: Sequence[Part], weights: Sequence[float]) -> Part:
        space = core_space(parts)
        beside_PK = torch.cat(list(space.cores_NPQ), dim=1)
        U_PK, S_K, _ = thin_svd(beside_PK)
        rights_NKI = torch.stack([(U_PK.mT / S_K[:, None]) @ core_PQ @ space.Qh_QI for core_PQ in space.cores_NPQ])
        return of_factors(parts, space.Q_OP @ (U_PK * S_K), elect(rights_NKI, weights, self.density))
