"""Regular expressions from a file: matched in bounded time."""

from __future__ import annotations

import math
import re
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

# `re` has no timeout, and needs years for "(a|aa)+b" against sixty letters a. transformers needs `regex` too.
import regex

from ..errors import AdapterError

# Patterns of real files are module paths or short expressions. Chosen, not measured.
LONGEST = 1_000
# A file may list thousands of plain names, which are looked up; true expressions are few. Chosen.
MOST = 1_000
# All matches of an honest config together take milliseconds. Chosen.
SECONDS = 1.0
# regex copies what is repeated, so "((a{1000}){1000}){1000}" would take all memory to compile. Real files count the
# digits of a number, \d{1,3}. Chosen.
MOST_COPIES = 1_000
# Plain names that differ only in dots, dashes and underscores; more than these are matched as expressions. Chosen.
MOST_ALIKE = 16

# PEFT's forms (get_pattern_key, check_target_module_exists), word for word.
END = r"(.*\.)?({})$"
WHOLE = "{}"
INSIDE = r"(^|.*\.){}($|\..*)"
COUNTED = r"(?:^|.*?\.){}\.(?P<idx>\d+)\."

PLAIN = re.compile(r"\^?(?:[A-Za-z0-9_]|\\?[.\-])+")
# One name of an alternation as re.escape writes it, for a whole path or (second group) for its end.
NAME = re.compile(r"(\(\?:\.\*\\\.\)\?)?((?:[A-Za-z0-9_]|\\[.\-])+)")
PARTS = re.compile(r"\\?(.)")
# Escaped letters and classes: signs inside them neither repeat nor choose.
INNARDS = re.compile(r"\\.|\[\^?\]?[^\]]*\]", re.DOTALL)
REPEATED_GROUP = re.compile(r"\)[*+{]")
# This many steps take `re` about two seconds, and this bound is far above the true number. Chosen.
MOST_STEPS, MOST_SIGNS = 10**8, 30
REPEATS = re.compile(r"\{(?:(\d*)(?:,(\d*))?\})?")


class Clock:
    """Time left to compile and match the patterns of one config, and how many more patterns it may have."""

    def __init__(self) -> None:
        self.seconds, self.patterns = SECONDS, MOST


class Expression:
    """One pattern in one of PEFT's forms; compiled when it is first needed, on the clock of its config."""

    def __init__(self, pattern: Any, form: str, clock: Clock) -> None:
        if not isinstance(pattern, str) or len(pattern) > LONGEST:
            raise AdapterError(f"the config has {pattern!r} as a pattern of layer names. Repair the config.")
        clock.patterns -= 1
        if clock.patterns < 0:
            raise AdapterError(f"the config has more than {MOST:,} patterns of layer names. Repair the config.")
        self.pattern, self.form, self.clock = pattern, form, clock
        self._compiled: Any = None

    def match(self, layer: str, whole: bool = False) -> Any:
        """Get regex's match object or None; `AdapterError` for an invalid pattern, or when the time is up."""
        began = time.perf_counter()
        try:
            if self.clock.seconds <= 0:
                raise TimeoutError
            if self._compiled is None:
                self._compiled = self._compile()
            matcher = self._compiled.fullmatch if whole else self._compiled.match
            return matcher(layer, timeout=self.clock.seconds)
        except TimeoutError:
            why = f"the patterns of this config take more than {SECONDS} seconds to match"
        except (re.error, regex.error, RecursionError, OverflowError, MemoryError, ValueError) as error:
            why = f"{error}"
        finally:
            self.clock.seconds -= time.perf_counter() - began
        raise AdapterError(
            f"{layer}: the config has {self.pattern!r}, which is not a usable pattern: {why}. Repair the config."
        )

    def _compile(self) -> Any:
        copies = 1
        for repeat in REPEATS.finditer(self.pattern):
            counts = [int(count[:9]) for count in repeat.groups() if count]
            if not counts:
                raise ValueError("a brace that counts nothing")
            copies *= max(1, *counts)
        if copies > MOST_COPIES:
            raise ValueError(f"its repeats make more than {MOST_COPIES:,} copies")
        words = self.form.format(self.pattern)
        re.compile(words)  # PEFT must be able to read it, too
        return regex.compile(words)


