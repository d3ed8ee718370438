"""`commented_yaml`: a recipe's example run with every option that it has, each with its meaning and default."""

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
    """Get the text of a YAML file for a recipe: what is set stands plain, what may be set stands behind a '#'."""
    kind = recipe_class(recipe)
    head = f"# {kind.title}: {kind.__doc__ or ''}".rstrip()
    lines = _section(kind.Config, {"recipe": recipe} | kind.example, "")
    return "\n".join([head, *lines]) + "\n"


def _section(kind: type[BaseModel], values: dict[str, Any], indent: str) -> list[str]:
    lines = []
    for name, field in kind.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, Section):
            # A key with nothing under it would be null, so that a section without a set value is commented out whole.
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
        return json.dumps(value, ensure_ascii=False)  # YAML reads JSON, and on one line
    if isinstance(value, (dict, list)):
        return write_yaml({"x": value}, flow=True).removeprefix("{x: ").rstrip("\n").removesuffix("}")
    return write_yaml({"x": value}).removeprefix("x: ").rstrip("\n")
