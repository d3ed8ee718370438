"""YAML in, plain values out: only data, no key twice, numbers as people write them; and `key=value` on top."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from ..errors import OptionError

# A run file is a page of text; more is a mistake or an attack by nested aliases. Chosen.
LARGEST = 2**18


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader that refuses a repeated key, which it would drop, and takes 1e-4 for a number."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    # PyYAML follows YAML 1.1, where a number with an exponent needs a point and a sign: 1e-4 would be a text.
    re.compile(r"^[-+]?(?:\d[\d_]*)(?:\.\d*)?[eE][-+]?\d+$"),
    list("-+0123456789"),
)


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    keys = [loader.construct_object(key, deep=True) for key, _ in node.value]  # type: ignore[no-untyped-call]
    twice = next((key for place, key in enumerate(keys) if key in keys[:place]), None)
    if twice is not None:
        raise yaml.constructor.ConstructorError(None, None, f"the key {twice!r} stands twice", node.start_mark)
    return yaml.SafeLoader.construct_mapping(loader, node, deep=True)


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def read_yaml(path: str | Path, overrides: Iterable[str] = ()) -> dict[str, Any]:
    """Get a YAML file as a dict, with each `a.b=value` of `overrides` put in; `OptionError` for what is no YAML."""
    path = Path(path)
    if not path.is_file():
        raise OptionError(f"{path}: asked for a YAML file, found {'a folder' if path.is_dir() else 'nothing'}.")
    if path.stat().st_size > LARGEST:
        raise OptionError(f"{path}: {path.stat().st_size:,} bytes are no run file, at most {LARGEST:,} are read.")
    read = _parse(path.read_text("utf-8", errors="replace"), str(path))
    if not isinstance(read, dict):
        raise OptionError(f"{path}: asked for keys with values, found {type(read).__name__}. See `spectune init`.")
    for override in overrides:
        _put(read, override)
    return read


def write_yaml(values: dict[str, Any], flow: bool | None = False) -> str:
    """Get the text that `read_yaml` reads back, over lines or, with `flow`, on one."""
    width = 10_000 if flow else 100
    text: str = yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=width, default_flow_style=flow)
    return text


def _parse(text: str, where: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)  # a child of SafeLoader
    except (yaml.YAMLError, RecursionError) as error:
        raise OptionError(f"{where}: this is no YAML: {' '.join(str(error).split())}") from None


def _put(values: dict[str, Any], override: str) -> None:
    name, equals, text = override.partition("=")
    if not equals or not name:
        raise OptionError(f"{override!r}: asked for key=value, as in training.learning_rate=1e-3.")
    *path, last = name.split(".")
    place = values
    for depth, key in enumerate(path):
        inner = place.setdefault(key, {})
        if inner is None:
            inner = place[key] = {}
        if not isinstance(inner, dict):
            raise OptionError(
                f"{override!r}: {'.'.join(path[: depth + 1])} is {inner!r} and holds no keys. Write it in the file."
            )
        place = inner
    place[last] = _parse(text, override) if text else None
