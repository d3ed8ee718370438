"""`survey_adapter`: what a saved adapter does to its base, layer by layer, and which rank it would need."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ..algebra import singular_values, to_factors
from ..checkpoint.targets import group_names, ordered
from ..errors import AdapterError, OptionError
from ..records import Weight
from ..spectrum import decompose
from .adapter_source import LayerUpdate, open_adapter
from .figures import effective_rank, energy_at, frobenius, median, rank_for_energy, stable_rank
from .intruders import INTRUDER_EPSILON, INTRUDER_K, Intruders, Overlap, intruders, overlap
from .model_survey import points

# The rank suggestion keeps this share of |dW|_F^2, so what is cut off is at most a tenth of |dW|_F. Chosen.
KEPT_ENERGY = 0.99
# Singular values of an update under this share of its largest are float32's roundoff in its factors.
ROUNDOFF = 1e-6


@dataclass(frozen=True)
class LayerSurvey:
    """One layer's update. Figures that need the base are None without one; overlaps and intruders also with `quick`."""

    name: str
    group: str
    shape: tuple[int, int]
    values: list[float]
    """The singular values of dW, descending, without those that are only roundoff."""
    base_norm: float | None
    overlap: Overlap | None
    intruders: Intruders | None

    @property
    def norm(self) -> float:
        """|dW|_F."""
        return frobenius(self.values)

    @property
    def relative(self) -> float | None:
        """|dW|_F / |W|_F; None without a base, or for a base weight of zero."""
        return self.norm / self.base_norm if self.base_norm else None

    @property
    def suggested_r(self) -> int:
        """The smallest rank that keeps 99% of |dW|_F^2; 0 for an update of zero."""
        return rank_for_energy(self.values, KEPT_ENERGY)

    @property
    def figures(self) -> dict[str, float | None]:
        """The figures of this update."""
        return {
            "norm": self.norm,
            "relative": self.relative,
            "rank": len(self.values),
            "effective_rank": effective_rank(self.values),
            "stable_rank": stable_rank(self.values),
            "r_for_90": rank_for_energy(self.values, 0.9),
            "suggested_r": self.suggested_r,
        }


@dataclass(frozen=True)
class AdapterSurvey:
    """What `spectune inspect` shows of an adapter."""

    path: str
    method: str
    base: str | None
    r: int
    """The width of the base's top and bottom spaces in the overlaps."""
    trainable: int
    file_bytes: int
    layer_count: int
    layers: list[LayerSurvey]
    missing: list[str]
    """What could not be measured, and how to measure it."""

    @property
    def suggested_r(self) -> int:
        """The smallest rank that, given to every layer, keeps 99% of the update's energy summed over the layers."""
        widest = max((len(layer.values) for layer in self.layers), default=0)
        total = sum(layer.norm**2 for layer in self.layers)
        for r in range(1, widest + 1):
            kept = sum(layer.norm**2 * energy_at(layer.values, r) for layer in self.layers)
            if kept >= KEPT_ENERGY * total * (1 - 1e-12):
                return r
        return 0

    def groups(self) -> dict[str, list[LayerSurvey]]:
        """Get the layers by their name in every block."""
        found: dict[str, list[LayerSurvey]] = {}
        for layer in self.layers:
            found.setdefault(layer.group, []).append(layer)
        return found

    def to_json(self) -> dict[str, Any]:
        """Get everything as JSON types; a spectrum has at most 48 pairs (place from 1, singular value)."""
        about = ("path", "method", "base", "r", "trainable", "file_bytes", "layer_count", "suggested_r", "missing")
        layers = [
            {"name": layer.name, "group": layer.group, "shape": list(layer.shape), **layer.figures}
            | {key: None if (part := getattr(layer, key)) is None else asdict(part) for key in ("overlap", "intruders")}
            | {"spectrum": points(layer.values)}
            for layer in self.layers
        ]
        rule = {"kept_energy": KEPT_ENERGY, "intruder_k": INTRUDER_K, "intruder_epsilon": INTRUDER_EPSILON}
        return {"kind": "adapter", **{key: getattr(self, key) for key in about}, "rules": rule, "layers": layers}


