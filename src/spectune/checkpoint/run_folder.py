"""A run's folder in place of what it trained: `adapter_in` and `model_in`."""

from __future__ import annotations

import os
from pathlib import Path

from ..errors import AdapterError

# By any of these a folder is a model or an adapter itself, whatever else somebody put into it.
OWN_FILES = ("config.json", "adapter_config.json")
# A run's configuration, and the folder that holds what it trained: one of the two.
RUN_FILE = "run.yaml"
ADAPTER, MODEL = "adapter", "model"


def trained_in(path: str | Path) -> Path:
    """Get the folder `adapter/` or `model/` of a finished run; any other path as it is."""
    path = Path(path)
    if not os.path.isfile(path / RUN_FILE) or any(os.path.exists(path / name) for name in OWN_FILES):
        return path
    for name in (ADAPTER, MODEL):
        if os.path.isdir(path / name):
            return path / name
    raise AdapterError(
        f"{path}: the run is not finished, there is neither {ADAPTER}/ nor {MODEL}/ in it. Continue it with --resume."
    )


def adapter_in(path: str | Path) -> Path:
    """Get the adapter's folder of a run; any other path as it is."""
    found = trained_in(path)
    if found != Path(path) and found.name == MODEL:
        raise AdapterError(
            f"{path}: asked for an adapter, but this run trained the whole model (adapter: none). "
            f"Make an adapter of it: spectune extract BASE {path} -o FOLDER"
        )
    return found


def model_in(path: str | Path) -> Path:
    """Get the model's folder of a run that trained the whole model; any other path as it is."""
    found = trained_in(path)
    if found != Path(path) and found.name == ADAPTER:
        raise AdapterError(
            f"{path}: asked for a model, but this run trained an adapter. Pass the base, or merge the run first: "
            f"spectune export {path} --to merged -o FOLDER"
        )
    return found
