"""`survey_model`: the spectra of a model's weights, and what every method would cost."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..checkpoint import find_base
from ..checkpoint.targets import find_targets, spread
from .budget import BudgetRow, budget, budget_methods
from .decomposition_time import DecompositionClock
from .figures import (
    effective_rank,
    energy_at,
    frobenius,
    median,
    rank_for_energy,
    stable_rank,
    weight_singular_values,
)

OnLayer = Callable[[int, int, str], None]
# Points of a spectrum in JSON, as far apart on a log axis as they can be. Chosen, not measured.
JSON_POINTS = 48


@dataclass(frozen=True)
class WeightSurvey:
    """One weight: its singular values and their figures."""

    name: str
    group: str
    shape: tuple[int, int]
    values: list[float]
    """All K singular values, descending."""
    r: int

    @property
    def figures(self) -> dict[str, float]:
        """The figures of this spectrum: norm, effective and stable rank, the energy in the top r, r for 90%."""
        return {
            "norm": frobenius(self.values),
            "largest": self.values[0],
            "effective_rank": effective_rank(self.values),
            "effective_share": effective_rank(self.values) / len(self.values),
            "stable_rank": stable_rank(self.values),
            "energy_at_r": energy_at(self.values, self.r),
            "r_for_90": rank_for_energy(self.values, 0.9),
        }


@dataclass(frozen=True)
class ModelSurvey:
    """What `spectune inspect` shows of a model."""

    path: str
    r: int
    weights: list[WeightSurvey]
    """The surveyed weights, in the order of the model's blocks."""
    targets: int
    """How many weights an adapter would be put on, surveyed or not; the budget counts them all."""
    target_numbers: int
    model_numbers: int
    left_out: dict[str, int]
    """How many matrices would get no adapter, by reason."""
    budget: list[BudgetRow]

    def groups(self) -> dict[str, list[WeightSurvey]]:
        """Get the weights by the name that they have in every block."""
        found: dict[str, list[WeightSurvey]] = {}
        for weight in self.weights:
            found.setdefault(weight.group, []).append(weight)
        return found

    def to_json(self) -> dict[str, Any]:
        """Get everything as JSON types; each spectrum as at most 48 pairs (place from 1, singular value)."""
        weights = [
            {"name": w.name, "group": w.group, "shape": list(w.shape), **w.figures, "spectrum": points(w.values)}
            for w in self.weights
        ]
        rows = [{**asdict(row), "memory_bytes": row.memory_bytes} for row in self.budget]
        about = {
            key: getattr(self, key) for key in ("path", "r", "targets", "target_numbers", "model_numbers", "left_out")
        }
        return {"kind": "model", **about, "groups": group_figures(self), "weights": weights, "budget": rows}


def survey_model(
    path: str | Path,
    r: int = 8,
    *,
    include: str | None = None,
    exclude: str | None = None,
    sample: int | None = None,
    quick: bool = False,
    on_layer: OnLayer | None = None,
) -> ModelSurvey:
    """Get the spectra of a model's weights and the budget of every method at `r`.

    `path` is a model folder, a safetensors or GGUF file, a run with adapter: none, or a hub name; one weight is in
    memory at a time. `include`, `exclude` choose the weights (`find_targets`); `sample` looks at so many of each kind,
    evenly spread, while the budget counts all.
    `quick` leaves out timing the decompositions. `on_layer(done, total, name)` is called before each weight and at
    the end. Raises `OptionError`, `AdapterError` or `WeightError`.
    """
    base = find_base(path).checkpoint
    targets, left_out = find_targets(base, include, exclude)
    rows = budget(targets, r)
    chosen = spread(targets, sample)
    weights = []
    for place, target in enumerate(chosen):
        if on_layer:
            on_layer(place, len(chosen), target.name)
        with torch.no_grad():
            values = weight_singular_values(target.matrix(base), target.name)
        weights.append(WeightSurvey(target.name, target.group, target.shape, values, r))
    if not quick:
        clock = DecompositionClock(base, targets)
        seconds = {name: clock.estimate(method) for name, method in budget_methods(r).items()}
        rows = [replace(row, decompose_seconds=seconds.get(row.method, row.decompose_seconds)) for row in rows]
    if on_layer:
        on_layer(len(chosen), len(chosen), "")
    numbers = sum(math.prod(target.shape) for target in targets)
    whole = sum(math.prod(shape) for shape in base.shapes.values())
    return ModelSurvey(str(path), r, weights, len(targets), numbers, whole, left_out, rows)


def group_figures(survey: ModelSurvey) -> list[dict[str, Any]]:
    """Get one row for each kind of weight: how many, their shape, and the median of every figure."""
    rows = []
    for group, weights in survey.groups().items():
        figures = [weight.figures for weight in weights]
        shapes = sorted({weight.shape for weight in weights})
        middle = {key: median([each[key] for each in figures]) for key in figures[0]}
        rows.append({"group": group, "count": len(weights), "shapes": [list(shape) for shape in shapes], **middle})
    return rows


def points(values: list[float]) -> list[tuple[int, float]]:
    """Get at most 48 (place from 1, value) of a spectrum, with both ends, evenly on a log axis."""
    count = len(values)
    places = {max(1, round(count ** (i / (JSON_POINTS - 1)))) for i in range(JSON_POINTS)}
    return [(place, values[place - 1]) for place in sorted(places)] if count else []
