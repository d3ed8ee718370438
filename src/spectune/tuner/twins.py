"""A second adapter of the same configuration gets the very basis on which the first one lives.

Numbers are then copied from one to the other, as trl does for a reference adapter. The first basis may be rotated to
match a file, or embedded in one, so a computed one would give these numbers another meaning.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import nn

from ..adapter import SpectralModule, spectral_modules
from ..records import Spectrum
from .config import SpectralConfig


def twins(model: nn.Module, adapter_name: str, configs: Mapping[str, SpectralConfig]) -> dict[str, SpectralModule]:
    """Get weight -> the live module of another adapter whose basis a new adapter takes."""
    mine = configs[adapter_name]
    alike = {name for name, config in configs.items() if name != adapter_name and is_alike(mine, config)}
    found: dict[str, SpectralModule] = {}
    for _, name, module in spectral_modules(model):
        if name in alike and module.has_settled_basis:
            found.setdefault(module.name, module)
    return found


def is_alike(mine: SpectralConfig, other: SpectralConfig) -> bool:
    """Ask whether two configs describe the same basis, and no file is about to bring the first its own."""
    if mine is other:
        return True
    if mine.origin is not None and not mine.basis_is_in_file:
        return False
    same = ("directions", "save_basis", "svd", "rank_pattern", "spectra")
    return mine.build_method() == other.build_method() and all(getattr(mine, n) == getattr(other, n) for n in same)


def own_copy(twin: SpectralModule) -> Spectrum:
    """Get the basis of a module in tensors that it does not share."""
    basis = twin.spectrum
    return replace(basis, U_OR=basis.U_OR.clone(), S_R=basis.S_R.clone(), Vh_RI=basis.Vh_RI.clone())


def hand_over(model: nn.Module, adapter_name: str, given: Mapping[str, SpectralModule]) -> None:
    """Put the bases of `twins` into the modules of a new adapter."""
    for _, name, module in spectral_modules(model):
        if name == adapter_name and (twin := given.get(module.name)) is not None and twin.method == module.method:
            module.take_basis(twin)
