"""`turns_of`: a chat template as the texts around each message, where it is nothing more than that."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..checkpoint.chat_rendering import rendered
from ..errors import OptionError, one_line

ChatMessage = Mapping[str, str]
SYSTEM, USER, ASSISTANT = "system", "user", "assistant"
# Words that no template contains.
MARKS = ("qXw0", "qXw1", "qXw2", "qXw3", "qXw4", "qXw5")


class NoTurnsError(ValueError):
    """A chat template that does more than put texts around messages; says what, in a few words."""


@dataclass(frozen=True)
class Turns:
    """What stands around each message, and before the answer."""

    around: dict[str, tuple[str, str]]
    """Role -> the texts before and after its message; a role that the template refuses is missing."""
    opening: str
    """Once, before everything."""
    asks: str
    """After the last message, before the answer."""
    default_system: str | None = None
    """The system message where a conversation has none."""
    trims: bool = False
    """True if the template cuts off the spaces around messages, which these texts do not."""

    def render(self, messages: Sequence[ChatMessage]) -> str:
        """Get a conversation up to the answer."""
        parts = [self.opening]
        if self.default_system is not None and messages[0]["role"] != SYSTEM:
            messages = [{"role": SYSTEM, "content": self.default_system}, *messages]
        for message in messages:
            before, after = self.around[message["role"]]
            parts += [before, message["content"], after]
        return "".join([*parts, self.asks])


def turns_of(tokenizer: Any) -> Turns:
    """Get the turns of a tokenizer's chat template, found by rendering it, and compared on other conversations.

    `NoTurnsError` for a template that such texts cannot express: one that changes messages, or counts them.
    """
    if getattr(tokenizer, "chat_template", None) is None:
        raise NoTurnsError("the tokenizer has no chat template")
    try:
        turns = _derived(tokenizer)
        for messages in _conversations(SYSTEM in turns.around):
            if turns.render(messages) != _text(tokenizer, messages, True):
                raise NoTurnsError("its chat template does more than put fixed texts around messages")
        spaced = [{"role": USER, "content": " x "}]
        trims = turns.render(spaced) != _text(tokenizer, spaced, True)
    except OptionError as error:
        raise NoTurnsError(f"its chat template cannot be rendered ({one_line(error, 80)})") from error
    return Turns(turns.around, turns.opening, turns.asks, turns.default_system, trims)


def _text(tokenizer: Any, messages: Sequence[ChatMessage], asks: bool = False) -> str:
    return str(rendered(tokenizer, messages, tokenize=False, add_generation_prompt=asks))


def _talk(*roles: str) -> list[ChatMessage]:
    return [{"role": role, "content": mark} for role, mark in zip(roles, MARKS, strict=False)]


def _conversations(system: bool) -> Iterator[list[ChatMessage]]:
    yield _talk(USER)
    yield _talk(USER, ASSISTANT, USER)
    yield _talk(USER, ASSISTANT, USER, ASSISTANT, USER)
    if system:
        yield _talk(SYSTEM, USER)
        yield _talk(SYSTEM, USER, ASSISTANT, USER)


def _derived(tokenizer: Any) -> Turns:
    first, after_user = _cut(_text(tokenizer, _talk(USER)), 1)
    _, between, after_answer = _cut(_text(tokenizer, _talk(USER, ASSISTANT)), 2)
    before_answer = _without(between, start=after_user)
    *_, between, _ = _cut(_text(tokenizer, _talk(USER, ASSISTANT, USER)), 3)
    before_user = _without(between, start=after_answer)
    opening = _without(first, end=before_user)
    asks = _without(_text(tokenizer, _talk(USER), True), start=first + MARKS[0] + after_user)
    around = {USER: (before_user, after_user), ASSISTANT: (before_answer, after_answer)}
    try:
        start, between, _ = _cut(_text(tokenizer, _talk(SYSTEM, USER)), 2)
    except (OptionError, NoTurnsError):  # some templates refuse system messages, some leave them out
        return Turns(around, opening, asks)
    after_system, default = _without(between, end=before_user), None
    if opening and start.startswith(opening):
        start = start.removeprefix(opening)
    elif opening.startswith(start) and opening.endswith(after_system):
        default, opening = opening[len(start) : len(opening) - len(after_system)], ""
    elif opening:
        raise NoTurnsError("its chat template begins otherwise with a system message than without")
    return Turns({**around, SYSTEM: (start, after_system)}, opening, asks, default)


def _cut(text: str, messages: int) -> list[str]:
    """Get the texts around messages, each of which must be there once."""
    if any(text.count(mark) != 1 for mark in MARKS[:messages]):
        raise NoTurnsError("its chat template leaves a message out or repeats one")
    parts = []
    for mark in MARKS[:messages]:
        part, _, text = text.partition(mark)
        parts.append(part)
    return [*parts, text]


def _without(text: str, start: str = "", end: str = "") -> str:
    if not text.startswith(start) or not text.endswith(end):
        raise NoTurnsError("its chat template treats messages differently by their place")
    return text[len(start) : len(text) - len(end)]
