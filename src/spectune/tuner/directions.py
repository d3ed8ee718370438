"""Directions of data in a config: which options work with them, and the basis of one layer."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..errors import OptionError, nearest
from ..methods import METHODS, Method
from ..records import Spectrum
from ..spectrum import DIRECTIONS, DataSpectra

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


def data_basis(directions: str, spectra: DataSpectra | None, layer: str) -> Spectrum:
    """Get the basis that data chose for a layer; `OptionError` if `spectune.prepare` has not computed it."""
    assert spectra is not None  # `refuse_unprepared`
    if spectra.directions != directions or layer not in spectra:
        raise OptionError(
            f"{layer}: spectune.prepare has not computed directions={directions!r} for this layer. Call it again with "
            f"this config and this model."
        )
    return spectra[layer]
