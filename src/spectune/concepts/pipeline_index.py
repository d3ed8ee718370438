"""A pipeline's model_index.json may name only classes of diffusers and transformers, not its own code."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from ..checkpoint import CONFIG_LIMIT
from ..checkpoint.reader import read_json
from ..errors import AdapterError

INDEX = "model_index.json"
# diffusers imports whatever library an index names; its own modules hold the safety checkers (stable_diffusion).
LIBRARIES = ("diffusers", "transformers", "stable_diffusion")
# AutoModel and its like take their class from the component's config, which may bring code. Not AutoencoderKL.
CHOOSES_A_CLASS = re.compile(r"Auto[A-Z]")


def refuse_foreign_code(folder: Path) -> None:
    """Raise `AdapterError` for a pipeline folder that would make diffusers import anything but known classes."""
    if not (folder / INDEX).is_file():
        return
    for part, named in read_json(folder / INDEX, CONFIG_LIMIT).items():
        if part == "_class_name":
            if not isinstance(named, str) or (folder / f"{named}.py").exists():
                raise _refused(folder, part, named)
        elif isinstance(named, list) and not part.startswith("_"):
            _check_component(folder, part, named)
    if (folder / "pipeline.py").exists():
        raise _refused(folder, "pipeline.py", "a file of code")


def _check_component(folder: Path, part: str, named: list[Any]) -> None:
    if named in ([None, None], []):
        return
    library, kind = named if len(named) == 2 else (None, None)
    fits = library in LIBRARIES and isinstance(kind, str) and not CHOOSES_A_CLASS.match(kind)
    if not fits or (folder / part / f"{library}.py").exists():
        raise _refused(folder, part, named)


def _refused(folder: Path, part: str, named: Any) -> AdapterError:
    return AdapterError(
        f"{folder / INDEX}: {part} is {named!r}: this pipeline needs its own code, which spectune never runs. Use a "
        f"pipeline whose parts are classes of diffusers and transformers."
    )
