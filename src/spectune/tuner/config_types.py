"""The types of the values in a configuration, checked before anything uses them."""

from __future__ import annotations

import functools
import inspect
import numbers
import re
from collections.abc import Mapping, Sequence
from dataclasses import fields
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

from peft.config import PeftConfig

from ..adapter.saved import FORMAT_VERSION, refuse_newer
from ..errors import OptionError, UnknownOptionError, WeightError, one_line, unknown_option
from ..methods import Method
from ..spectrum import DataSpectra
from .how_to_load import REQUIRES
from .origin import Origin

# Allowed types in the fields that are used first. JSON has no sets.
NAMES = (str, list, tuple, set, type(None))
PLAIN: dict[str, type] = {
    "int": numbers.Integral, "float": numbers.Real, "bool": bool, "str": str, "None": type(None),
}  # fmt: skip
TYPES: dict[str, tuple[type, ...]] = {
    "method": (str,),
    "singular_decay": (int, float),
    "target_modules": NAMES,
    "exclude_modules": NAMES,
    "target_parameters": (list, tuple, set, type(None)),
    "modules_to_save": (list, tuple, set, type(None)),
    "layers_pattern": NAMES,
    "layers_to_transform": (int, list, tuple, type(None)),
    "rank_pattern": (dict,),
    "save_basis": (str,),
    "grad_norm": (str, type(None)),
    "basis": (str, type(None)),
    "basis_id": (str, type(None)),
    "bias": (str,),
    "spectra": (DataSpectra, type(None)),
    "origin": (Origin, type(None)),
}


def check_types(config: Any) -> None:
    """Raise `OptionError` for a field of the configuration with a value of a wrong type."""
    check_plain_types(config)
    for name, kinds in TYPES.items():
        value: Any = getattr(config, name)
        if not isinstance(value, kinds):
            raise _wrong_type(name, value)
        words: Any = [] if value is None or isinstance(value, (str, int)) else value
        if (kinds is NAMES or name in ("modules_to_save", "target_parameters")) and not all(
            isinstance(word, str) for word in words
        ):
            raise OptionError(f"{name}={value!r}: this list must contain only names. Correct it.")
        if name == "target_modules" and value is not None and not value and not config.target_parameters:
            raise OptionError(
                f"target_modules={value!r}: contains no layer. Name some, or leave it out for the usual ones."
            )
        if isinstance(value, str) and name in ("target_modules", "exclude_modules"):
            _check_pattern(name, value)


def check_plain_types(options: Any, where: str = "") -> None:
    """Check the fields of a dataclass with plain annotations (`int | None`) against these.

    A truth is not a number here.
    """
    for option in fields(options):
        # A union from a source file, or made at run time, which has the same text.
        kinds = [PLAIN.get(word) for word in str(option.type).split(" | ")]
        value = getattr(options, option.name)
        if None in kinds or (isinstance(value, bool) and bool in kinds):
            continue
        if isinstance(value, bool) or not isinstance(value, tuple(kind for kind in kinds if kind is not None)):
            raise _wrong_type(where + option.name, value)


def fits(value: Any, hint: Any) -> bool:
    """Ask whether a plain value, as YAML holds it, is of an annotated type; what is not plain words fits anything.

    A truth is not a number, and a whole number is a fraction too.
    """
    kinds, parts = get_origin(hint), get_args(hint)
    if kinds in (Union, UnionType):
        return any(fits(value, part) for part in parts)
    if kinds is Literal:  # PEFT lists fewer words than it takes (pissa_niter_4)
        return any(type(value) is type(part) for part in parts)
    if kinds in (list, tuple, set, Sequence):
        return isinstance(value, (list, tuple, set)) and all(fits(item, part) for item in value for part in parts[:1])
    if kinds is dict or hint is dict:
        return isinstance(value, dict)
    if hint is type(None) or hint is None:
        return value is None
    plain: dict[Any, Any] = {int: numbers.Integral, float: numbers.Real, str: str, bool: bool, list: (list, tuple)}
    if hint not in plain:
        return True
    return isinstance(value, plain[hint]) and (hint is bool or not isinstance(value, bool))


def _wrong_type(name: str, value: Any) -> OptionError:
    return OptionError(f"{name}={value!r}: cannot be {type(value).__name__}. Correct it.")


def _check_pattern(name: str, words: str) -> None:
    try:
        re.compile(words)
    except (re.error, RecursionError, OverflowError) as error:
        raise OptionError(f"{name}={words!r} is not a regular expression: {one_line(error)}. Correct it.") from None


def check_rank_pattern(method: Method, rank_pattern: Mapping[str, int]) -> None:
    """Raise `OptionError` for ranks of single layers where the method has none, or has one that all weights share."""
    for size in rank_pattern.values():
        method.sized(size)
    r: int = getattr(method, "r", 0)
    if any(other != r for other in rank_pattern.values()) and method.shared_by() == "model":
        raise OptionError(
            f"rank_pattern={dict(rank_pattern)}: all weights share one {r}x{r} core, so none can have another r. Set "
            f"shared_core to False, or leave rank_pattern out."
        )


def check_own_size(method: Method, size: int, rows_O: int, cols_I: int, layer: str) -> None:
    """Raise `WeightError` if rank_pattern gives a layer more directions than its weight has."""
    if method.size_option() == "basis_rank" and size > min(rows_O, cols_I):
        raise WeightError(
            f"{layer}: rank_pattern gives this layer basis_rank={size}, but a {rows_O}x{cols_I} weight has "
            f"{min(rows_O, cols_I)} directions. Lower it."
        )


def with_checked_keywords(config: Any) -> Any:
    """Get a dataclass's __init__ in which a wrong keyword lists its near misses, and a newer file is refused.

    The words "got an unexpected keyword argument" are what PEFT looks for before it drops unknown keys.
    """
    init, known = config.__init__, [f.name for f in fields(config)]

    @functools.wraps(init)
    def checked(self: Any, *args: Any, **kwargs: Any) -> None:
        refuse_newer(kwargs.get("format_version", FORMAT_VERSION))
        for name in REQUIRES:  # a word to people in the file, not an option
            kwargs.pop(name, None)
        for name in kwargs:
            if name not in known:
                raise UnknownOptionError(
                    f"SpectralConfig got an unexpected keyword argument {name!r}. {unknown_option(name, known)}"
                )
        init(self, *args, **kwargs)

    # PEFT names what it drops: all that is not in the signature.
    said = inspect.signature(init)
    words = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None) for name in REQUIRES]
    checked.__signature__ = said.replace(parameters=[*said.parameters.values(), *words])  # type: ignore[attr-defined]
    return checked


def described(config: type) -> str:
    """Get the docstring of a config with a line for each field that PEFT's own configs have not."""
    foreign = {field.name for field in fields(PeftConfig)}
    lines = [f"    {own.name}: {own.metadata['help']}" for own in fields(config) if own.name not in foreign]
    return (
        f"{inspect.cleandoc(config.__doc__ or '')}\n\nFields, and which methods use them (with their defaults):\n"
        + ("\n".join(lines))
    )
