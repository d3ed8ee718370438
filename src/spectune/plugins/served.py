"""A Spectune folder -> the exact LoRA that a server reads, written once to the user's cache."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from pathlib import Path

from filelock import FileLock

from ..checkpoint import TENSOR_FILE, AdapterFolder, fresh_folder, read_adapter_folder, save_tensors
from ..errors import ExportError, SpectuneError
from ..export import export_lora
from ..export.readers import FACTORS, refusals


def served(adapter: str | Path, base: str | None, reader: str, log: logging.Logger, drop: str) -> AdapterFolder:
    """Get the LoRA of a saved adapter: from the cache, or written there in one step, with its proof.

    The base is the one that the adapter names if none is given. The cache is the user's own (spectune/served in it); a
    folder in it is named after the bytes of the adapter and the base's name, and one process writes it.
    `ExportError` for what the reader refuses; the variable `drop` set to 1 leaves out what was trained in full.
    """
    folder = read_adapter_folder(adapter).require("SPECTUNE")
    digest = hashlib.sha256((base or "").encode())
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        digest.update((folder.path / name).read_bytes())
    goal = cache_folder() / digest.hexdigest()[:32]
    with FileLock(f"{goal}.lock"):  # each process of a server asks, and an export loads the base
        if not goal.exists():
            export_lora(adapter, goal, base_model=base)
        lora = read_adapter_folder(goal)
        if any(not name.endswith(FACTORS) for name in lora.names) and os.environ.get(drop) == "1":
            lora = bare(lora, goal.with_name(f"{goal.name}-bare"))
            log.warning("%s: modules that were trained in full are left out, so answers differ from training", adapter)
    if why := refusals(lora).get(reader):
        raise ExportError(
            f"{adapter}: {reader} refuses this adapter: {why}. Merge it (spectune export … --to merged), or set "
            f"{drop}=1 to leave out what was trained in full."
        )
    return lora


def bare(lora: AdapterFolder, goal: Path) -> AdapterFolder:
    """Get a copy of a LoRA with its factors alone; the one that is there counts."""
    if not goal.exists():
        config = {**lora.config, "modules_to_save": None, "trainable_token_indices": None, "task_type": "CAUSAL_LM"}
        with fresh_folder(goal) as partial:
            save_tensors(partial / TENSOR_FILE, {n: lora.tensor(n) for n in lora.names if n.endswith(FACTORS)})
            (partial / "adapter_config.json").write_text(json.dumps(config, indent=2))
    return read_adapter_folder(goal)


def cache_folder() -> Path:
    """Get where the LoRAs are kept: spectune/served in the user's cache folder, readable by the user alone."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "spectune" / "served"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    return folder


def is_spectune(place: Path, log: logging.Logger) -> bool:
    """Ask whether a place is the folder of a Spectune adapter; one that cannot be read is not, and is logged."""
    if not (place / "adapter_config.json").is_file():
        return False
    try:
        return read_adapter_folder(place).peft_type == "SPECTUNE"
    except SpectuneError as error:
        log.warning("%s", error)
        return False
