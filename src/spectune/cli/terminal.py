"""Everything that the commands print goes through here, so that nothing read from a file can control the terminal.

Invisible characters are shown as escapes, and rich's [markup], :emoji: and links are plain text.
"""

from __future__ import annotations

from typing import Any

import rich.console
from rich.text import Text

from ..errors import printable

# Allowed in a text of several lines; non-breaking spaces are harmless.
LAYOUT = "\n\t\u00a0"


class Console(rich.console.Console):
    """rich's console for words from anywhere."""

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        """Get words as rich draws them, in titles, cells and lines alike."""
        return super().render_str(printable(text, LAYOUT), **options)


def say(words: object = "", end: str = "\n") -> None:
    """Print on stdout without rich, which would break long lines."""
    print(printable(words, LAYOUT), end=end)
