"""Directions of data in a config: which options work with them, and the basis of one layer."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..checkpoint import basis_beside, basis_name, no_basis, shared_identity
from ..errors import AdapterError, OptionError, nearest
from ..methods import METHODS, Method
from ..records import Spectrum
from ..spectrum import DIRECTIONS, FOREIGN_GAIN, DataSpectra, gain_off

if TYPE_CHECKING:
    from .config import SpectralConfig


def check_directions(directions: str, method: type[Method], save_basis: str) -> None:
    """Raise `OptionError` for directions that do not exist, or that do not work with this method or save_basis."""
    if directions not in DIRECTIONS:
        raise OptionError(f"directions={directions!r} does not exist. {nearest(directions, list(DIRECTIONS))}")
    if directions == "weight":
        return
    if not method.takes_any_directions:
        able = ", ".join(name for name, other in METHODS.items() if other.takes_any_directions)
        raise OptionError(
            f"directions={directions!r}: {method.name} tunes the weight's own singular vectors, not those of data. "
            f"Use one of: {able}."
        )
    if save_basis == "never":
        raise OptionError(
            f"save_basis='never': directions={directions!r} cannot be recomputed without the data, so the file must "
            f"contain them. Use 'auto'."
        )


def refuse_unprepared(config: SpectralConfig) -> None:
    """Raise `OptionError` for a new adapter that needs examples, of which `spectune.prepare` has seen none."""
    if config.needs_examples and config.origin is None and config.spectra is None:
        raise OptionError(
            f"{config.needs_examples} needs examples. Call config = spectune.prepare(model, config, batches) before "
            f"you attach the adapter."
        )


def check_basis(config: SpectralConfig, method: Method) -> None:
    """Raise `OptionError` for a shared basis that does not go together with the other options."""
    shared_identity({"basis_id": config.basis_id})
    if (basis := config.basis or config.basis_id) is None:
        return
    if config.directions == "weight":
        raise OptionError(f"basis={basis!r}: such a file holds directions of data. Name them: directions=…")
    if config.save_basis == "always":
        raise OptionError(
            "save_basis='always' puts the directions into the adapter, and basis=… leaves them out. Use one of them."
        )
    if method.needs_examples() or (config.budget is not None and config.origin is None):
        raise OptionError(
            f"basis={basis!r}: places and sizes that examples choose belong to one adapter, and its basis cannot be "
            f"shared. Leave basis out, or pattern='chosen' and budget."
        )


def bring_spectra(config: SpectralConfig) -> None:
    """Fill in the directions of the basis file that a config shares.

    The file is your own `basis`, or lies beside a saved adapter under the name of its contents.
    """
    if config.spectra is not None or (config.basis is None and config.basis_id is None):
        return
    identity, origin = config.basis_id, config.origin
    if config.basis is not None:
        found = DataSpectra.read(config.basis)
    else:
        assert identity is not None
        folder = None if origin is None else origin.folder
        file = None if folder is None else basis_beside(Path(folder), identity)
        if file is None:
            raise no_basis("the adapter" if origin is None or origin.place is None else origin.place, identity)
        found = DataSpectra.read(file)
    if identity not in (None, found.identity):
        raise AdapterError(
            f"{config.basis or basis_name(identity)}: the adapter shares another basis, {basis_name(identity)}, than "
            f"this one ({basis_name(found.identity)}). Use that file."
        )
    if found.directions != config.directions:
        raise OptionError(
            f"directions={config.directions!r}: the basis file {config.basis} holds directions={found.directions!r}. "
            f"Name those, or another file."
        )
    found.said = f"read from {config.basis or basis_name(found.identity)}"
    config.spectra, config.basis_id = found, found.identity


def data_basis(config: SpectralConfig, layer: str, W_OI: torch.Tensor, rank: int) -> Spectrum:
    """Get the basis that data chose for a layer; `OptionError` without one, `AdapterError` for another weight's."""
    directions, spectra = config.directions, config.spectra
    assert spectra is not None  # `refuse_unprepared`
    if spectra.directions != directions or layer not in spectra:
        raise OptionError(
            f"{layer}: spectune.prepare has not computed directions={directions!r} for this layer. Call it again with "
            f"this config and this model."
        )
    found: Spectrum = spectra[layer]
    shape = (*W_OI.shape, rank)
    if found.shape != shape:
        asked, there = (f"{R} directions of a {rows}x{cols} weight" for rows, cols, R in (shape, found.shape))
        raise OptionError(f"{layer}: this config needs {asked}, but the basis has {there}. Compute them again.")
    found = found.to(W_OI.device)
    if config.basis_id is not None and not gain_off(W_OI.to(found.S_R), found) <= FOREIGN_GAIN:
        raise AdapterError(
            f"{layer}: the basis {basis_name(config.basis_id)} was computed on another base weight. Use the base that "
            f"it was computed on, or compute it again."
        )
    return found
