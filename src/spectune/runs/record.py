"""`RunRecord`: everything that a report shows of a run, as plain numbers and words that JSON can hold."""

from __future__ import annotations

import json
import math
import re
from dataclasses import asdict, dataclass, field, fields
from typing import Any, TypeVar

from ..errors import DataError, OptionError, nearest

FORMAT = 1
_PartT = TypeVar("_PartT")


@dataclass(frozen=True)
class Metric:
    """One measured figure, with what it was measured on."""

    name: str
    value: float
    note: str = ""
    share: bool = True
    """The value is a share from 0 to 1, as an accuracy is, and is drawn as a bar; others stand in a table."""

    def __post_init__(self) -> None:
        if self.share and not 0 <= self.value <= 1:
            raise OptionError(
                f"metric {self.name!r}: asked for a share from 0 to 1, found {self.value}. "
                f"Pass share=False for a figure that is no share."
            )


@dataclass(frozen=True)
class Size:
    """What one way of tuning costs: the numbers it trains, and the bytes of its file if there is one."""

    name: str
    trainable: int
    file_bytes: int | None = None


@dataclass(frozen=True)
class LayerSpectrum:
    """The singular values of one layer's weight, descending, before and after tuning."""

    name: str
    before: list[float]
    after: list[float]


@dataclass(frozen=True)
class LayerUpdate:
    """How far one layer has moved."""

    name: str
    moved: float
    """|dW|_F."""
    norm: float
    """|W|_F."""

    @property
    def share(self) -> float:
        """|dW|_F as a share of |W|_F; 0 for a weight of zeros."""
        return self.moved / self.norm if self.norm else 0.0


@dataclass(frozen=True)
class Proof:
    """One thing that was checked, and what came out."""

    name: str
    ok: bool
    text: str = ""


@dataclass(frozen=True)
class Example:
    """One held-out input, the right answer, and the tuned model's answer."""

    text: str
    expected: str
    predicted: str

    @property
    def right(self) -> bool:
        """Whether the model gave the expected answer."""
        return self.expected == self.predicted


@dataclass(frozen=True)
class Picture:
    """One picture that the run drew."""

    caption: str
    png: str
    """The PNG file in base64, as the page embeds it."""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9+/]*={0,2}", self.png):
            raise OptionError(f"picture {self.caption!r}: a PNG file in base64 is wanted, found something else.")


@dataclass(frozen=True)
class RunRecord:
    """One run as it will be shown. Order is kept: of the shares in `metrics` the last is this run's result and
    those before it are what it is compared with; of `sizes` the first is this run's adapter.
    """

    title: str
    task: str
    method: str
    config: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    machine: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    loss: list[float] = field(default_factory=list)
    """One number per optimizer step; NaN and infinity are kept, a run that diverged is shown as one."""
    validation: list[tuple[int, float]] = field(default_factory=list)
    """(step, loss) of each look at held-out examples during training."""
    metrics: list[Metric] = field(default_factory=list)
    sizes: list[Size] = field(default_factory=list)
    spectra: list[LayerSpectrum] = field(default_factory=list)
    updates: list[LayerUpdate] = field(default_factory=list)
    proofs: list[Proof] = field(default_factory=list)
    examples: list[Example] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)
    """What the model drew, in the order in which it was drawn."""
    headline: str = ""
    """The result in one sentence; empty has the page say it from `metrics` and `sizes`."""

    def to_json(self) -> str:
        """Get the record as JSON that every reader takes: what JSON cannot hold (NaN, a path, a dtype) as text."""
        return json.dumps({"format": FORMAT, **_plain(asdict(self))}, indent=1, ensure_ascii=False, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> RunRecord:
        """Get the record back from `to_json`; `DataError` if it is something else or of a newer release."""
        try:
            read = json.loads(text)
        except ValueError as error:
            raise DataError(f"run record: the text is no JSON ({error}). Write it anew with to_json.") from None
        found = read.pop("format", None) if isinstance(read, dict) else None
        if found != FORMAT:
            raise DataError(f"run record: asked for format {FORMAT}, found {found}. Read it with the release it is of.")
        for name, kind in PARTS.items():
            if name in read:
                read[name] = [_part(kind, name, item) for item in _list(name, read[name])]
        if "loss" in read:
            read["loss"] = [_number("loss", value) for value in _list("loss", read["loss"])]
        if "validation" in read:
            read["validation"] = [_look(item) for item in _list("validation", read["validation"])]
        return _part(cls, "record", read)


PARTS: dict[str, type] = {
    "metrics": Metric,
    "sizes": Size,
    "spectra": LayerSpectrum,
    "updates": LayerUpdate,
    "proofs": Proof,
    "examples": Example,
    "pictures": Picture,
}


def _part(kind: type[_PartT], name: str, read: Any) -> _PartT:
    known = [f.name for f in fields(kind)]  # type: ignore[arg-type]
    if not isinstance(read, dict):
        raise DataError(f"run record: {name} holds {read!r}, a {kind.__name__} was expected. Write it anew.")
    for key in read:
        if key not in known:
            raise DataError(f"run record: {name} has the unknown key {key!r}. {nearest(key, known)}")
    if kind is Metric and "value" in read:
        read["value"] = _number(name, read["value"])
    if kind is LayerUpdate:
        read |= {key: _number(name, read[key]) for key in ("moved", "norm") if key in read}
    if kind is LayerSpectrum:
        read |= {key: [_number(name, v) for v in _list(name, read[key])] for key in ("before", "after") if key in read}
    try:
        return kind(**read)
    except TypeError as error:
        raise DataError(f"run record: {name} is not whole ({error}). Write it anew with to_json.") from None


def _list(name: str, read: Any) -> list[Any]:
    if not isinstance(read, list):
        raise DataError(f"run record: {name} holds {read!r}, a list was expected. Write it anew with to_json.")
    return read


def _look(read: Any) -> tuple[int, float]:
    if not isinstance(read, list) or len(read) != 2:
        raise DataError(f"run record: validation holds {read!r}, a step and a loss were expected. Write it anew.")
    return int(_number("validation", read[0])), _number("validation", read[1])


def _number(name: str, read: Any) -> float:
    try:
        return float(read)
    except (TypeError, ValueError):
        raise DataError(f"run record: {name} holds {read!r}, which is no number. Write it anew.") from None


def _plain(value: Any) -> Any:
    """Get a value as JSON's own types; non-finite numbers become the text that `float` reads back."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, (set, frozenset)):
        return sorted(_plain(item) for item in value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else str(float(value))
    return value if value is None or isinstance(value, (bool, int, str)) else str(value)
