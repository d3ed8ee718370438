"""Other values for an option, out of its annotation, its default and the words of its help."""

from __future__ import annotations

import dataclasses
import re
import types
from collections.abc import Iterator, Sequence
from enum import Enum
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints


def other_values(annotation: Any, default: Any, help_text: str = "", names: Sequence[str] = ("x",)) -> Iterator[Any]:
    """Get values that YAML can hold and that are not the default, the likeliest first; none for an unknown annotation.

    `names` are modules that exist, for options that take such. Not every value need be allowed.
    """
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        for part in parts:
            yield from other_values(part, default, help_text, names)
    elif origin is Annotated:
        yield from other_values(parts[0], default, help_text, names)
    elif origin is Literal:
        yield from (word for word in parts if word != default)
    elif origin in (list, set):
        words = names if parts[0] is str else list(other_values(parts[0], None, help_text))
        yield from ([word] for word in words)
        if parts[0] is int:
            yield words[:2]  # for an option that takes a pair
    elif origin is dict or annotation is dict:
        yield {names[0]: 3}
    elif dataclasses.is_dataclass(annotation):
        yield from _dataclass_with_one_other(annotation)
    elif isinstance(annotation, type):
        yield from _plain_values(annotation, default, help_text)
    elif annotation is Any:
        yield from _words(help_text)


def _plain_values(kind: type, default: Any, help_text: str) -> Iterator[Any]:
    if issubclass(kind, Enum):
        yield from (member.value for member in kind if member != default)
    elif kind is bool:
        yield not default
    elif kind is int:
        # The next one, and small ones: large numbers may be cut to what is there.
        yield from (value for value in ([default + 1] if isinstance(default, int) else []) + [1, 3] if value != default)
    elif kind is float:
        yield from (value for value in (0.25, 0.5, 2.0) if value != default)
    elif kind is str:
        yield from (word for word in (*_words(help_text), "other") if word != default)


def _words(text: str) -> list[str]:
    return list(dict.fromkeys(re.findall(r"\w+", text)))[:60]


def _dataclass_with_one_other(kind: Any) -> Iterator[dict[str, Any]]:
    hints = get_type_hints(kind)
    for field in dataclasses.fields(kind):
        for value in other_values(hints[field.name], field.default):
            yield {field.name: value}
