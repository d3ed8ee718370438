"""Rewards that a program can verify: each a section of YAML with its options, and the score of one written text."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cached_property
from typing import Any, Literal, get_args

import regex
from pydantic import Field, model_validator

from ..errors import DataError, MissingExtraError, OptionError, one_line
from ..training.config import Section
from .answers import gsm8k_answer, is_exact, is_gsm8k_right

# A pattern that backtracks without end scores 0 after this time: honest ones take microseconds. Chosen.
SECONDS = 1.0
Count = Callable[[str], int]
"""Text -> its number of tokens."""


class Reward(Section):
    """A rule that scores a written text from 0 to 1."""

    weight: float = Field(1.0, description="Its share of the sum; below zero it is a penalty.")

    def score(self, written: str, answer: str, tokens: Count) -> float:
        """Get the score of a text, given the row's reference answer, and how tokens are counted."""
        raise NotImplementedError

    def check(self, answer: str | None) -> None:
        """Raise `DataError` for a row's reference that this rule cannot use."""

    def ready(self) -> None:
        """Raise what is wrong with the options, before the first step."""


class Gsm8k(Reward):
    """1 where the number after '#### ' is the reference's, by GSM8K's official rule."""

    reward: Literal["gsm8k"]

    def score(self, written: str, answer: str, tokens: Count) -> float:
        return float(is_gsm8k_right(written, answer))

    def check(self, answer: str | None) -> None:
        if gsm8k_answer(_needed(answer, "gsm8k")) is None:
            raise DataError("reward gsm8k needs '#### ' and a number in the answer, but there is none.")


class ExactMatch(Reward):
    """1 where the text is the reference, without white space around it."""

    reward: Literal["exact_match"]
    ignore_case: bool = Field(False, description="Whether A and a are the same.")

    def score(self, written: str, answer: str, tokens: Count) -> float:
        return float(is_exact(*((t.casefold() if self.ignore_case else t) for t in (written, answer))))

    def check(self, answer: str | None) -> None:
        _needed(answer, "exact_match")


class Regex(Reward):
    """1 where a regular expression of Python is found in the text."""

    reward: Literal["regex"]
    pattern: str = Field(description="The expression; write (?i) in front to ignore case.")
    whole: bool = Field(False, description="Whether it must match the whole text, without white space around it.")

    @model_validator(mode="after")
    def _compiles(self) -> Regex:
        try:
            regex.compile(self.pattern)
        except (regex.error, RecursionError, OverflowError) as error:
            raise ValueError(f"pattern {self.pattern!r} is not a regular expression: {error}") from None
        return self

    def score(self, written: str, answer: str, tokens: Count) -> float:
        tried = regex.fullmatch if self.whole else regex.search
        try:
            return float(tried(self.pattern, written.strip() if self.whole else written, timeout=SECONDS) is not None)
        except TimeoutError:
            return 0.0


class JsonSchema(Reward):
    """1 where the text is JSON of this schema, and the reward of valid JSON where it is other JSON."""

    reward: Literal["json_schema"]
    definition: dict[str, Any] = Field(description="The schema, as YAML.")
    valid_json: float = Field(0.0, ge=0, le=1, description="Score of JSON that does not fit the schema.")

    @cached_property
    def _fits(self) -> Callable[[Any], bool]:
        try:
            from jsonschema import SchemaError, validators
            from referencing import Registry
        except ImportError as error:
            raise MissingExtraError(
                f"rewards: json_schema needs jsonschema ({error}). Run: pip install 'spectune[llm]'"
            ) from None
        kind = validators.validator_for(self.definition)
        try:
            kind.check_schema(self.definition)
        except SchemaError as error:
            raise OptionError(f"rewards: definition is not a JSON schema: {one_line(error)}.") from None
        # With an empty registry, so that a "$ref" never reaches the network.
        fits: Callable[[Any], bool] = kind(self.definition, registry=Registry()).is_valid
        return fits

    def ready(self) -> None:
        try:
            self._fits({})
        except (MissingExtraError, OptionError):
            raise
        except Exception as error:  # a reference to another schema
            raise OptionError(f"rewards: definition refers to what it does not contain: {one_line(error)}.") from None

    def score(self, written: str, answer: str, tokens: Count) -> float:
        try:
            found = json.loads(written)
        except (ValueError, RecursionError):
            return 0.0
        return 1.0 if self._fits(found) else self.valid_json


class Length(Reward):
    """1 within the bounds; outside, it falls with the share by which the nearer bound is missed, to 0."""

    reward: Literal["length"]
    unit: Literal["words", "characters", "tokens"] = Field("words", description="What is counted.")
    least: int = Field(0, ge=0, description="The lower bound.")
    most: int | None = Field(None, gt=0, description="The upper bound.")

    @model_validator(mode="after")
    def _bounded(self) -> Length:
        if self.most is None and not self.least:
            raise ValueError("length: give least or most")
        if self.most is not None and self.most < self.least:
            raise ValueError(f"length: most={self.most} is below least={self.least}")
        return self

    def score(self, written: str, answer: str, tokens: Count) -> float:
        count = {"words": lambda t: len(t.split()), "characters": len, "tokens": tokens}[self.unit](written)
        bound = max(count, self.least) if self.most is None else min(max(count, self.least), self.most)
        return max(0.0, 1.0 - abs(count - bound) / max(bound, 1))


class EndsWith(Reward):
    """1 where the text ends in these words, without white space after them."""

    reward: Literal["ends_with"]
    text: str = Field(min_length=1, description="The last words.")
    ignore_case: bool = Field(False, description="Whether A and a are the same.")

    def score(self, written: str, answer: str, tokens: Count) -> float:
        end, wanted = ((t.casefold() if self.ignore_case else t).rstrip() for t in (written, self.text))
        return float(end.endswith(wanted))


def _needed(answer: str | None, name: str) -> str:
    if answer is None:
        raise DataError(f"reward {name} compares with a reference. Give data.answer, a template over the columns.")
    return answer


NAMED: tuple[type[Reward], ...] = (Gsm8k, ExactMatch, Regex, JsonSchema, Length, EndsWith)


def name_of(kind: type[Reward]) -> str:
    """Get the word after `reward:`."""
    return str(get_args(kind.model_fields["reward"].annotation)[0])


def described() -> str:
    """Get every reward with its options and their defaults, for the help of `rewards`."""
    return "; ".join(f"{name_of(kind)} ({', '.join(_options(kind))})".replace(" ()", "") for kind in NAMED)


def _options(kind: type[Reward]) -> list[str]:
    own = {name: field for name, field in kind.model_fields.items() if name not in ("reward", "weight")}
    return [name if field.is_required() else f"{name}: {json.dumps(field.default)}" for name, field in own.items()]
