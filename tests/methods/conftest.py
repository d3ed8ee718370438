"""Fixtures: one method under contract and a spectrum for it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from spectune import decompose
from spectune.methods import Method, build_method
from spectune.records import Spectrum

from .cases import CASES, weight_for


@pytest.fixture(params=list(CASES))
def case(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def method(case: str) -> Method:
    name, options = CASES[case]
    return build_method(name, options)


@pytest.fixture
def spectrum(case: str, method: Method) -> Spectrum:
    weight = weight_for(case)
    rank, columns = method.basis(*weight.W_OI.shape)
    if rank == 0:
        return Spectrum.unknown(*weight.W_OI.shape, 0, weight.name).to(dtype=torch.float64)
    found = decompose(weight, rank, columns=columns, solver="exact", dtype=torch.float64)
    return found if not method.needs_examples() else ranked(found)


def ranked(spectrum: Spectrum) -> Spectrum:
    """A spectrum with the places of a core in an order, as data give them: here, diagonals first."""
    R = spectrum.shape[2]
    offsets_RR = (torch.arange(R)[:, None] - torch.arange(R)).remainder(R)
    return replace(spectrum, places=offsets_RR.flatten().argsort(stable=True))
