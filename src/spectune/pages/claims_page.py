"""`write_claims`: published claims and computed figures, as one HTML page that loads nothing and runs nothing."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..checkpoint import write_atomically
from .frame import fill

WORDS = {True: "yes", False: "no", None: "–"}


def write_claims(found: Mapping[str, Any], path: str | Path) -> None:
    """Write `title`, `source`, `rows` (claim, published, found, agrees) and `provenance` as a page.

        `deviations`, sentences, may be given too.

    All or nothing; everything is escaped. `MissingExtraError` without jinja2, `OutputError` if it
        cannot be written.
    """
    provenance = json.dumps(found["provenance"], indent=2)
    said = list(found.get("deviations", ()))
    page = fill("claims.html.j2", found=found, rows=found["rows"], deviations=said, words=WORDS, provenance=provenance)
    write_atomically(path, page)
