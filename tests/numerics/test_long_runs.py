"""No drift: rotations stay rotations after ten thousand steps, whatever the optimizer does to their numbers."""

from __future__ import annotations

import torch

from spectune.methods import build_method
from spectune.records import Weight
from spectune.spectrum import decompose

STEPS = 10_000
R = 4


def drift_of(R_RR: torch.Tensor) -> float:
    return float((R_RR.mT @ R_RR - torch.eye(len(R_RR), dtype=R_RR.dtype)).abs().max())


def test_rotations_are_orthogonal_after_ten_thousand_steps() -> None:
    """The Cayley transform makes a rotation of any numbers, so roundoff does not add up over the steps.

    The target moves all the time, so that the numbers never come to rest; singular values stay those of W.
    """
    W_OI = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))
    method = build_method("spectral_r", {"r": R})
    spectrum = decompose(Weight("layer", W_OI), R)
    frozen = method.frozen(spectrum)
    trained = {name: tensor.requires_grad_() for name, tensor in method.start(8, 6).items()}
    optimizer = torch.optim.AdamW(list(trained.values()), lr=1e-2, weight_decay=0.0)
    targets = torch.randn(50, R, R, generator=torch.Generator().manual_seed(1))
    worst = 0.0
    for step in range(STEPS):
        core_RR = method.delta(spectrum, trained, frozen).core
        assert isinstance(core_RR, torch.Tensor)
        loss = (core_RR - targets[step % 50]).square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 1_000 == 999:
            with torch.no_grad():
                worst = max(worst, *(drift_of(turn) for turn in method.rotations(trained, frozen)))  # type: ignore[attr-defined]
    assert sum(float(tensor.detach().abs().sum()) for tensor in trained.values()) > 0.5, "nothing was trained"
    assert worst < 2e-6  # R roundoffs of float32, at the first thousand steps as at the last
    with torch.no_grad():
        tuned_RR = method.delta(spectrum, trained, frozen).core_matrix() + torch.diag(spectrum.S_R)
        apart = (torch.linalg.svdvals(tuned_RR) - spectrum.S_R).abs().max() / spectrum.S_R[0]
    assert float(apart) < 2e-6


def test_a_wild_optimizer_cannot_break_a_rotation() -> None:
    """Numbers of 1e4, where a product of turns would have lost its digits long ago."""
    method = build_method("spectral_r", {"r": R})
    spectrum = decompose(Weight("layer", torch.randn(8, 6, generator=torch.Generator().manual_seed(0))), R)
    for size in (1e-8, 1.0, 1e2, 1e4):
        generator = torch.Generator().manual_seed(2)
        trained = {
            name: size * torch.randn(tensor.shape, generator=generator) for name, tensor in method.start(8, 6).items()
        }
        for turn in method.rotations(trained, method.frozen(spectrum)):  # type: ignore[attr-defined]
            # The solve loses as many digits as 1 + |Q|^2 has, of which the orthogonality keeps all but one in |Q|.
            assert drift_of(turn) < 2e-6 * max(size, 1.0)
