"""`fill`: a page out of its template, in the one frame and look that all pages share.

`frame.html.j2` is the frame (it forbids the page to load or run anything), `house.css` the look; each page's own
template fills the frame's blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..errors import MissingExtraError, printable

ROOM = Path(__file__).parent
# Line ends, and what scripts and typography need inside of words: no-break spaces, joiners.
LAYOUT = "\n\t\u00a0\u202f\u2009\u200c\u200d"


def fill(template: str, filters: Mapping[str, Callable[..., Any]] | None = None, **parts: Any) -> str:
    """Get the page as text; what its template does not call `safe` is escaped, and unseen letters are shown.

    `MissingExtraError` without jinja2.
    """
    try:
        import jinja2
    except ImportError:
        raise MissingExtraError(
            f"report: {template.removesuffix('.html.j2')} was to be written as a page, jinja2 is not installed. "
            f"Run pip install 'spectune[report]'."
        ) from None
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(ROOM),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= dict(filters or {})
    # Escapes the letters that turn a page around or steer the terminal that shows its source; layout stays.
    return printable(environment.get_template(template).render(**parts), keep=LAYOUT)
