"""Classes from the labels in files: their names, their order, their numbers of examples."""

from __future__ import annotations

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ..errors import DataError
from .data import Row, column, is_missing, place

WHOLE, WHOLE_FLOAT = re.compile(r"[+-]?[0-9]+"), re.compile(r"([+-]?[0-9]+)\.0+")


def class_name(value: Any) -> str:
    """Get the name of a label's class: 1, 1.0 and "1" are the same, and so are both encodings of "é".

    `DataError` for an empty label, a list, infinity or NaN.
    """
    if is_missing(value) or (isinstance(value, str) and not value.strip()):
        raise DataError("has no label. Add it, or remove the row.")
    if isinstance(value, (bool, int)):
        return str(int(value))
    if isinstance(value, float) and math.isfinite(value):
        return str(int(value)) if value == int(value) else str(value)
    if not isinstance(value, str):
        raise DataError(
            f"the label {str(value)[:40]} ({type(value).__name__}) is neither text nor a finite number. Correct it."
        )
    name = unicodedata.normalize("NFC", value.strip())  # macOS uses the other form in names of folders
    whole = WHOLE_FLOAT.fullmatch(name)
    return whole.group(1) if whole else name


def score(value: Any) -> float:
    """Get a label as a score; `DataError` if it is not a finite number."""
    if is_missing(value) or (isinstance(value, str) and not value.strip()):
        raise DataError("has no score. Add it, or remove the row.")
    try:
        found = float("nan" if isinstance(value, bool) else value)
    except (TypeError, ValueError):
        found = math.nan
    if not math.isfinite(found):
        raise DataError(f"the score {value!r} is not a number. Correct it, or use problem: classification.")
    return found


def labels_of(rows: Sequence[Row], name: str, split: str, scores: bool) -> list[Any]:
    """Get the class name or the score of every row; `DataError` names the first row without one."""
    values, found = column(rows, name, split), []
    answers = not scores and any(isinstance(value, bool) for value in values)
    for i, value in enumerate(values):
        try:
            if answers and isinstance(value, str):
                raise DataError(f"the label {value!r} is text, but others are true or false. Write all in one form.")
            found.append(score(value) if scores else class_name(value))
        except DataError as error:
            raise DataError(f"{place(rows[i], split, i)}: {error}") from None
    return found


def ordered(names: Iterable[str]) -> list[str]:
    """Get class names sorted, as numbers if all are."""
    found = set(names)
    return sorted(found, key=int) if all(WHOLE.fullmatch(name) for name in found) else sorted(found)


def count(names: Sequence[str], labels: Mapping[str, Sequence[str]]) -> dict[str, dict[str, int]]:
    """Get split -> class -> number of examples, including classes without any."""
    counted = {split: Counter(found) for split, found in labels.items()}
    return {split: {name: found[name] for name in names} for split, found in counted.items()}


def spellings(values: Iterable[Any]) -> list[str]:
    """Get a sentence for each class that is written in several ways, and for classes that differ only in case."""
    ways: dict[str, dict[str, None]] = {}
    for value in values:
        ways.setdefault(class_name(value), {})[str(value) if isinstance(value, bool) else repr(value)] = None
    said = [f"{' and '.join(found)} are one class, {name!r}" for name, found in ways.items() if len(found) > 1]
    alike: dict[str, list[str]] = {}
    for name in ways:
        alike.setdefault(name.casefold(), []).append(name)
    return said + [f"the classes {found} differ only in case" for found in alike.values() if len(found) > 1]


def unlearned(counts: Mapping[str, Mapping[str, int]]) -> list[str]:
    """Get a sentence for the classes without training examples."""
    none = [name for name, number in counts["train"].items() if not number]
    return [f"no training example has the class {', '.join(map(repr, none[:5]))}"] if none else []
