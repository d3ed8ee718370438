"""`Origin`: where a config was read from. A config without one is the user's own."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Origin:
    """Where a config was read, which makes its patterns and its sizes a stranger's.

    Both parts are None where somebody else has read the file (transformers, AutoPeftModel), and in a changed copy of
    a config: its patterns still are a stranger's, but no file backs what it says.
    """

    place: str | None = None
    """The folder or repository whose tensors come with this config."""
    folder: Path | None = None
    """That folder, where it is on this machine, until an injection has been held to it."""


def came_with_a_file(config: Any, origin: Origin) -> None:
    """Note where a config was read, and take from it what a file may not choose: places to read and to write."""
    config.origin = origin
    if config.basis is not None:
        file, config.basis = config.basis, None
        warnings.warn(
            f"adapter_config.json: basis={file[:200]!r} is ignored, since a file may not choose another one to read. "
            f"Give it yourself: SpectralConfig.from_pretrained(…, basis=FILE).",
            stacklevel=2,
        )
    if (named := config.svd_options.cache_dir) is not None:
        config.svd_options.cache_dir = None
        warnings.warn(
            f"adapter_config.json: svd.cache_dir={str(named)[:200]!r} is ignored, since a file may not choose a folder "
            f"to write in. To fill a cache, set svd.cache_dir in your own code.",
            stacklevel=2,
        )
