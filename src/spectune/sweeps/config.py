"""A sweep as it is asked for: one base run, and methods x learning rates x seeds x tasks that go over it."""

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
# Metrics of which less is better, also as a part of lm-eval's names (word_perplexity, bits_per_byte).
SMALLER_IS_BETTER = ("loss", "perplexity", "bits_per_byte")


Grid = Annotated[list[Annotated[float, Field(gt=0)]], Field(min_length=1)]


class Arm(Section):
    """One way of tuning, and the learning rates to try."""

    adapter: dict[str, Any] | Literal["none", "head"] = Field(
        description="As in a run: method, peft_type, none, or head (whose rates are the head's)."
    )
    learning_rates: Grid | dict[str, Grid] = Field(description="The grid; or task -> its grid, for every task.")
    over: dict[str, Any] = Field(default_factory=dict, description="Goes over the base run for this method alone.")

    @field_validator("learning_rates")
    @classmethod
    def _once(cls, values: list[float] | dict[str, list[float]]) -> list[float] | dict[str, list[float]]:
        for grid in values.values() if isinstance(values, dict) else [values]:
            if len({f"{value:g}" for value in grid}) < len(grid):
                raise ValueError("a rate stands twice")
        return values

    def rates(self, task: str) -> list[float]:
        """Get the grid for a task."""
        return list(self.learning_rates[task] if isinstance(self.learning_rates, dict) else self.learning_rates)


class GeneralText(Section):
    """Text that has nothing to do with the task, to see what a language model forgets."""

    file: PathOrName | None = Field(None, description="A .txt file, or rows with a column `text`.")
    hub: str | None = Field(None, description="Or a data set of the hub with a column `text`.")
    hub_config: str | None = Field(None, description="Configuration of the hub data set.")
    split: str = Field("test", description="Split of the hub data set.")
    tokens: int = Field(50_000, gt=0, description="How much of it is read.")

    @model_validator(mode="after")
    def _hub(self) -> GeneralText:
        if self.hub_config is not None and self.hub is None:
            raise ValueError("hub_config needs hub")
        if (self.file is None) == (self.hub is None):
            raise ValueError("give file or hub, one of them")
        return self


class SweepConfig(Section):
    """What a sweep is told."""

    title: str = Field("Methods compared", description="Heads the report.")
    run: dict[str, Any] = Field(description="The base run: everything but adapter, learning rate and seed.")
    tasks: dict[str, dict[str, Any]] = Field(
        {"task": {}}, min_length=1, description="What goes over the base run, task by task."
    )
    methods: dict[str, Arm] = Field(min_length=1, description="Ways of tuning.")
    seeds: list[Annotated[int, Field(ge=0)]] = Field([0, 1, 2], min_length=1, description="Each chosen rate runs all.")
    tuning_seeds: int | None = Field(
        None, gt=0, description="Only so many seeds try every rate, the rest only the chosen one; default: all."
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
        description="So many more rates a method may try on a task while its best stands at an end of its grid.",
    )
    metric: str | None = Field(None, description="The rate is chosen by it; default: the run's first metric.")
    report: str | None = Field(None, description="Reported on test (or of lm_eval); default: the same metric.")
    forgetting: GeneralText | None = Field(None, description="For language models: loss on general text.")
    keep: Literal["nothing", "adapters", "everything"] = Field(
        "adapters", description="What stays of a finished run besides its figures; everything includes checkpoints."
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
            raise ValueError("a seed stands twice")
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
    """Get the checked sweep from a YAML file, each `a.b=value` of `overrides` put over it."""
    return parse_sweep(read_yaml(path, overrides), str(path))


def parse_sweep(values: Mapping[str, Any], where: str = "sweep") -> SweepConfig:
    """Get the checked sweep out of plain values; every run of it is checked too. `OptionError` names what is wrong."""
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
            raise OptionError(f"{task}, {method}: {name} is given by methods and seeds. Leave it out of run and tasks.")
    if "learning_rate" in (values.get("training") or {}):
        raise OptionError(f"{task}, {method}: training.learning_rate is given by methods. Leave it out of run.")
    return Cell(task, method, rate, seed, parse_config(merged(values, own), f"{task}, {method}"))


def cells(sweep: SweepConfig, task: str, method: str, rates: Sequence[float], seeds: Sequence[int]) -> list[Cell]:
    """Get the runs of one method on one task: every rate with every seed."""
    return [cell(sweep, task, method, rate, seed) for rate in rates for seed in seeds]


def merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Get a dict with another one over it, key by key also inside."""
    found = dict(base)
    for key, value in over.items():
        inner = found.get(key)
        found[key] = merged(inner, value) if isinstance(inner, Mapping) and isinstance(value, Mapping) else value
    return found


def require_splits(sweep: SweepConfig) -> None:
    """Refuse a sweep that lacks the examples to choose a rate on, or to report, before anything is trained."""
    method, kinds = next(iter(sweep.methods)), set[str]()
    for task in sweep.tasks:
        config = cell(sweep, task, method, sweep.methods[method].rates(task)[0], sweep.seeds[0]).config
        kinds.add(config.recipe)
        splits = recipe_class(config.recipe)(config).splits
        for split, use in (("validation", "to choose learning rates on"), ("test", "to report")):
            if split not in splits and (sweep.chooses or split == "test"):
                raise DataError(
                    f"{task}: asked for {split} examples {use}, found {', '.join(splits)}. Give data.{split}"
                    f"{' or data.validation_share' if split == 'validation' else ''}."
                )
    if sweep.forgetting is not None and "causal_lm" not in kinds:
        raise OptionError(f"forgetting: it is measured for language models, not for {', '.join(kinds)}. Leave it out.")
    if sweep.forgetting is not None and sweep.forgetting.file is not None and not Path(sweep.forgetting.file).is_file():
        raise DataError(f"forgetting: {sweep.forgetting.file}: asked for general text, found no file. Check the path.")


def metric_of(figures: Mapping[str, Mapping[str, float]], splits: Sequence[str], name: str | None) -> tuple[str, float]:
    """Get a metric's name and its figure on the first split that has it; without a name the first metric."""
    for split in splits:
        found = figures.get(split, {})
        if name is None and found:
            return next(iter(found.items()))
        if name in found:
            return str(name), found[str(name)]
    known = [metric for split in splits for metric in figures.get(split, {})]
    raise OptionError(f"metric {name!r}: the runs do not measure it on {splits[0]}. {nearest(str(name), known)}")


def better_is_smaller(metric: str) -> bool:
    """Ask whether less of a metric is better."""
    return metric.rpartition("/")[2].split(",")[0].endswith(SMALLER_IS_BETTER)
