"""`rendered`: apply a tokenizer's chat template, a stranger's program, in bounded time."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from ..errors import OptionError, one_line

# Rendering takes less than a millisecond; tokenizers read more than a megabyte per second. Chosen far above both.
SECONDS, LETTERS_A_SECOND = 2.0, 100_000


class OutOfTimeError(Exception):
    """Stops a template that does not end."""


def rendered(tokenizer: Any, messages: Sequence[Any], **options: Any) -> Any:
    """Get the result of `apply_chat_template`; `OptionError` for a template that fails, is refused, or is too slow.

    jinja's sandbox protects the disk and Python, but does not stop loops: a loop in a loop over its largest range
    takes hours. Only the time bounds the memory of a template.
    """
    try:
        return in_time(tokenizer, messages, **options)
    except OptionError:
        raise
    except Exception as error:  # a template can raise anything
        raise _unusable(one_line(error)) from None


def in_time(tokenizer: Any, messages: Sequence[Any], *, tokenize: bool = True, **options: Any) -> Any:
    """Get the same, with the template's own errors; `OptionError` if it is too slow."""
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
        f"data: cannot use the chat template of this tokenizer: {why}. Give a data.chat_template: a .jinja file, "
        f"or plain."
    )


@contextmanager
def _at_most(seconds: float) -> Iterator[None]:
    """Raise `OutOfTimeError` in this thread when the block takes longer; this stops only Python code."""
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
            _raise_in(thread, None)  # cancels one that has not arrived yet


def _raise_in(thread: int, error: type[BaseException] | None) -> None:
    ctypes.pythonapi.PyThreadState_SetAsyncExc(
        ctypes.c_ulong(thread), None if error is None else ctypes.py_object(error)
    )
