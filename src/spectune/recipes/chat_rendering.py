"""`rendered`: a conversation through a tokenizer's chat template, which is a stranger's program, in bounded time."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from ..errors import OptionError, one_line

# Rendering takes less than a millisecond, and tokenizers read more than a megabyte a second. Chosen, with much room.
SECONDS, LETTERS_A_SECOND = 2.0, 100_000


class OutOfTimeError(Exception):
    """Raised into a template that does not end."""


def rendered(tokenizer: Any, messages: Sequence[Any], **options: Any) -> Any:
    """Get what `apply_chat_template` gives; `OptionError` for a template that fails, is refused, or takes too long.

    jinja's sandbox keeps a template from the disk and from Python, not from looping: a loop in a loop over its largest
    range takes hours. The memory that a template takes is bounded by the time alone.
    """
    try:
        return in_time(tokenizer, messages, **options)
    except OptionError:
        raise
    except Exception as error:  # a template fails with whatever jinja or Python raise
        raise _unusable(one_line(error)) from None


def in_time(tokenizer: Any, messages: Sequence[Any], *, tokenize: bool = True, **options: Any) -> Any:
    """Get the same, with the template's own errors; `OptionError` where it takes too long."""
    letters = sum(len(str(message)) for message in messages)
    seconds = SECONDS + letters / LETTERS_A_SECOND
    options |= {"return_dict": True} if tokenize else {}
    try:
        with _at_most(seconds):
            return tokenizer.apply_chat_template(list(messages), tokenize=tokenize, **options)
    except OutOfTimeError:
        raise _unusable(f"it takes more than {seconds:.0f} seconds for one conversation") from None


def _unusable(why: str) -> OptionError:
    return OptionError(
        f"data: the chat template of this tokenizer cannot be used: {why}. Give a data.chat_template: a .jinja file, "
        f"or plain."
    )


@contextmanager
def _at_most(seconds: float) -> Iterator[None]:
    """Raise `OutOfTimeError` in this thread when the block takes longer; Python's own code only can be stopped so."""
    thread, turn, over = threading.get_ident(), threading.Lock(), False

    def stop() -> None:
        with turn:
            if not over:
                _raise_in(thread, OutOfTimeError)

    timer = threading.Timer(seconds, stop)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        with turn:
            over = True
            _raise_in(thread, None)  # what was on its way and has not arrived


def _raise_in(thread: int, error: type[BaseException] | None) -> None:
    ctypes.pythonapi.PyThreadState_SetAsyncExc(
        ctypes.c_ulong(thread), None if error is None else ctypes.py_object(error)
    )
