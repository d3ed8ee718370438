"""`RunConfig`: the configuration of a run, checked before any work; unknown keys are refused."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from ..errors import OptionError, unknown_option

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")
NO_ADAPTER, HEAD = "none", "head"


def absolute_if_there(name: str) -> str:
    """Get an existing path as an absolute one, so that a run's folder works from anywhere; else the name."""
    return str(Path(name).resolve()) if Path(name).exists() else name


PathOrName = Annotated[str, AfterValidator(absolute_if_there)]


class Section(BaseModel):
    """A part of a run's configuration; unknown keys, infinite numbers, and yes or no for a number are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _no_truths(cls, values: Any) -> Any:
        """pydantic takes true for 1, and YAML takes yes for true."""
        for name, value in values.items() if isinstance(values, dict) else ():
            field = cls.model_fields.get(name)
            if (
                field is not None
                and field.annotation is not bool
                and _has_truth(value)
                and _is_number(field.annotation)
            ):
                raise ValueError(f"{name} is {value!r}, and a number is needed")
        return values


def _has_truth(value: Any) -> bool:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else [value]
    return any(isinstance(item, bool) for item in inner)


def _is_number(annotation: Any) -> bool:
    """Ask whether an annotation is of numbers, alone or in a list or dict, and of nothing else but None."""
    if annotation in (int, float):
        return True
    parts = [part for part in getattr(annotation, "__args__", ()) if part is not type(None)]
    return bool(parts) and _is_number(parts[-1])


_SectionT = TypeVar("_SectionT", bound=Section)


class DataSection(Section):
    """Where the examples come from: files, or a data set of the Hugging Face hub."""

    hub: str | None = Field(None, description="Data set on the hub; train, validation, test then name its splits.")
    hub_config: str | None = Field(None, description="Configuration of the hub data set.")
    train: str | None = Field(None, description="File to train on.")
    validation: str | None = Field(None, description="File to choose settings on.")
    test: str | None = Field(None, description="File for the final figures; use it once.")
    validation_share: float | None = Field(
        None, gt=0, lt=1, description="Hold out this share of train as validation (by the seed)."
    )
    limit: dict[Split, Annotated[int, Field(gt=0)]] = Field(
        default_factory=dict, description="Use only this many examples of a split, drawn by the seed."
    )

    @model_validator(mode="before")
    @classmethod
    def _absolute(cls, values: Any) -> Any:
        """Make files absolute paths; splits of the hub stay names, even if a file or folder has the same name."""
        if not isinstance(values, dict) or values.get("hub"):
            return values
        paths = {name: absolute_if_there(values[name]) for name in SPLITS if isinstance(values.get(name), str)}
        return values | paths

    @model_validator(mode="after")
    def _one_validation(self) -> DataSection:
        if self.validation is not None and self.validation_share is not None:
            raise ValueError("validation and validation_share are both given; leave one out")
        if self.hub_config is not None and self.hub is None:
            raise ValueError("hub_config needs hub")
        return self


class Training(Section):
    """The loop: how long, how fast, how it is saved."""

    steps: int | None = Field(None, gt=0, description="Optimizer steps; give this or epochs.")
    epochs: float | None = Field(None, gt=0, description="Passes over the data; give this or steps.")
    batch_size: int = Field(16, gt=0, description="Examples in one forward pass on one device.")
    gradient_accumulation: int = Field(1, gt=0, description="Forward passes per optimizer step.")
    learning_rate: float | None = Field(None, gt=0, description="Rate of the adapter; default: the method's own.")
    head_learning_rate: float | None = Field(None, gt=0, description="Rate of a new head, which is trained in full.")
    head_first: bool = Field(
        False, description="Fit a new head on the frozen body's features before the first step (classifiers, scores)."
    )
    away_from: list[PathOrName] = Field(
        default_factory=list,
        description="Finished runs on the same base whose inputs the adapter leaves alone (directions of data).",
    )
    away_share: float | None = Field(
        None, gt=0, lt=1, description="Share of the energy of those inputs that is left alone; default: 0.9."
    )
    weight_decay: float = Field(0.0, ge=0, description="AdamW's, on matrices (not on biases and norms).")
    warmup: float = Field(0.06, ge=0, description="Share of the steps if below 1, else their number.")
    schedule: Literal["linear", "cosine", "constant", "constant_with_warmup"] = Field(
        "linear", description="How the rate falls after warmup."
    )
    max_grad_norm: float = Field(1.0, ge=0, description="Gradients are clipped to this norm; 0 for never.")
    optimizer: str = Field(
        "adamw_torch",
        description="muon (matrices of a spectral adapter), or any name that TrainingArguments(optim=) knows.",
    )
    precision: Literal["float32", "bfloat16", "float16"] = Field("float32", description="Autocast of the forward pass.")
    gradient_checkpointing: bool = Field(False, description="Less memory, about a third more time.")
    save_every: int = Field(500, gt=0, description="Steps between two checkpoints; the last step is always saved.")
    keep_checkpoints: int = Field(2, gt=0, description="Older ones are deleted.")
    validate_every: int | None = Field(None, gt=0, description="Steps between two validation losses.")
    report_to: list[Literal["tensorboard", "wandb", "trackio", "mlflow"]] = Field(
        default_factory=list, description="Trackers to log to."
    )
    workers: int = Field(0, ge=0, description="Processes that load data.")

    @model_validator(mode="after")
    def _one_length(self) -> Training:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give either steps or epochs")
        if self.schedule == "constant" and self.warmup not in (0, Training.model_fields["warmup"].default):
            raise ValueError("schedule constant has no warmup; choose constant_with_warmup or leave warmup out")
        if self.away_share is not None and not self.away_from:
            raise ValueError("away_share needs away_from; name runs there, or leave it out")
        return self


class RunConfig(Section):
    """The configuration that all recipes share; each adds its `data` and `evaluation`."""

    usual_head_rate: ClassVar[float | None] = None
    """The recipe's own default of `training.head_learning_rate`, if it has one."""

    recipe: str
    model: PathOrName = Field(description="Pretrained model: a folder or a name on the hub.")
    revision: str | None = Field(None, description="Branch, tag or commit of a hub model.")
    dtype: Literal["float32", "bfloat16", "float16"] = Field("float32", description="Dtype of the base.")
    seed: int = Field(0, ge=0, description="The same seed gives the same run.")
    adapter: dict[str, Any] | Literal["none", "head"] = Field(
        description="{method: …} of spectune, {peft_type: …} of PEFT, none (all weights), head (only the new head)."
    )
    training: Training

    @model_validator(mode="after")
    def _one_rate(self) -> RunConfig:
        if self.adapter == HEAD and self.training.learning_rate is not None:
            raise ValueError(
                "adapter: head trains no adapter; give training.head_learning_rate instead of learning_rate"
            )
        return self

    @model_validator(mode="after")
    def _away_by_directions(self) -> RunConfig:
        options = self.adapter if isinstance(self.adapter, dict) else {}
        if self.training.away_from and (options.get("directions", "weight") == "weight" or options.get("basis")):
            raise ValueError(
                "training.away_from needs directions that this run finds in its examples: add directions: gradient to "
                "the adapter, without a basis file"
            )
        return self

    @property
    def adapter_options(self) -> dict[str, Any] | None:
        """The adapter's options; None without an adapter."""
        return None if isinstance(self.adapter, str) else dict(self.adapter)

    @property
    def adapters(self) -> list[dict[str, Any]]:
        """The options of every adapter of the run."""
        return [] if self.adapter_options is None else [self.adapter_options]

    def plain(self) -> dict[str, Any]:
        """Get the configuration as plain values for YAML, including defaults."""
        return self.model_dump(mode="json")