def survey_adapter(
    path: str | Path,
    base: str | Path | None = None,
    r: int = 8,
    *,
    quick: bool = False,
    on_layer: Callable[[int, int, str], None] | None = None,
) -> AdapterSurvey:
    """Get what a saved adapter does: per layer the spectrum, the size relative to the base, and the overlap with it.

    `path` and `base` as in `open_adapter`. With a base each layer costs one full SVD of W and the top 10 directions of
    W + dW, one layer in memory at a time; `quick` skips these, and with them overlaps and intruders.
    `on_layer(done, total, name)` is called before each layer and at the end. Raises `AdapterError`, `WeightError`.
    """
    if r < 1:
        raise OptionError(f"--r {r} must be at least 1.")
    source = open_adapter(path, base)
    layers = []
    with torch.no_grad():
        updates = source.updates()
        for place in range(source.layer_count):
            if on_layer:
                on_layer(place, source.layer_count, "")
            layers.append(_survey(next(updates), r, quick))
    if on_layer:
        on_layer(source.layer_count, source.layer_count, "")
    groups = group_names(layer.name for layer in layers)
    named = {layer.name: LayerSurvey(**{**vars(layer), "group": groups[layer.name]}) for layer in layers}
    found = [named[name] for name in ordered(named)]
    place_of_base = None if source.base is None else source.base.name
    missing = _missing(place_of_base, quick)
    about = (str(path), source.method, place_of_base, r, source.trainable, source.file_bytes, source.layer_count)
    return AdapterSurvey(*about, found, missing)


def _survey(update: LayerUpdate, r: int, quick: bool) -> LayerSurvey:
    if not all(bool(torch.isfinite(factor).all()) for factor in to_factors(update.delta)):
        raise AdapterError(
            f"{update.name}: the update contains NaN or infinity. Train again with a lower learning rate."
        )
    S_P = singular_values(update.delta)
    largest = float(S_P[0]) if len(S_P) else 0.0
    values = [value for value in S_P.tolist() if value > ROUNDOFF * largest]
    norm = found_overlap = found_intruders = None
    if update.W_OI is not None:
        norm = float(torch.linalg.vector_norm(update.W_OI))
    if update.W_OI is not None and not quick:
        spectrum = decompose(Weight(update.name, update.W_OI), solver="exact")
        found_overlap = overlap(update.delta, spectrum, r)
        found_intruders = intruders(update.delta, update.W_OI, spectrum)
    shape = update.delta.shape
    return LayerSurvey(update.name, "", shape, values, norm, found_overlap, found_intruders)


def _missing(base: str | None, quick: bool) -> list[str]:
    if base is None:
        return ["size relative to the base, overlaps and intruder directions: pass --base FOLDER"]
    return ["overlaps and intruder directions: run without --quick"] if quick else []


def adapter_group_figures(survey: AdapterSurvey) -> list[dict[str, Any]]:
    """Get one row for each kind of layer: how many, and the median of every figure (intruders: their sum)."""
    rows = []
    for group, layers in survey.groups().items():
        row: dict[str, Any] = {"group": group, "count": len(layers)}
        figures = [layer.figures for layer in layers]
        for key in figures[0]:
            row[key] = _median_of([each[key] for each in figures])
        overlaps = [asdict(layer.overlap) for layer in layers if layer.overlap]
        row |= {key: median([each[key] for each in overlaps]) for key in (overlaps[0] if overlaps else {})}
        found = [layer.intruders for layer in layers if layer.intruders]
        if found:
            row |= {"intruders": sum(each.count for each in found), "outside": sum(each.outside for each in found)}
            row |= {"looked_at": sum(each.looked_at for each in found)}
        rows.append(row)
    return rows


def _median_of(values: list[float | None]) -> float | None:
    present = [value for value in values if value is not None]
    return median(present) if present else None
