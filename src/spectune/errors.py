"""The root error of the library; each child is also the standard error that it replaces.

A message has four parts: where, what was asked, what is there, what to do.
"""

from __future__ import annotations

# A message is read by a person, and names in it may come from a file that somebody else made. Chosen.
LONGEST_MESSAGE = 2_000
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
        return words if words.isprintable() else "".join(_printable(letter) for letter in words)


class OptionError(SpectuneError, ValueError):
    """An option that does not exist, has a wrong value, or is not used by the chosen method."""


class UnknownOptionError(OptionError, TypeError):
    """A keyword that no field answers to; a TypeError too, as Python's own."""


class WeightError(SpectuneError, ValueError):
    """A weight that cannot be decomposed as requested: shape, rank, dtype, NaN or infinity."""


class AdapterError(SpectuneError, ValueError):
    """An adapter that does not fit: another base, a foreign or damaged file, a newer format."""


class ExportError(SpectuneError, ValueError):
    """An export that would not be exact, or whose proof failed."""


class DataError(SpectuneError, ValueError):
    """A data set that is missing or not in the form that the recipe reads."""


class OutputError(SpectuneError, OSError):
    """An output folder that cannot be written without losing something."""


class MissingExtraError(SpectuneError, ImportError):
    """An optional dependency that is not installed; the message names the extra."""


def nearest(asked: str, known: list[str] | tuple[str, ...]) -> str:
    """Get the end of an error message that lists what exists, the near misses first."""
    import difflib

    compared = [name for name in known[:MOST_COMPARED] if len(name) <= LONGEST_COMPARED]
    close = difflib.get_close_matches(asked[:LONGEST_COMPARED], compared, n=3, cutoff=0.5)
    if close:
        return "Did you mean " + " or ".join(repr(name) for name in close) + "?"
    shown = ", ".join(name[:LONGEST_COMPARED] for name in sorted(known)[:12])
    return f"Choose from: {shown}{', …' if len(known) > 12 else ''}." if known else "There are none."


def _printable(letter: str) -> str:
    """Get a letter, or its escape: a name from a file must not steer the terminal that shows it."""
    return letter if letter.isprintable() else letter.encode("unicode_escape").decode()
