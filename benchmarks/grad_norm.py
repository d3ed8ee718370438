"""What normalising small gradients changes: SpecAdapt's rms with its 1e-8 under the root, against ours without.

    python benchmarks/grad_norm.py

A 96 x 64 weight learns 100 steps of AdamW at 3e-3 towards a random update of rank 4, specadapt with r = 8; the loss is
scaled so that the gradients of A begin at the stated rms. Compared is the update: |dW - dW'|_F / |dW|_F. Writes
benchmarks/results/grad_norm.json.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from provenance import provenance

from spectune.adapter import SpectralModule, rules
from spectune.algebra import dense
from spectune.checkpoint import write_atomically
from spectune.methods import build_method
from spectune.records import Weight
from spectune.spectrum import decompose

RESULTS = Path(__file__).parent / "results" / "grad_norm.json"
SIZES = (1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
STEPS, RATE, SEEDS = 100, 3e-3, 3


def official(grad: torch.Tensor, axis: int) -> torch.Tensor:
    """Get the gradient as SpecAdapt's code normalises it."""
    return grad / (grad.square().mean(axis, keepdim=True) + 1e-8).sqrt()


def update(seed: int, size: float, norm: Callable[[torch.Tensor, int], torch.Tensor]) -> torch.Tensor:
    """Get dW_OI after training, the gradients of A beginning at rms `size`."""
    generator = torch.Generator().manual_seed(seed)
    W_OI, B_OR, A_RI, x_NI = (torch.randn(s, generator=generator) for s in ((96, 64), (96, 4), (4, 64), (256, 64)))
    method = build_method("specadapt", {"r": 8, "basis_rank": None})
    module = SpectralModule(method, decompose(Weight("w", W_OI), 64), embed_basis=False)
    wanted_NO = x_NI @ (B_OR @ A_RI / 8).T
    optimizer = torch.optim.AdamW(module.parameters(), lr=RATE, weight_decay=0.0)
    factor = None
    for _ in range(STEPS):
        optimizer.zero_grad()
        (module(x_NI) - wanted_NO).square().mean().backward()
        first_KR = module.A.grad
        factor = size / float(first_KR.square().mean().sqrt()) if factor is None else factor
        for parameter in module.parameters():
            parameter.grad.mul_(factor)
        for name, axis in method.gradient_axes().items():
            gradient = getattr(module, name).grad
            gradient.copy_(norm(gradient, axis))
        optimizer.step()
    with torch.no_grad():
        return dense(module.delta())


def main() -> None:
    rows = []
    for size in SIZES:
        shares = []
        for seed in range(SEEDS):
            ours_OI, theirs_OI = update(seed, size, rules.GRADIENT_NORMS["rms"]), update(seed, size, official)
            shares.append(float((ours_OI - theirs_OI).norm() / ours_OI.norm()))
        rows.append({"rms": size, "difference": shares})
        print(f"rms {size:g}: dW differs by {min(shares):.1%} to {max(shares):.1%}")
    found = {"rows": rows, "steps": STEPS, "rate": RATE, "provenance": provenance()}
    write_atomically(RESULTS, json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
