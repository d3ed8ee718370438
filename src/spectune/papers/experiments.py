"""Published experiments as ready sweeps, with their printed figures: at full size, and small.

One YAML in `experiments/` for each: `published` (method -> task -> figure as printed), `full` and `small` (a sweep and
how it departs from the paper), or `compute`, for those that train nothing, or `missing`, with the reason. `like` names
the experiment that it goes over; null takes a key out. The full size has the paper's own rates and seeds; `tuned` goes
over it with a grid for each method.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from ..errors import DataError, OptionError, nearest
from ..sweeps.config import SweepConfig, parse_sweep
from ..training.config import Section, validate
from ..training.yaml_file import put, read_yaml

FOLDER, ENDING = "experiments", ".yaml"
WORD = re.compile(r"\$\{(\w+)\}")
TUNED = "Every method chose its rate from its own grid on held-out examples; the paper trained at one rate."


class Version(Section):
    """One size of an experiment."""

    deviations: list[str] = Field(min_length=1)
    """Its deviations from the paper, one sentence each."""
    makers: list[Literal["languages", "digits", "interface_lm"]] = Field(default_factory=list)
    """Models and data of `small_models` that are made before."""
    sweep: dict[str, Any]
    tuned: dict[str, Any] | None = None
    """What goes over the sweep with --tune: grids of rates, and the examples to choose them on."""


class Experiment(Section):
    """A published experiment."""

    title: str
    source: str
    needs: str
    """Hardware, licences and data that the full size needs."""
    published: dict[str, dict[str, float]] = Field(default_factory=dict)
    full: Version | None = None
    small: Version | None = None
    small_with_data: Version | None = None
    """The small size with --data."""
    compute: Literal["parameter_table", "lemmas", "svd_cost"] | None = None
    deviations: list[str] = Field(default_factory=list)
    """Of a computation: how it departs from the paper."""
    missing: str | None = None
    """Why it cannot be run here, and what comes nearest."""

    @model_validator(mode="after")
    def _one_kind(self) -> Experiment:
        if [self.compute is None, self.full is None, self.missing is None].count(False) != 1:
            raise ValueError("an experiment has sweeps, a computation or the reason why it is missing, one of them")
        return self


@dataclass(frozen=True)
class Reproduction:
    """A sweep that is ready to run, and the published figures for its report."""

    sweep: SweepConfig
    published: dict[str, Any]


def experiment_names() -> list[str]:
    """Get the names of all experiments."""
    folder = resources.files(__package__).joinpath(FOLDER)
    return sorted(path.name.removesuffix(ENDING) for path in folder.iterdir() if path.name.endswith(ENDING))


def load_experiment(name: str) -> Experiment:
    """Get one experiment; `OptionError` with the near misses for a name that does not exist."""
    names = experiment_names()
    if name not in names:
        raise OptionError(f"experiment {name!r} does not exist. {nearest(name, names)}")
    return validate(Experiment, _read(name), name)


def _read(name: str) -> dict[str, Any]:
    with resources.as_file(resources.files(__package__).joinpath(FOLDER, name + ENDING)) as path:
        values = read_yaml(path)
    like = values.pop("like", None)
    return values if like is None else _over(_read(like), values)


def _over(base: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Get a dict with another one over it, key by key also inside; None takes a key out."""
    found = dict(base)
    for key, value in values.items():
        inner = found.get(key)
        if value is None:
            found.pop(key, None)
        else:
            found[key] = _over(inner, value) if isinstance(inner, dict) and isinstance(value, dict) else value
    return found


def prepare(
    experiment: Experiment,
    folder: str | Path,
    *,
    small: bool,
    tune: bool = False,
    data: str | Path | None = None,
    overrides: Iterable[str] = (),
    say: Callable[[str], None] | None = None,
) -> Reproduction:
    """Get an experiment's sweep, with its models and data made in `folder`/made.

    `tune` gives every method its own grid of rates in place of the paper's rate. It and `overrides` (key=value), which
    go over the sweep, are named among the deviations. `DataError` where it needs --data.
    """
    version = _version(experiment, small, data)
    values: dict[str, str] = {} if data is None else {"data": str(Path(data).resolve())}
    if version.makers:
        from .small_models import MAKERS

        made = Path(folder, "made").resolve()
        made.mkdir(parents=True, exist_ok=True)
        for maker in version.makers:
            if say is not None:
                say(f"preparing {maker}")
            values |= MAKERS[maker](made)
    asked, deviations = _filled(version.sweep, values, experiment.title), [*version.deviations]
    if tune:
        asked = _over(asked, _filled(_tuned(version, experiment.title), values, experiment.title))
        deviations.append(TUNED)
    changed = list(overrides)
    for override in changed:
        put(asked, override)
    size = "small" if small else "full size"
    sweep = parse_sweep({"title": f"{experiment.title} ({size})"} | asked, experiment.title)
    deviations += [f"Changed by the user: {override}" for override in changed]
    return Reproduction(sweep, {"source": experiment.source, "rows": experiment.published, "deviations": deviations})


def _tuned(version: Version, where: str) -> dict[str, Any]:
    if version.tuned is None:
        raise OptionError(f"{where}: every method has its own grid of rates already. Leave --tune out.")
    return version.tuned


def _version(experiment: Experiment, small: bool, data: str | Path | None) -> Version:
    if experiment.missing is not None:
        raise OptionError(f"{experiment.title}: it cannot be run. {experiment.missing}")
    version = experiment.small if small else experiment.full
    if small and data is not None and experiment.small_with_data is not None:
        version = experiment.small_with_data
    if version is None:
        raise OptionError(f"{experiment.title}: has no {'small' if small else 'full'} version.")
    return version


def _filled(value: Any, words: Mapping[str, str], where: str) -> Any:
    """Get a value with every `${name}` in its texts replaced."""
    if isinstance(value, dict):
        return {key: _filled(inner, words, where) for key, inner in value.items()}
    if isinstance(value, list):
        return [_filled(inner, words, where) for inner in value]
    if not isinstance(value, str):
        return value
    for name in WORD.findall(value):
        if name not in words:
            raise DataError(
                f"{where}: needs your own {value!r}. Give --data DIR with the files that `spectune reproduce` lists."
            )
    return WORD.sub(lambda found: words[found[1]], value)
