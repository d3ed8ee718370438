"""What the commands print on: everything that they say goes through here, so that no name in a file steers a terminal.

Letters that cannot be seen are shown as escapes, and rich's [markup], :emoji: and links are words like any others.
"""

from __future__ import annotations

from typing import Any

import rich.console
from rich.text import Text

from ..errors import printable

# What a text of several lines may hold; spaces that keep words together are harmless.
LAYOUT = "\n\t\u00a0"


class Console(rich.console.Console):
    """rich's console for words from anywhere."""

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        """Get words as rich draws them, in titles, cells and lines alike."""
        return super().render_str(printable(text, LAYOUT), **options)


def say(words: object = "", end: str = "\n") -> None:
    """Print words on stdout without rich, which would break long lines."""
    print(printable(words, LAYOUT), end=end)
