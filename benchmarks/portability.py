"""How far a reloaded update is from the trained one when the base or the solver is not quite the same.

    python benchmarks/portability.py

Four kinds of layers of all-MiniLM-L6-v2 (24 real matrices). An adapter with random numbers is described by its sketch;
then the basis is found again on a changed weight and turned onto the sketch. Writes benchmarks/results/portability.json
from which benchmarks/tables.py makes the table of docs/portability.md.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from provenance import provenance
from safetensors.torch import load_file

from spectune import decompose
from spectune.adapter import SpectralModule
from spectune.algebra import dense
from spectune.demo.demo import base_folder
from spectune.errors import AdapterError
from spectune.methods import Method, build_method
from spectune.records import Spectrum, Weight

RESULTS = Path(__file__).parent / "results" / "portability.json"
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "spectral_a r=8": ("spectral_a", {"r": 8}),
    "spectral_a r=32": ("spectral_a", {"r": 32}),
    "spectral_r r=32": ("spectral_r", {"r": 32}),
    "svft plain, full": ("svft", {}),
    "svft banded 2, full": ("svft", {"pattern": "banded"}),
    "specadapt r=8, full": ("specadapt", {"r": 8}),
}


def found_again(W_OI: torch.Tensor, method: Method, solver: str = "auto") -> Spectrum:
    rank, columns = method.basis(*W_OI.shape)
    return decompose(Weight("weight", W_OI), rank, columns=columns, solver=solver)


def flipped(W_OI: torch.Tensor, method: Method) -> Spectrum:
    basis = found_again(W_OI, method)
    signs_R = torch.where(torch.rand(len(basis.columns), generator=torch.Generator().manual_seed(1)) < 0.5, -1.0, 1.0)
    U_OR, Vh_RI = basis.U_OR * signs_R, basis.Vh_RI * signs_R[:, None]
    return Spectrum(U_OR, basis.S_R, Vh_RI, basis.columns, basis.quality, basis.name)


def rotated(W_OI: torch.Tensor, method: Method) -> Spectrum:
    """Turn neighbours whose singular values are equal to 1e-5 of the largest, by any angle."""
    basis = found_again(W_OI, method)
    U_OR, Vh_RI, S_R = basis.U_OR.clone(), basis.Vh_RI.clone(), basis.S_R
    stream, place = torch.Generator().manual_seed(2), 0
    while place + 1 < len(S_R):
        if S_R[place] - S_R[place + 1] > 1e-5 * S_R[0]:
            place += 1
            continue
        angle = 6.3 * torch.rand(1, generator=stream)
        turn = torch.tensor([[angle.cos(), -angle.sin()], [angle.sin(), angle.cos()]])
        U_OR[:, place : place + 2] = U_OR[:, place : place + 2] @ turn
        Vh_RI[place : place + 2] = turn.T @ Vh_RI[place : place + 2]
        place += 2
    return Spectrum(U_OR, S_R, Vh_RI, basis.columns, basis.quality, basis.name)


CHANGES: dict[str, Callable[[torch.Tensor, Method], Spectrum]] = {
    "sign flips": flipped,
    "another solver": lambda W, m: found_again(W, m, "gram" if m.basis(*W.shape)[0] > 64 else "exact"),
    "bfloat16 copy": lambda W, m: found_again(W.bfloat16(), m),
    "float16 copy": lambda W, m: found_again(W.half(), m),
    "turned inside equal values": rotated,
    "5% fine-tuned base": lambda W, m: found_again(W + 0.05 * W.std() * noise(W), m),
    "another model": lambda W, m: found_again(W.std() * noise(W), m),
}


def tied(W_OI: torch.Tensor) -> torch.Tensor:
    """Make the singular values equal in pairs; no two of the real ones are."""
    U_OK, S_K, Vh_KI = torch.linalg.svd(W_OI, full_matrices=False)
    S_K[1::2] = S_K[0 : len(S_K) - 1 : 2]
    return U_OK * S_K @ Vh_KI


def noise(W_OI: torch.Tensor) -> torch.Tensor:
    return torch.randn(W_OI.shape, generator=torch.Generator().manual_seed(3))


def reload(module: SpectralModule, basis: Spectrum) -> tuple[float, float, bool]:
    """Get the relative error with the basis as found, the same after turning, and whether it was refused."""
    wanted = dense(module.delta())
    other = SpectralModule(module.method, basis, embed_basis=False)
    state = {name: t for name, t in module.state_dict().items()}
    for name in module.own_names:
        getattr(other, name).data = state[name]
    raw = dense(other.delta())
    refused = False
    try:
        other.load_state_dict(state)
    except AdapterError:
        refused = True
    size = torch.linalg.norm(wanted)
    turned = dense(other.delta()) if not refused else raw
    return float(torch.linalg.norm(raw - wanted) / size), float(torch.linalg.norm(turned - wanted) / size), refused


@torch.no_grad()
def main() -> None:
    tensors = load_file(base_folder() / "model.safetensors")
    kinds = ("attention.self.query", "attention.self.value", "attention.output.dense", "intermediate.dense")
    weights = [W for name, W in sorted(tensors.items()) if W.ndim == 2 and any(kind in name for kind in kinds)]
    rows = []
    for label, (name, options) in METHODS.items():
        method = build_method(name, options)
        for change, find in CHANGES.items():
            errors = []
            for place, W_OI in enumerate(map(tied, weights) if find is rotated else weights):
                torch.manual_seed(place)
                module = SpectralModule(method, found_again(W_OI, method), embed_basis=False)
                for parameter in module.parameters():
                    parameter += 0.02 * torch.randn_like(parameter)
                errors.append(reload(module, find(W_OI, method)))
            raw, turned, refused = zip(*errors, strict=True)
            kept = [t for t, r in zip(turned, refused, strict=True) if not r]
            rows.append(
                {
                    "method": label,
                    "change": change,
                    "raw_median": statistics.median(raw),
                    "turned_median": statistics.median(kept) if kept else None,
                    "turned_max": max(kept) if kept else None,
                    "refused": sum(refused),
                    "weights": len(weights),
                }
            )
            print(rows[-1], flush=True)
        trained = sum(p.numel() for p in module.parameters())
        rows[-1]["trained"], rows[-1]["sketch"] = trained, module.sketch.numel()
    record = {
        **provenance(),
        "rows": rows,
    }
    RESULTS.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
