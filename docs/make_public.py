"""Write docs/reference/public.json: everything that a release promises to keep, one line for each thing.

    python docs/make_public.py

A test fails where the committed list is not what this writes. What the promise is: docs/what-stays.md.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Iterator
from dataclasses import MISSING, Field, fields
from importlib import import_module
from pathlib import Path
from typing import Any

import typer.main
from peft import PeftConfig
from pydantic import BaseModel

import spectune
from spectune import errors
from spectune.checkpoint.task_file import KINDS
from spectune.cli.app import app
from spectune.fusion import FUSIONS
from spectune.methods import METHODS, build_method
from spectune.recipes.table import RECIPES, recipe_class
from spectune.runs import RunResult
from spectune.sweeps import SweepConfig, SweepRecord
from spectune.tuner import SVDOptions

ROOT = Path(__file__).parents[1]
FILE = ROOT / "docs" / "reference" / "public.json"
Entries = dict[str, str]


def pages() -> Iterator[str]:
    """Yield the text of every page that a person wrote."""
    for page in (ROOT / "README.md", *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/**/*.md")):
        if page.parent.name != "reference":
            yield page.read_text(encoding="utf-8")


def documented() -> dict[str, Any]:
    """Get the objects besides `spectune.__all__` that the pages import or name by their full path."""
    names = set()
    for text in pages():
        for room, imported in re.findall(r"from (spectune\.[\w.]+) import ([\w, ]+)", text):
            names |= {f"{room}.{name.strip()}" for name in imported.split(",")}
        names |= set(re.findall(r"spectune\.[a-z_.]+\.[A-Za-z_]+", text))
    found = {}
    for path in sorted(names):
        room, _, name = path.rpartition(".")
        try:
            thing = getattr(import_module(room), name)
        except (ImportError, AttributeError):
            continue
        if not inspect.ismodule(thing):
            found[path] = thing
    return found


def signature(thing: Any) -> str:
    """Get the parameters of a function, with the types and defaults as in its source."""
    found = inspect.signature(thing)
    parts, kinds = [], [one.kind for one in found.parameters.values()]
    for place, one in enumerate(found.parameters.values()):
        if one.kind is one.KEYWORD_ONLY and not {one.KEYWORD_ONLY, one.VAR_POSITIONAL} & set(kinds[:place]):
            parts.append("*")
        stars = {one.VAR_POSITIONAL: "*", one.VAR_KEYWORD: "**"}.get(one.kind, "")
        kind = "" if one.annotation is one.empty else f": {one.annotation}"
        default = "" if one.default is one.empty else f" = {one.default!r}"
        parts.append(f"{stars}{one.name}{kind}{default}".replace("= <factory>", "= …"))
    return f"({', '.join(parts)}) -> {found.return_annotation}"


def class_entries(path: str, thing: type) -> Entries:
    """Get a class with its methods and properties; inherited ones only from our own classes."""
    plain = issubclass(thing, (BaseModel, PeftConfig, Exception))
    found = {path: "class" if plain else f"class{signature(thing)}"}
    for base in (base for base in thing.__mro__ if base.__module__.startswith("spectune")):
        for name, member in vars(base).items():
            member = getattr(member, "__func__", member)
            if name.startswith("_") or f"{path}.{name}" in found:
                continue
            if isinstance(member, property):
                found[f"{path}.{name}"] = f"property -> {inspect.signature(member.fget).return_annotation}"
            elif inspect.isfunction(member):
                found[f"{path}.{name}"] = signature(member)
    return found


def python_entries(path: str, thing: Any) -> Entries:
    """Get an object; of a class also its methods, of a function also the class of what it returns."""
    if not callable(thing):
        return {path: type(thing).__name__}
    if inspect.isclass(thing):
        return class_entries(path, thing)
    returned = vars(import_module(thing.__module__)).get(inspect.signature(thing).return_annotation)
    if not inspect.isclass(returned) or not returned.__module__.startswith("spectune."):
        return {path: signature(thing)}
    room = ".".join(returned.__module__.split(".")[:2])
    return {path: signature(thing), **class_entries(f"{room}.{returned.__name__}", returned)}


def default_of(field: Field[Any]) -> Any:
    return field.default if field.default is not MISSING else field.default_factory()  # type: ignore[misc]


def fields_of(kind: Any, stem: str, foreign: set[str] | frozenset[str] = frozenset()) -> Entries:
    """Get `type = default` of every field of a dataclass."""
    return {
        f"{stem}{one.name}": f"{one.type} = {default_of(one)!r}"
        for one in fields(kind)
        if one.name not in foreign and one.compare and not isinstance(default_of(one), SVDOptions)
    }


def python() -> Entries:
    """Get the names of `spectune`, and those that the pages document."""
    found: Entries = {}
    root = {f"spectune.{name}": getattr(spectune, name) for name in spectune.__all__ if name != "__version__"}
    for path, thing in {**root, **documented()}.items():
        found |= python_entries(path, thing)
    foreign = {one.name for one in fields(PeftConfig)}
    found |= fields_of(spectune.SpectralConfig, "spectune.SpectralConfig(…).", foreign)
    found |= fields_of(SVDOptions, "spectune.SpectralConfig(svd={…}).")
    for name, thing in vars(errors).items():
        if inspect.isclass(thing) and issubclass(thing, errors.SpectuneError):
            found[f"spectune.errors.{name}"] = "class of " + ", ".join(base.__name__ for base in thing.__bases__)
    return found


def kind_of(schema: dict[str, Any], known: dict[str, Any]) -> str:
    """Get the type of a value of a JSON schema in words."""
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return name if "properties" in known[name] else kind_of(known[name], known)
    if "anyOf" in schema:
        return " | ".join(dict.fromkeys(kind_of(one, known) for one in schema["anyOf"]))
    if "enum" in schema or "const" in schema:
        return " | ".join(repr(value) for value in schema.get("enum", [schema.get("const")]))
    if schema.get("type") == "array" and "items" in schema:
        return f"array of {kind_of(schema['items'], known)}"
    if schema.get("type") == "object" and isinstance(schema.get("additionalProperties"), dict):
        return f"object of {kind_of(schema['additionalProperties'], known)}"
    return str(schema.get("type", "anything"))


def schema_entries(model: type[BaseModel], stem: str) -> Entries:
    """Get `type = default` for each key of a pydantic model, sections within sections by their own names."""
    whole = model.model_json_schema()
    known, found = whole.get("$defs", {}), {}

    def walk(schema: dict[str, Any], place: str) -> None:
        for name, value in schema.get("properties", {}).items():
            kind = kind_of(value, known)
            default = f" = {value['default']!r}" if "default" in value else ""
            found[place + name] = f"{kind}, required" if name in schema.get("required", ()) else kind + default
            section = next((word for word in re.split(r" \| | of ", kind) if "properties" in known.get(word, {})), "")
            if section:
                walk(known[section], f"{place}{name}.")

    walk(whole, stem)
    return found


def run_keys() -> Entries:
    """Get the keys of every recipe's YAML, of a sweep's, and the options of every method."""
    found: Entries = {}
    for name in RECIPES:
        found |= schema_entries(recipe_class(name).Config, f"{name}: ")
    found |= schema_entries(SweepConfig, "sweep: ")
    for name, method in METHODS.items():
        found |= fields_of(method, f"adapter: {{method: {name}}}: ")
    return {**found, **{f"rule of fusion: {name}": "spectune fuse --rule, fuse(rule=…)" for name in FUSIONS}}


def commands() -> Entries:
    """Get every verb with its arguments and options."""
    program: Any = typer.main.get_command(app)
    found: Entries = {}
    for verb, command in sorted(program.commands.items()):
        found[f"spectune {verb}"] = "command"
        for one in command.params:
            is_argument = one.param_type_name == "argument"
            name = one.name.upper() if is_argument else "/".join(one.opts + one.secondary_opts)
            kind = "flag" if getattr(one, "is_flag", False) else "values" if one.nargs == -1 else "value"
            default = "" if one.default in (None, ()) or callable(one.default) else f" = {one.default}"
            found[f"spectune {verb} {name}"] = f"{kind}{', required' if one.required else default}"
    return found


def files() -> Entries:
    """Get the keys of every file that is read again, and the tensors of every method."""
    found = {f"adapter_config.json: {name}": "" for name in _config_keys()}
    for name in METHODS:
        shapes = build_method(name, {}).trained_shapes(8, 12)
        found |= {f"adapter_model.safetensors, {name}: LAYER.spectune_adapter.{tensor}": "" for tensor in shapes}
    found |= {f"task.json: {name}": "" for name in KINDS}
    found |= schema_entries(RunResult, "result.json: ")
    record = schema_entries(SweepRecord, "records/RUN.json: ")
    return found | {name: kind for name, kind in record.items() if ": result." not in name}


def _config_keys() -> list[str]:
    foreign = {one.name for one in fields(PeftConfig)} - {"peft_type"}
    return [name for name in spectune.SpectralConfig().to_dict() if name not in foreign]


def environment() -> Entries:
    """Get the environment variables that the code reads."""
    sources = (path.read_text(encoding="utf-8") for path in (ROOT / "src").rglob("*.py"))
    return {name: "" for name in sorted({name for text in sources for name in re.findall(r"SPECTUNE_[A-Z_]+", text)})}


def public() -> dict[str, Entries]:
    """Get all entries: heading -> thing -> what is promised of it."""
    parts = {"python": python, "yaml": run_keys, "commands": commands, "files": files, "environment": environment}
    return {name: dict(sorted(part().items())) for name, part in parts.items()}


def main() -> None:
    FILE.write_text(json.dumps(public(), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(FILE)


if __name__ == "__main__":
    main()
