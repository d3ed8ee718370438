"""A run's folder in place of what it trained: `adapter_in` and `model_in`."""

from __future__ import annotations

import os
from pathlib import Path

from ..errors import AdapterError

# With any of these, a folder is itself a model or an adapter, whatever else it contains.
OWN_FILES = ("config.json", "adapter_config.json")
# A run's configuration, and the folder of what it trained: one of the two.
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
        f"{path}: the run is not finished: it has neither {ADAPTER}/ nor {MODEL}/. Continue it with --resume."
    )


def adapter_in(path: str | Path) -> Path:
    """Get a run's adapter folder; any other path as it is."""
    return _in_run(
        path,
        ADAPTER,
        f"an adapter is needed, but this run trained the whole model (adapter: none). Extract one: spectune "
        f"extract BASE {path} -o FOLDER",
    )


def model_in(path: str | Path) -> Path:
    """Get the model folder of a run that trained the whole model; any other path as it is."""
    return _in_run(
        path,
        MODEL,
        f"a model is needed, but this run trained an adapter. Pass the base, or merge the run first: spectune export "
        f"{path} --to merged -o FOLDER",
    )


def _in_run(path: str | Path, wanted: str, otherwise: str) -> Path:
    found = trained_in(path)
    if found != Path(path) and found.name != wanted:
        raise AdapterError(f"{path}: {otherwise}")
    return found
