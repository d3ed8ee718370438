"""`thin_svd`: what a GPU runs in place of cuSOLVER's Jacobi solver, on the CPU; and that nothing else calls torch's."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import spectune
from spectune import thin_svd as module
from spectune.thin_svd import reduced_svd, thin_svd

SOURCE = Path(spectune.__file__).parent


@pytest.mark.parametrize("shape", [(7, 4), (4, 7), (5, 5), (3, 6, 4), (3, 4, 6)])
def test_by_way_of_a_qr_it_is_the_same_decomposition(shape: tuple[int, ...]) -> None:
    X_AB = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    U_AK, S_K, Vh_KB = reduced_svd(X_AB)
    wanted = thin_svd(X_AB)
    assert [part.shape for part in (U_AK, S_K, Vh_KB)] == [part.shape for part in wanted]
    torch.testing.assert_close(S_K, wanted[1])
    torch.testing.assert_close(U_AK * S_K[..., None, :] @ Vh_KB, X_AB)
    torch.testing.assert_close(
        U_AK.mT @ U_AK, torch.eye(S_K.shape[-1], dtype=torch.float64).expand(*shape[:-2], -1, -1)
    )


def test_on_the_cpu_it_is_torchs_own_bit_for_bit() -> None:
    X_AB = torch.randn(9, 5, generator=torch.Generator().manual_seed(0))
    for mine, theirs in zip(thin_svd(X_AB), torch.linalg.svd(X_AB, full_matrices=False), strict=True):
        assert torch.equal(mine, theirs)


def test_on_cuda_it_goes_by_way_of_the_qr(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "reduced_svd", lambda X_AB: "by way of a QR")
    on_a_gpu: Any = SimpleNamespace(is_cuda=True)
    assert thin_svd(on_a_gpu) == "by way of a QR"


def test_no_result_comes_from_torchs_own_svd() -> None:
    # The published experiments compare with torch's, and a chart shows singular values to the pixel.
    calls = {
        str(path.relative_to(SOURCE))
        for path in SOURCE.rglob("*.py")
        if re.search(r"linalg\.svd(vals)?\b(?!`)(?!, full)", path.read_text().split('"""', 2)[-1])
    }
    assert calls == {"thin_svd.py", "runs/spectra.py", "papers/computations.py"}