def split_names(pattern: str) -> tuple[str, frozenset[str], frozenset[str]]:
    """Get (what is left of a pattern, whole paths, ends of paths) of an alternation that ends in plain names.

    A list of every layer's path, as exports and fused adapters have it, is long and harmless: it is looked up.
    """
    paths, ends, parts = set[str](), set[str](), pattern.split("|")
    # (?i) and its like change what comes after them, and an escaped | is none.
    flagged = pattern.count("(?") != pattern.count("(?:")
    while parts and not flagged and not (len(parts) > 1 and parts[-2].endswith("\\")):
        name = NAME.fullmatch(parts[-1])
        if name is None:
            break
        (ends if name[1] else paths).add(_unescaped(name[2]))
        parts.pop()
    return "|".join(parts), frozenset(paths), frozenset(ends)


def is_tame(pattern: str, letters: int) -> bool:
    """Ask whether Python's `re`, which cannot be stopped, is sure to match a pattern on such names in a moment.

    If no group is repeated, a name of n letters takes at most n^a 2^b steps: a repeats, b choices (`?` and `|`).
    """
    bare = INNARDS.sub("x", pattern)
    if REPEATED_GROUP.search(bare) or bare.count("(?") != bare.count("(?:"):
        return False
    repeats, choices = (sum(bare.count(sign) for sign in signs) for signs in ("*+{", "?|"))
    return repeats + choices <= MOST_SIGNS and max(letters, 2) ** repeats * 2**choices <= MOST_STEPS


class LayerPatterns:
    """The keys of a rank_pattern or alpha_pattern; finds the first that matches a layer, as PEFT does."""

    def __init__(self, patterns: Iterable[Any], clock: Clock | None = None) -> None:
        clock = clock or Clock()
        self._alike: dict[str, list[tuple[int, str]]] = {}
        self._expressions: list[tuple[int, Expression]] = []
        for place, pattern in enumerate(patterns):
            plain = isinstance(pattern, str) and len(pattern) <= LONGEST and PLAIN.fullmatch(pattern)
            alike = self._alike.setdefault(_folded(_unescaped(pattern)), []) if plain else []
            if plain and len(alike) < MOST_ALIKE:
                alike.append((place, pattern))
            else:
                self._expressions.append((place, Expression(pattern, END, clock)))

    def first(self, layer: str) -> str | None:
        """Get the first pattern that matches a layer or its path's end; `AdapterError` as in `Expression.match`."""
        best, found = math.inf, None
        starts = [0, *(dot.end() for dot in re.finditer(r"\.", layer))]
        for start in starts:
            for place, pattern in self._alike.get(_folded(layer[start:]), ()):
                if place < best and _names(pattern, layer[start:], whole=start == 0):
                    best, found = place, pattern
        for place, expression in self._expressions:
            if place < best and expression.match(layer):
                return expression.pattern
        return found


def rank_pattern(ranks: Mapping[str, int]) -> tuple[int, dict[str, int]]:
    """Get (most common rank, the other ranks by pattern); of equally common ranks the larger is taken.

    A pattern is the last part of the name if all layers with it agree, or else the whole name.
    """
    counts = Counter(ranks.values())
    r = max(counts, key=lambda rank: (counts[rank], rank))
    pattern: dict[str, int] = {}
    for name, rank in sorted(ranks.items()):
        leaf = name.rpartition(".")[2]
        agree = {other for path, other in ranks.items() if path.rpartition(".")[2] == leaf} == {rank}
        if rank != r:
            # PEFT reads a pattern as a regex for the end of a name; ^ and the escape make it this name alone.
            pattern[leaf if agree else f"^{re.escape(name)}"] = rank
    return r, pattern


def _unescaped(pattern: str) -> str:
    return PARTS.sub(r"\1", pattern.removeprefix("^"))


def _folded(name: str) -> str:
    """Get a name with a dot for every separator: an unescaped dot in a pattern may match any of them."""
    return re.sub(r"[^A-Za-z0-9]", ".", name)


def _names(pattern: str, ending: str, whole: bool) -> bool:
    """Ask whether a plain pattern matches this ending, letter by letter; an unescaped dot matches any letter."""
    if pattern.startswith("^") and not whole:
        return False
    parts = zip(PARTS.finditer(pattern.removeprefix("^")), ending, strict=True)
    return all(part[0] in (".", letter, f"\\{letter}") for part, letter in parts)
