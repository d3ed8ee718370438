"""Regular expressions that a file brings along: matched in bounded time."""

from __future__ import annotations

# `re` cannot be told to stop, and "(a|aa)+b" against sixty letters a takes it years. transformers needs `regex` too.
import regex

from ..errors import AdapterError

# Patterns of real files are module paths or short expressions. Chosen, not measured.
LONGEST = 1_000
# A match takes microseconds; what takes this long was made to. Chosen.
SECONDS = 0.5


def names_layer(pattern: str, layer: str) -> bool:
    """Ask whether a pattern of PEFT's rank_pattern or alpha_pattern names a layer, or the end of its path.

    `AdapterError` for what is no pattern, is longer than 1,000 letters, or takes more than half a second.
    """
    if not isinstance(pattern, str) or len(pattern) > LONGEST:
        raise AdapterError(f"{layer}: the config has {pattern!r} for a pattern of layer names. Repair the config.")
    try:
        return regex.match(rf"(.*\.)?({pattern})$", layer, timeout=SECONDS) is not None
    except TimeoutError:
        why = f"it takes more than {SECONDS} seconds to match"
    except (regex.error, RecursionError, OverflowError, MemoryError, ValueError) as error:
        why = f"{error}"
    raise AdapterError(f"{layer}: the config has {pattern!r}, which is no usable pattern: {why}. Repair the config.")
