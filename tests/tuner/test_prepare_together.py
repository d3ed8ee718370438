"""`prepare` in a distributed run: each process has its own examples, and all get the directions of all of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from spectune import SpectralConfig, prepare

from ..spectrum.test_distributed import together
from .test_prepare import OF_DATA, Two, batches, config


@pytest.mark.parametrize("directions", OF_DATA)
def test_processes_bring_different_examples_and_get_the_same_directions(tmp_path: Path, directions: str) -> None:
    def job(rank: int) -> Any:
        found = prepare(Two(), config(directions), batches()[rank::2]).spectra
        assert found is not None
        return {name: (basis.U_OR, basis.S_R, basis.Vh_RI) for name, basis in found.items()}

    one, other = together(job, tmp_path)
    alone = prepare(Two(), config(directions), batches()).spectra
    assert alone is not None
    for name, (U_OR, S_R, Vh_RI) in one.items():
        assert all(torch.equal(a, b) for a, b in zip((U_OR, S_R, Vh_RI), other[name], strict=True))
        torch.testing.assert_close(U_OR @ U_OR.mT, alone[name].U_OR @ alone[name].U_OR.mT, atol=1e-4, rtol=0)
        torch.testing.assert_close(Vh_RI.mT @ Vh_RI, alone[name].Vh_RI.mT @ alone[name].Vh_RI, atol=1e-4, rtol=0)


@pytest.mark.parametrize("directions", ["weight", "gradient"])
def test_they_choose_places_and_sizes_from_the_examples_of_all(tmp_path: Path, directions: str) -> None:
    def choose(given: list[dict[str, torch.Tensor]]) -> Any:
        options: dict[str, Any] = {"method": "svft", "pattern": "chosen", "basis_rank": 5, "directions": directions}
        asked = SpectralConfig(**options, budget=20, target_modules=["first", "second"])
        found = prepare(Two(), asked, given)
        assert found.spectra is not None
        places = {name: basis.places.tolist() for name, basis in found.spectra.items() if basis.places is not None}
        return found.places, found.rank_pattern, places

    one, other = together(lambda rank: choose(batches()[rank::2]), tmp_path)
    assert one == other == choose(batches()) != choose(batches()[:2])
