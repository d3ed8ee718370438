"""`MethodOptions`: the fields of `SpectralConfig` that belong to single methods, made out of the table of methods."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, make_dataclass
from typing import TYPE_CHECKING, Any, get_args, get_origin, get_type_hints

from ..methods import METHODS

METHOD_OPTIONS = tuple(dict.fromkeys(option for method in METHODS.values() for option in method.options()))
"""Every option of any method, in the order of the table."""


def option_type(name: str) -> Any:
    """Get what the config may hold for an option: what its methods take, JSON's list for a tuple, None for default."""
    found: Any = None
    for method in METHODS.values():
        if name in method.options():
            hint = get_type_hints(method)[name]
            found = hint if found is None else found | hint
    for part in get_args(found):
        if get_origin(part) is tuple:
            found |= list.__class_getitem__(get_args(part)[0])
    return found | None


def option_text(name: str) -> str:
    """Get what the methods say of an option, and the default of each."""
    said: dict[str, list[str]] = {}
    for method in METHODS.values():
        for own in fields(method):
            if own.name == name:
                said.setdefault(own.metadata["help"], []).append(f"{method.name} ({own.default!r})")
    return " ".join(f"{', '.join(methods)}: {text}" for text, methods in said.items())


if TYPE_CHECKING:
    # What mypy and editors see, line for line what is made below; tests/tuner/test_method_options.py holds it.
    @dataclass
    class MethodOptions:
        r: int | None = None
        columns: str | int | tuple[int, ...] | list[int] | None = None
        train_singular_values: bool | None = None
        share: str | None = None
        basis_rank: int | None = None
        pattern: str | None = None
        core: tuple[int, ...] | list[int] | None = None
        off_diagonals: int | None = None
        places: int | None = None
        pattern_seed: int | None = None
        full_basis: bool | None = None
        gate: bool | None = None
        shared_core: bool | None = None
        weight_dropout: float | None = None
        side: str | None = None
        output_width: int | None = None
        input_width: int | None = None
        basis_seed: int | None = None
        concept: int | None = None
else:
    MethodOptions = make_dataclass(
        "MethodOptions",
        [
            (name, option_type(name), field(default=None, metadata={"help": option_text(name)}))
            for name in METHOD_OPTIONS
        ],
        namespace={"__module__": __name__, "__doc__": "The options of single methods; None is the method's default."},
    )
