"""`commented_yaml`: a recipe's example run with all its options, their meanings and defaults."""

from __future__ import annotations

import json
from typing import Any

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from ..training.config import Section
from ..training.yaml_file import write_yaml
from .table import recipe_class

WIDTH = 40


def commented_yaml(recipe: str) -> str:
    """Get a YAML file for a recipe: the example's settings, and all others commented out with their defaults."""
    kind = recipe_class(recipe)
    head = f"# {kind.title}: {kind.__doc__ or ''}".rstrip()
    lines = _section(kind.Config, {"recipe": recipe} | kind.example, "")
    return "\n".join([head, *lines]) + "\n"


def _section(kind: type[BaseModel], values: dict[str, Any], indent: str) -> list[str]:
    lines = []
    for name, field in kind.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, Section):
            # A key with nothing under it would be null, so a section without set values is commented out.
            mark = "" if values.get(name) else "# "
            lines += [f"{indent}{mark}{name}:", *_section(inner, values.get(name, {}), indent + "  ")]
            continue
        comment = f"  # {field.description}" if field.description else ""
        if name in values:
            lines.append(f"{indent}{f'{name}: {_flow(values[name])}':<{WIDTH}}{comment}".rstrip())
        else:
            default = field.get_default(call_default_factory=True)
            default = None if default is PydanticUndefined else default
            lines.append(f"{indent}{f'# {name}: {_flow(default)}':<{WIDTH}}{comment}".rstrip())
    return lines


def _flow(value: Any) -> str:
    if isinstance(value, str) and "\n" in value:
        return json.dumps(value, ensure_ascii=False)  # JSON is YAML, on one line
    if isinstance(value, (dict, list)):
        return write_yaml({"x": value}, flow=True).removeprefix("{x: ").rstrip("\n").removesuffix("}")
    return write_yaml({"x": value}).removeprefix("x: ").rstrip("\n")
