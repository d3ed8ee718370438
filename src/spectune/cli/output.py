"""`--overwrite` of the verbs that write an adapter or a model: what it may replace."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..errors import OutputError

Overwrite = Annotated[
    bool,
    typer.Option(
        "--overwrite", help="Replace the adapter or model in the output folder, once the new one is complete."
    ),
]
CONFIGS = ("adapter_config.json", "config.json", "adapter.gguf", "model.gguf")
# What adapters and models are made of, tokenizers and their vocabularies with them.
ENDINGS = {".safetensors", ".json", ".md", ".jinja", ".model", ".txt", ".gitattributes", ".gguf", "Modelfile"}


def may_replace(output: Path, overwrite: bool) -> bool:
    """Get `overwrite`; `OutputError` if it would delete a folder that holds more than an adapter or a model."""
    if overwrite and output.is_symlink():
        raise OutputError(f"{output}: this is a link, and nothing is deleted through links. Pass what it points to.")
    if not overwrite or not output.is_dir() or not any(output.iterdir()):
        return overwrite
    if not any((output / name).is_file() for name in CONFIGS):
        raise OutputError(
            f"{output}: no adapter_config.json, config.json or GGUF file is in it, so --overwrite keeps it. Choose "
            "another folder."
        )
    for path in sorted(output.iterdir()):
        known = path.is_file() and not path.is_symlink() and (path.suffix or path.name) in ENDINGS
        if not known and ".partial-" not in path.name:
            raise OutputError(
                f"{output}: {path.name} in it is not part of an adapter or a model, so --overwrite does not delete it. "
                f"Move it, or choose another folder."
            )
    return True
