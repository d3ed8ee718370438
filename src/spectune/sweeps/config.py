"""The configuration of a sweep: one base run, varied by methods x learning rates x seeds x tasks."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from ..errors import DataError, OptionError, nearest
from ..recipes.table import parse_config, recipe_class
from ..training.config import HEAD, PathOrName, RunConfig, Section, validate
from ..training.yaml_file import read_yaml

# Names become folders.
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]*")


Grid = Annotated[list[Annotated[float, Field(gt=0)]], Field(min_length=1)]


class Arm(Section):
    """One way of tuning, and the learning rates to try."""

    adapter: dict[str, Any] | Literal["none", "head"] = Field(
        description="As in a run: method, peft_type, none, or head (whose rates are the head's)."
    )
    learning_rates: Grid | dict[str, Grid] = Field(description="The grid; or task -> its grid, for every task.")
    over: dict[str, Any] = Field(
        default_factory=dict, description="Replaces settings of the base run, only for this method."
    )

    @field_validator("learning_rates")
    @classmethod
    def _once(cls, values: list[float] | dict[str, list[float]]) -> list[float] | dict[str, list[float]]:
        for grid in values.values() if isinstance(values, dict) else [values]:
            if len({f"{value:g}" for value in grid}) < len(grid):
                raise ValueError("a rate occurs twice")
        return values

    def rates(self, task: str) -> list[float]:
        """Get the grid for a task."""
        return list(self.learning_rates[task] if isinstance(self.learning_rates, dict) else self.learning_rates)


class GeneralText(Section):
    """Text unrelated to the task, to measure what a language model forgets."""

    file: PathOrName | None = Field(None, description="A .txt file, or rows with a column `text`.")
    hub: str | None = Field(None, description="Or a data set of the hub with a column `text`.")
    hub_config: str | None = Field(None, description="Configuration of the hub data set.")
    split: str = Field("test", description="Split of the hub data set.")
    tokens: int = Field(50_000, gt=0, description="Tokens to read at most.")

    @model_validator(mode="after")
    def _hub(self) -> GeneralText:
        if self.hub_config is not None and self.hub is None:
            raise ValueError("hub_config needs hub")
        if (self.file is None) == (self.hub is None):
            raise ValueError("give either file or hub")
        return self


class SweepConfig(Section):
    """The configuration of a sweep."""

    title: str = Field("Methods compared", description="Title of the report.")
    run: dict[str, Any] = Field(description="The base run: everything but adapter, learning rate and seed.")
    tasks: dict[str, dict[str, Any]] = Field(
        {"task": {}}, min_length=1, description="Settings that replace the base run's, by task."
    )
    methods: dict[str, Arm] = Field(min_length=1, description="Ways of tuning.")
    seeds: list[Annotated[int, Field(ge=0)]] = Field(
        [0, 1, 2], min_length=1, description="The chosen rate runs with all of them."
    )
    tuning_seeds: int | None = Field(
        None, gt=0, description="Only this many seeds try every rate, the others only the chosen one; default: all."
    )
    stop: Literal["asha"] | None = Field(
        None,
        description="Stop rates early that are hopeless by their validation losses during training (by Optuna).",
    )
    baseline: str | None = Field(
        None, description="One of the methods: the others' gains over it are shown, paired by seed, with their errors."
    )
    head_at_rate: bool = Field(
        False, description="Train a new head at the adapter's rate, as scripts with one rate for all do."
    )
    grow: int = Field(
        0,
        ge=0,
        description="Limit of extra rates for a method and task whose best rate is at an end of the grid.",
    )
    metric: str | None = Field(None, description="Metric that chooses the rate; default: the run's first.")
    report: str | None = Field(None, description="Metric reported on test (or from lm_eval); default: the same.")
    forgetting: GeneralText | None = Field(None, description="For language models: loss on general text.")
    keep: Literal["nothing", "adapters", "everything"] = Field(
        "adapters", description="Kept of a finished run besides its figures; everything includes checkpoints."
    )

    @field_validator("tasks", "methods")
    @classmethod
    def _names(cls, values: dict[str, Any]) -> dict[str, Any]:
        for name in values:
            if not NAME.fullmatch(str(name)):
                raise ValueError(f"{name!r} names a folder: letters, digits, '.', '_', '-' and '+' only")
        return values

    @model_validator(mode="after")
    def _a_grid_for_each_task(self) -> SweepConfig:
        for name, method in self.methods.items():
            grids = method.learning_rates
            if isinstance(grids, dict) and set(grids) != set(self.tasks):
                raise ValueError(
                    f"methods.{name}.learning_rates has grids for {', '.join(grids)}, but the tasks are "
                    f"{', '.join(self.tasks)}; give one for each"
                )
        return self

    @property
    def chooses(self) -> bool:
        """Whether any method has more than one rate to choose from."""
        return self.grow > 0 or any(len(m.rates(task)) > 1 for m in self.methods.values() for task in self.tasks)

    @model_validator(mode="after")
    def _known_baseline(self) -> SweepConfig:
        if self.baseline is not None and self.baseline not in self.methods:
            raise ValueError(
                f"baseline {self.baseline!r} is not one of the methods. {nearest(self.baseline, [*self.methods])}"
            )
        return self

    @field_validator("seeds")
    @classmethod
    def _once(cls, values: list[int]) -> list[int]:
        if len(set(values)) < len(values):
            raise ValueError("a seed occurs twice")
        return values


@dataclass(frozen=True)
class Cell:
    """One run of a sweep."""

    task: str
    method: str
    rate: float
    seed: int
    config: RunConfig

    @property
    def name(self) -> str:
        """Get the name of its folder and of its file."""
        return f"{self.task}--{self.method}--{self.rate:g}--{self.seed}"


def load_sweep(path: str | Path, overrides: Iterable[str] = ()) -> SweepConfig:
    """Get the checked sweep from a YAML file; each `a.b=value` of `overrides` replaces a setting."""
    return parse_sweep(read_yaml(path, overrides), str(path))


def parse_sweep(values: Mapping[str, Any], where: str = "sweep") -> SweepConfig:
    """Get the checked sweep from plain values, with all its runs checked; `OptionError` names a mistake."""
    sweep = validate(SweepConfig, values, where)
    for task in sweep.tasks:
        for method in sweep.methods:
            cell(sweep, task, method, sweep.methods[method].rates(task)[0], sweep.seeds[0])
    return sweep


def cell(sweep: SweepConfig, task: str, method: str, rate: float, seed: int) -> Cell:
    """Get one run: the base, the task over it, the method over both."""
    asked = sweep.methods[method]
    values = merged(merged(sweep.run, sweep.tasks[task]), asked.over)
    rate_of = "head_learning_rate" if asked.adapter == HEAD else "learning_rate"
    training = {rate_of: rate} | ({"head_learning_rate": rate} if sweep.head_at_rate else {})
    own = {"adapter": asked.adapter, "training": training, "seed": seed}
    for name in ("adapter", "seed"):
        if name in values:
            raise OptionError(f"{task}, {method}: methods and seeds set {name}. Leave it out of run and tasks.")
    if "learning_rate" in (values.get("training") or {}):
        raise OptionError(f"{task}, {method}: methods set training.learning_rate. Leave it out of run.")
    return Cell(task, method, rate, seed, parse_config(merged(values, own), f"{task}, {method}"))


def cells(sweep: SweepConfig, task: str, method: str, rates: Sequence[float], seeds: Sequence[int]) -> list[Cell]:
    """Get the runs of one method on one task: every rate with every seed."""
    return [cell(sweep, task, method, rate, seed) for rate in rates for seed in seeds]


def merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Get a dict updated by another one, key by key, also inside."""
    found = dict(base)
    for key, value in over.items():
        inner = found.get(key)
        found[key] = merged(inner, value) if isinstance(inner, Mapping) and isinstance(value, Mapping) else value
    return found


