"""Write the golden adapters: `python -m tests.golden.make`. For a new format only: old files stay, and are read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from safetensors.torch import save_file
from torch import nn

from spectune import SpectralConfig, prepare
from spectune.adapter import spectral_modules

HERE = Path(__file__).parent
# One line for every way in which a file is written: each method, embedded bases, saved patterns, shared cores.
CASES: dict[str, dict[str, Any]] = {
    "spectral_a": {"method": "spectral_a", "r": 2},
    "spectral_a-embedded": {"method": "spectral_a", "r": 2, "columns": [1, 3], "save_basis": "always"},
    "spectral_r": {"method": "spectral_r", "r": 3, "train_singular_values": True},
    "svft": {"method": "svft", "pattern": "banded", "off_diagonals": 1},
    "svft-random": {"method": "svft", "pattern": "random", "basis_rank": 6, "gate": True},
    "svft-top_k": {"method": "svft", "pattern": "top_k", "off_diagonals": 1},
    "svft-chosen": {"method": "svft", "pattern": "chosen", "places": 10, "basis_rank": 6},
    "svft-gradient": {
        "method": "svft",
        "pattern": "banded",
        "off_diagonals": 1,
        "basis_rank": 6,
        "directions": "gradient",
    },
    "svft-shared": {"method": "svft", "pattern": "dense", "core": [3, 3], "directions": "gradient"},
    "specadapt": {"method": "specadapt", "r": 2, "basis_rank": 5},
    "svft-dense": {"method": "svft", "pattern": "dense", "core": [3, 2]},
    "one_sided": {"method": "one_sided", "r": 2, "side": "left"},
    "svdiff": {"method": "svdiff"},
    "lidb": {"method": "lidb", "r": 2, "output_width": 5, "input_width": 6, "basis_seed": 3},
    "orthogonal_adaptation": {"method": "orthogonal_adaptation", "r": 2, "concept": 1, "rank_pattern": {"lin1": 3}},
}


class Base(nn.Module):
    """Two linear layers, square and wide, with weights that bfloat16 holds exactly."""

    def __init__(self) -> None:
        super().__init__()
        self.lin0, self.lin1 = nn.Linear(8, 8), nn.Linear(8, 12, bias=False)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator).bfloat16())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lin1(torch.relu(self.lin0(x)))


def targets(options: dict[str, Any]) -> list[str]:
    return ["lin0"] if options.get("pattern") == "top_k" else ["lin0", "lin1"]


# The directions are in a basis file beside the adapter, which others can share.
SHARED = ("svft-shared",)


def config_of(case: str, options: dict[str, Any]) -> SpectralConfig:
    config = SpectralConfig(target_modules=targets(options), **options)
    if options.get("pattern") != "chosen" and "directions" not in options:
        return config
    batches = [{"x": torch.eye(8)[i : i + 2]} for i in range(0, 8, 2)]
    save = HERE / case if case in SHARED else None
    return prepare(Base(), config, batches, loss=lambda model, batch: model(batch["x"]).square().sum(), save=save)


def main() -> None:
    """Write the files that are missing; those of earlier releases stay as they are."""
    if not (HERE / "base.safetensors").exists():
        save_file(Base().state_dict(), HERE / "base.safetensors", {"format": "pt"})
    for case, options in CASES.items():
        if (HERE / case).exists():
            continue
        model = get_peft_model(Base(), config_of(case, options))
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for _, parameter in sorted(model.named_parameters()):
                if parameter.requires_grad:
                    parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
        model.save_pretrained(HERE / case)
        (HERE / case / "README.md").unlink(missing_ok=True)
        updates = {}
        for layer, _, _ in spectral_modules(model):
            name = layer.removeprefix("base_model.model.")
            updates[name] = model.get_submodule(layer).get_delta_weight("default").contiguous()
        save_file(updates, HERE / case / "updates.safetensors", {"format": "pt"})


if __name__ == "__main__":
    main()