def validate(kind: type[_SectionT], values: Mapping[str, Any], where: str) -> _SectionT:
    """Get the checked configuration; `OptionError` names each wrong key, its value and the near misses."""
    try:
        return kind.model_validate(dict(values))
    except ValidationError as error:
        lines = list(dict.fromkeys(_line(kind, dict(detail)) for detail in error.errors()))
        more = f" ({len(lines) - 3} more)" if len(lines) > 3 else ""
        raise OptionError(f"{where}: {'; '.join(lines[:3])}{more}") from None


def _line(kind: type[BaseModel], detail: dict[str, Any]) -> str:
    place = [str(part) for part in detail["loc"]]
    name = ".".join(place) or "the file"
    if detail["type"] == "extra_forbidden" and len(place) > 1 and place[-1] in kind.model_fields:
        return f"{name}: unknown key. Write {place[-1]} at the top of the file, outside of {place[0]}"
    if detail["type"] == "extra_forbidden":
        return f"{name}: unknown key. {unknown_option(place[-1], _keys_at(kind, place[:-1]))}"
    if detail["type"] == "missing":
        return f"{name}: is missing"
    # pydantic names the branch of a union, such as list[constrained-float], between the keys.
    name = ".".join(part for part in place if not part.startswith(("list[", "dict["))) or "the file"
    message = detail["msg"].removeprefix("Value error, ")
    if detail["type"] == "value_error":
        return f"{name}: {message}"
    return f"{name}={detail['input']!r}: {message[0].lower()}{message[1:]}"


def _keys_at(kind: type[BaseModel], path: Iterable[str]) -> list[str]:
    kinds: list[type[BaseModel]] = [kind]
    for part in (part for part in path if not part.isdigit()):
        inner = [model for k in kinds if part in k.model_fields for model in _models(k.model_fields[part].annotation)]
        # After a list of several kinds, pydantic names the kind by the word that chooses it.
        kinds = inner or [k for k in kinds if any(part in getattr(f.annotation, "__args__", ()) for f in _fields(k))]
    return list(kinds[0].model_fields) if kinds else []


def _fields(kind: type[BaseModel]) -> list[Any]:
    return list(kind.model_fields.values())


def _models(annotation: Any) -> list[type[BaseModel]]:
    """Get the sections in an annotation such as `LmEval | None`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in getattr(annotation, "__args__", ()) for model in _models(part)]