def require_splits(sweep: SweepConfig) -> None:
    """Refuse a sweep without validation or test examples before anything is trained."""
    method, kinds = next(iter(sweep.methods)), set[str]()
    for task in sweep.tasks:
        config = cell(sweep, task, method, sweep.methods[method].rates(task)[0], sweep.seeds[0]).config
        kinds.add(config.recipe)
        splits = recipe_class(config.recipe)(config).splits
        for split, use in (("validation", "to choose learning rates on"), ("test", "to report")):
            if split not in splits and (sweep.chooses or split == "test"):
                raise DataError(
                    f"{task}: {split} examples are needed {use}, but it has only {', '.join(splits)}. "
                    f"Give data.{split}{' or data.validation_share' if split == 'validation' else ''}."
                )
    if sweep.forgetting is not None and "causal_lm" not in kinds:
        raise OptionError(f"forgetting: works only for language models, not for {', '.join(kinds)}. Leave it out.")
    if sweep.forgetting is not None and sweep.forgetting.file is not None and not Path(sweep.forgetting.file).is_file():
        raise DataError(f"forgetting: the file {sweep.forgetting.file} does not exist. Check the path.")


def metric_of(figures: Mapping[str, Mapping[str, float]], splits: Sequence[str], name: str | None) -> tuple[str, float]:
    """Get a metric's name and its figure on the first split that has it; without a name the first metric."""
    for split in splits:
        found = figures.get(split, {})
        if name is None and found:
            return next(iter(found.items()))
        if name in found:
            return str(name), found[str(name)]
    known = [metric for split in splits for metric in figures.get(split, {})]
    raise OptionError(f"metric {name!r}: is not measured on {splits[0]}. {nearest(str(name), known)}")
