"""`fill`: a page from its template, in the frame and look that all pages share.

`frame.html.j2` is the frame (which forbids the page to load or run anything), `house.css` the look; each page's own
template fills the frame's blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..errors import MissingExtraError, printable

ROOM = Path(__file__).parent
# Line ends, and characters that scripts and typography need inside words: no-break spaces, joiners.
LAYOUT = "\n\t\u00a0\u202f\u2009\u200c\u200d"


def fill(template: str, filters: Mapping[str, Callable[..., Any]] | None = None, **parts: Any) -> str:
    """Get the page as text; everything not `safe` in its template is escaped, and invisible letters are shown.

    `MissingExtraError` without jinja2.
    """
    try:
        import jinja2
    except ImportError:
        raise MissingExtraError(
            f"report: writing the page {template.removesuffix('.html.j2')} needs jinja2. Run: pip install "
            f"'spectune[report]'"
        ) from None
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(ROOM),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= dict(filters or {})
    # Escapes letters that reverse text or control a terminal that shows the source; layout stays.
    return printable(environment.get_template(template).render(**parts), keep=LAYOUT)
