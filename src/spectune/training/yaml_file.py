"""Read and write YAML: only data, no duplicate keys, numbers as people write them; with `key=value` overrides."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from ..errors import OptionError, one_line

# A run file is a page of text; more is a mistake or an attack by nested aliases. Chosen.
LARGEST = 2**18


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, but a duplicate key is an error and 1e-4 is a number."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    # PyYAML follows YAML 1.1, where a number with an exponent needs a point and a sign: 1e-4 would be a string.
    re.compile(r"^[-+]?(?:\d[\d_]*)(?:\.\d*)?[eE][-+]?\d+$"),
    list("-+0123456789"),
)


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[Any] = set()
    for key_node, _ in node.value:
        key = loader.construct_object(key_node, deep=True)  # type: ignore[no-untyped-call]
        if key in seen:
            raise yaml.constructor.ConstructorError(None, None, f"duplicate key {key!r}", node.start_mark)
        seen.add(key)
    return yaml.SafeLoader.construct_mapping(loader, node, deep=True)


def _no_alias(loader: Any, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
    """Compose a node unless it is an alias: a few nested aliases would fill any memory."""
    if loader.check_event(yaml.events.AliasEvent):
        raise yaml.composer.ComposerError(None, None, "aliases (*name) are not allowed", loader.peek_event().start_mark)
    return yaml.SafeLoader.compose_node(loader, parent, index)


_Loader.compose_node = _no_alias  # type: ignore[assignment]
_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def read_yaml(path: str | Path, overrides: Iterable[str] = ()) -> dict[str, Any]:
    """Get a YAML file as a dict, with each `a.b=value` of `overrides` put in; `OptionError` if it is not YAML."""
    path = Path(path)
    if not path.is_file():
        why = "this is a folder" if path.is_dir() else "there is no such file"
        raise OptionError(f"{path}: a YAML file is needed, but {why}. Check the path.")
    if path.stat().st_size > LARGEST:
        raise OptionError(
            f"{path}: {path.stat().st_size:,} bytes are too many for a run file (limit {LARGEST:,}). Check the path."
        )
    read = _parse(path.read_text("utf-8", errors="replace"), str(path))
    if not isinstance(read, dict):
        raise OptionError(
            f"{path}: keys with values are needed, but this is a {type(read).__name__}. See `spectune init`."
        )
    for override in overrides:
        put(read, override)
    return read


def write_yaml(values: dict[str, Any], flow: bool | None = False) -> str:
    """Get YAML text that `read_yaml` reads back; with `flow`, on one line."""
    width = 10_000 if flow else 100
    text: str = yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=width, default_flow_style=flow)
    return text


def _parse(text: str, where: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)  # a child of SafeLoader
    # Tags such as !!int and dates such as 2001-99-99 make PyYAML raise any of Python's errors.
    except (yaml.YAMLError, RecursionError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise OptionError(f"{where}: this is not YAML: {one_line(error)}.") from None


def put(values: dict[str, Any], override: str) -> None:
    """Put one `a.b=value` into nested values, in place; `OptionError` for another form."""
    name, equals, text = override.partition("=")
    if not equals or not name:
        raise OptionError(f"{override!r}: must be key=value, such as training.learning_rate=1e-3.")
    *path, last = name.split(".")
    place = values
    for depth, key in enumerate(path):
        inner = place.setdefault(key, {})
        if inner is None:
            inner = place[key] = {}
        if not isinstance(inner, dict):
            raise OptionError(
                f"{override!r}: {'.'.join(path[: depth + 1])} is {inner!r}, which has no keys. Write it in the file."
            )
        place = inner
    place[last] = _parse(text, override) if text else None
