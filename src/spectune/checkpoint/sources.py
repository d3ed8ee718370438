"""What is read must outlive what is written: `refuse_to_replace`."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from ..errors import OutputError


def refuse_to_replace(output: str | Path, *sources: str | Path) -> None:
    """Raise `OutputError` where the output is one of the sources or holds it: replacing would delete what is read.

    Links, `..` and other spellings of one place are seen through. A source that is not on this disk, such as the name
    of a repository, cannot be lost.
    """
    for source in sources:
        with suppress(OSError, ValueError):  # no such place, or a name that no disk can hold
            place = Path(os.path.realpath(source))
            if any(os.path.samefile(output, part) for part in (place, *place.parents)) and os.path.exists(place):
                break
    else:
        return
    raise OutputError(f"{os.path.realpath(output)}: the output would replace {place}, a source. Choose another folder.")
