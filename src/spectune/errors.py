"""The root error of the library; each child is also the standard error that it replaces.

A message has four parts: where, what was asked, what is there, what to do.
"""

from __future__ import annotations

from .other_words import ADVICE, in_our_words

# A message is read by a person, and names in it may come from a file that somebody else made. Chosen.
LONGEST_MESSAGE = 2_000
# Of what another package says of its reasons. Chosen.
LONGEST_REASON = 300
# Near misses are looked for among so many names, of so many letters: comparing takes time that grows with the product.
# 4,000 hostile names take two seconds. Measured.
MOST_COMPARED, LONGEST_COMPARED = 4_000, 120


class SpectuneError(Exception):
    """Root of everything that Spectune raises on purpose; its message is one printable line of bounded length."""

    def __str__(self) -> str:
        words = super().__str__()
        if len(words) > LONGEST_MESSAGE:
            half = LONGEST_MESSAGE // 2
            words = f"{words[:half]} […] {words[-half:]}"
        return printable(words)


class OptionError(SpectuneError, ValueError):
    """An option that does not exist, has a wrong value, or is not used by the chosen method."""


class UnknownOptionError(OptionError, TypeError):
    """A keyword that no field answers to; a TypeError too, as Python's own."""


class WeightError(SpectuneError, ValueError):
    """A weight that cannot be decomposed as requested: shape, rank, dtype, NaN or infinity."""


class LeftOutError(WeightError):
    """A layer with nothing to train, or no output to add to; attaching leaves it out while others remain."""

    def __init__(self, message: str, why: str = "") -> None:
        super().__init__(message)
        self.why = why
        """The reason in a few words, without the layer's name."""


class AdapterError(SpectuneError, ValueError):
    """An adapter that does not fit: another base, a foreign or damaged file, a newer format."""


class ExportError(SpectuneError, ValueError):
    """An export that would not be exact, or whose proof failed."""


class DataError(SpectuneError, ValueError):
    """A data set that is missing or not in the form that the recipe reads."""


class DivergedError(SpectuneError, ArithmeticError):
    """A run whose loss or numbers became NaN or infinite; its last good checkpoint is what is left of it."""


class OutputError(SpectuneError, OSError):
    """An output folder that cannot be written without losing something."""


class MissingExtraError(SpectuneError, ImportError):
    """An optional dependency that is not installed; the message names the extra."""


def nearest(asked: object, known: list[str] | tuple[str, ...]) -> str:
    """Get the end of an error message that lists what exists: what other tools call so, or the near misses, first."""
    import difflib

    asked = str(asked)[:LONGEST_COMPARED]  # a config may hold anything where a word belongs
    compared = [name for name in known[:MOST_COMPARED] if len(name) <= LONGEST_COMPARED]
    close = in_our_words(asked, known)[:3] or difflib.get_close_matches(asked, compared, n=3, cutoff=0.5)
    if close:
        return "Did you mean " + " or ".join(repr(name) for name in close) + "?"
    shown = ", ".join(name[:LONGEST_COMPARED] for name in sorted(known)[:12])
    return f"Choose from: {shown}{', …' if len(known) > 12 else ''}." if known else "There are none."


def unknown_option(asked: object, known: list[str] | tuple[str, ...]) -> str:
    """Get the end of an error message for an option that does not exist: why there is none, or what exists."""
    return ADVICE.get(str(asked)) or nearest(asked, known)


def printable(words: object, keep: str = "") -> str:
    """Get words in which every letter can be seen: control and direction-changing letters as their escapes.

    What a file says is shown through this everywhere, so that it steers no terminal and turns no page around; `keep`
    names letters that stay, such as line ends where there may be several lines.
    """
    text = str(words)
    return text if text.isprintable() else "".join(_shown(letter, keep) for letter in text)


def one_line(error: BaseException, most: int = LONGEST_REASON) -> str:
    """Get what another package's error says, or its kind, as one printable line without its full stop."""
    words = printable(" ".join(str(error).split())).rstrip(".:") or type(error).__name__
    return words if len(words) <= most else f"{words[:most]} […]"


def _shown(letter: str, keep: str) -> str:
    if letter.isprintable() or letter in keep:
        return letter
    return letter.encode("unicode_escape").decode()
