"""The transformers class of a checkpoint, built without memory: its modules and names, none of its weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import ExportError, one_line
from .adapter_folder import CONFIG_LIMIT
from .config_limits import refuse_absurd_size
from .reader import read_json


def class_named(folder: Path) -> Any:
    """Get the transformers class that a folder's config.json names first, or None; never code from the folder."""
    import transformers

    if not (folder / "config.json").exists():
        return None
    config = read_json(folder / "config.json", CONFIG_LIMIT)
    refuse_absurd_size(folder / "config.json", config)
    named = config.get("architectures")
    kind = getattr(transformers, str(named[0]), None) if isinstance(named, list) and named else None
    return kind if isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel) else None


def without_memory(kind: Any, folder: Path, options: Mapping[str, Any] | None = None) -> Any:
    """Get a model of this class by the config in a folder, on the meta device; `options` go over the config's.

    `ExportError` where the class cannot be built from it.
    """
    import torch

    try:
        config = kind.config_class.from_pretrained(folder, **(options or {}))
        with torch.device("meta"):
            return kind(config)
    except Exception as error:  # transformers' classes do not check their configs, and raise whatever comes of it
        raise ExportError(
            f"{folder}: cannot build a {kind.__name__} from config.json: {one_line(error)}. Check the config."
        ) from error
