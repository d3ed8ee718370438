"""Write docs/reference and README's table of methods from the code.

    python docs/make_reference.py

A test fails where the committed pages are not what this writes.
"""

from __future__ import annotations

import math
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import typer.main
from peft import PeftConfig

import spectune
from spectune.cli.app import app
from spectune.cli.verbs import VERBS
from spectune.methods import METHODS
from spectune.recipes.table import RECIPES, recipe_class

FOLDER = Path(__file__).parent / "reference"
README = Path(__file__).parents[1] / "README.md"
# The width of the weight in the table of methods: that of the attention in models of 7 and 8 billion numbers.
WIDTH = 4096
NOTE = "<!-- Written by docs/make_reference.py from the code. -->\n"


def kind_of(schema: dict[str, Any], known: dict[str, Any]) -> str:
    """Get the type of a value in words."""
    if "$ref" in schema:
        return kind_of(known[schema["$ref"].rpartition("/")[2]], known)
    if "anyOf" in schema:
        return " or ".join(dict.fromkeys(kind_of(one, known) for one in schema["anyOf"]))
    if "enum" in schema or "const" in schema:
        return ", ".join(f"`{value}`" for value in schema.get("enum", [schema.get("const")]))
    if schema.get("type") == "array":
        return f"list of {kind_of(schema.get('items', {}), known)}"
    words = {"integer": "whole number", "string": "text", "boolean": "true or false", "object": "keys and values"}
    return words.get(schema.get("type", "anything"), schema.get("type", "anything"))


def cell(words: str) -> str:
    return " ".join(words.split()).replace("|", "\\|")


def section_rows(schema: dict[str, Any], known: dict[str, Any], stem: str = "") -> list[str]:
    """Get a row for each key of a section, and of the sections in it."""
    rows = []
    for name, value in schema.get("properties", {}).items():
        inner = [one for one in (value, *value.get("anyOf", ()), *value.get("allOf", ())) if "$ref" in one]
        section = next((known[one["$ref"].rpartition("/")[2]] for one in inner), {})
        default = (
            "required"
            if name in schema.get("required", ())
            else f"`{value.get('default', [] if value.get('type') == 'array' else None)}`"
        )
        if "properties" in section:
            rows += section_rows(section, known, f"{stem}{name}.")
        else:
            meaning = cell(value.get("description", ""))
            rows.append(f"| `{stem}{name}` | {cell(kind_of(value, known))} | {default} | {meaning} |")
    return rows


def run_keys() -> str:
    """Get the page of the keys of every recipe and of every method."""
    text = [NOTE, "# Keys of a run", ""]
    text += [
        "`spectune init RECIPE` prints the same as a commented file. On the command line: `training.epochs=2`.",
        "",
    ]
    for name in RECIPES:
        kind = recipe_class(name)
        schema = kind.Config.model_json_schema()
        text += [f"## {name}", "", f"{kind.title}.", "", "| key | value | default | meaning |", "|---|---|---|---|"]
        text += [*section_rows(schema, schema.get("$defs", {})), ""]
    text += ["## The adapter", ""]
    text += [
        "`adapter:` takes `method` and the options of `SpectralConfig` ([Python](python.md)), or `peft_type` and the"
    ]
    text += ["options of that PEFT config. The options of each method:", ""]
    text += ["| method | option | default | meaning |", "|---|---|---|---|"]
    for name, method in METHODS.items():
        for option in fields(method):
            text += [f"| `{name}` | `{option.name}` | `{option.default}` | {cell(option.metadata['help'])} |"]
    return "\n".join([*text, ""])


def commands() -> str:
    """Get the page of the command line."""
    program: Any = typer.main.get_command(app)
    text = [NOTE, "# Command line", ""]
    for group in dict.fromkeys(group for group, _ in VERBS.values()):
        text += [f"## {group}", ""]
        for verb in (name for name, (of, _) in VERBS.items() if of == group):
            command = program.commands[verb]
            text += [f"### spectune {verb}", "", command.help, "", "```console", f"$ {VERBS[verb][1]}", "```", ""]
            text += ["| argument or option | meaning | default |", "|---|---|---|"]
            for parameter in command.params:
                names = parameter.opts + parameter.secondary_opts
                shown = parameter.name.upper() if parameter.param_type_name == "argument" else ", ".join(names)
                default = "" if parameter.default in (None, ()) or callable(parameter.default) else parameter.default
                meaning = cell(getattr(parameter, "help", "") or "")
                text.append(f"| `{shown}` | {meaning} | {f'`{default}`' if default != '' else ''} |")
            text.append("")
    return "\n".join(text)


def python_names() -> str:
    """Get the page of the public names; mkdocstrings puts their docstrings in."""
    homes = {name: home for name, home in spectune._HOME.items() if name not in ("METHODS",)}
    parts = [f"## {name}\n\n::: spectune.{home}.{name}\n" for name, home in homes.items()]
    foreign = {field.name for field in fields(PeftConfig)}
    parts += [
        "## Fields of SpectralConfig\n",
        "Besides those of every PEFT config.\n",
        "| field | meaning |",
        "|---|---|",
    ]
    for field in fields(spectune.SpectralConfig):
        if field.name not in foreign:
            parts.append(f"| `{field.name}` | {cell(field.metadata['help'])} |")
    return "\n".join([NOTE, "# Python\n", *parts, ""])


def methods() -> str:
    """Get the rows of README's table: what each method trains, when to use it, its size and the rank of its LoRA."""
    lines = [
        f"| `method=` | what it does | use it when | numbers in a {WIDTH} × {WIDTH} weight | exact LoRA rank | paper |",
        "| --- | --- | --- | ---: | ---: | --- |",
    ]
    for name, kind in METHODS.items():
        method = kind().fitted(WIDTH, WIDTH)
        shapes = [*method.trained_shapes(WIDTH, WIDTH).values(), *method.shared_shapes(WIDTH, WIDTH).values()]
        count, rank = sum(math.prod(shape) for shape in shapes), method.exact_rank(WIDTH, WIDTH)
        does = cell((kind.__doc__ or "").splitlines()[0]).rstrip(".")
        number = re.search(r"arXiv (\S+)$", kind.paper)
        paper = f"[{number[1]}](https://arxiv.org/abs/{number[1]})" if number else cell(kind.paper)
        lines.append(f"| `{name}` | {does} | {kind.use_when} | {count:,} | {rank:,} | {paper} |")
    return "\n".join(lines)


def readme() -> str:
    """Get README with the table as it should be."""
    start, end = "<!-- methods -->", "<!-- /methods -->"
    head, _, rest = README.read_text(encoding="utf-8").partition(start)
    return f"{head}{start}\n\n{methods()}\n\n{end}{rest.partition(end)[2]}"


PAGES = {"run-keys.md": run_keys, "commands.md": commands, "python.md": python_names}


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    for name, page in PAGES.items():
        (FOLDER / name).write_text(page(), encoding="utf-8")
        print(FOLDER / name)
    README.write_text(readme(), encoding="utf-8")


if __name__ == "__main__":
    main()
