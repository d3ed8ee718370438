"""An option of a method is written once, in the method; the config, its types and its help follow."""

from __future__ import annotations

import ast
import dataclasses
import pydoc
from pathlib import Path

from peft.config import PeftConfig

from spectune import METHODS, SpectralConfig
from spectune.tuner import method_options
from spectune.tuner.method_options import METHOD_OPTIONS, MethodOptions, option_type


def test_the_types_that_mypy_reads_are_those_of_the_methods() -> None:
    tree = ast.parse(Path(method_options.__file__).read_text())
    read = next(node for node in ast.walk(tree) if isinstance(node, ast.ClassDef) and node.name == "MethodOptions")
    written = {n.target.id: ast.unparse(n.annotation) for n in read.body if isinstance(n, ast.AnnAssign)}  # type: ignore
    for name in METHOD_OPTIONS:
        made = option_type(name)
        assert name in written, f"tuner/method_options.py needs the line `{name}: {made} = None`"
        assert eval(written[name]) == made, f"{name} is {made}, written as {written[name]}"
    assert list(written) == list(METHOD_OPTIONS)


def test_no_option_of_a_method_hides_a_field_of_every_config() -> None:
    own = {field.name for field in dataclasses.fields(SpectralConfig)} - set(METHOD_OPTIONS)
    assert not set(SpectralConfig.__annotations__) & set(METHOD_OPTIONS)
    assert own >= {field.name for field in dataclasses.fields(PeftConfig)}


def test_help_shows_what_each_method_says_of_each_option() -> None:
    shown = pydoc.plain(pydoc.render_doc(SpectralConfig))
    for method in METHODS.values():
        for option in dataclasses.fields(method):
            assert option.metadata["help"] in shown, (method.name, option.name)
            made = next(field for field in dataclasses.fields(MethodOptions) if field.name == option.name)
            assert f"{method.name} ({option.default!r})" in made.metadata["help"]
    foreign = {field.name for field in dataclasses.fields(PeftConfig)}
    for field in dataclasses.fields(SpectralConfig):
        assert field.name in foreign or field.metadata["help"] in shown, field.name
