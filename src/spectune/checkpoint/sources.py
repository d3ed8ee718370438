"""`refuse_to_replace`: never overwrite what is being read."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from ..errors import OutputError


def refuse_to_replace(output: str | Path, *sources: str | Path) -> None:
    """Raise `OutputError` if the output is one of the sources or contains one.

    Links, `..` and other spellings of a path are resolved. Sources that are not on this disk, such as names of
    repositories, are safe.
    """
    for source in sources:
        with suppress(OSError, ValueError):  # no such path, or an impossible name
            place = Path(os.path.realpath(source))
            if any(os.path.samefile(output, part) for part in (place, *place.parents)) and os.path.exists(place):
                break
    else:
        return
    raise OutputError(f"{os.path.realpath(output)}: the output would replace {place}, a source. Choose another folder.")
