"""The vLLM plugin: a Spectune folder is served as the exact LoRA that it is, written when its name is first asked for.

vLLM calls `register` in each of its processes. SPECTUNE_VLLM_ADAPTERS names the folder that holds the adapters; a
request then names one of them as its model. For `--lora-modules`, write the LoRA before:
`--lora-modules NAME=$(python -m spectune.plugins.vllm BASE FOLDER)`.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import os
import sys
from pathlib import Path
from typing import Any

from ..checkpoint import TENSOR_FILE, AdapterFolder, fresh_folder, read_adapter_folder, save_tensors
from ..errors import ExportError, OptionError, OutputError, SpectuneError
from ..export import export_lora
from ..export.readers import FACTORS, VLLM, refusals, vllm_rank

ADAPTERS, DROP = "SPECTUNE_VLLM_ADAPTERS", "SPECTUNE_VLLM_DROP"
log = logging.getLogger("vllm.plugins.spectune")  # below vLLM's own, so that its settings count


def served(adapter: str | Path, base: str) -> Path:
    """Get the LoRA folder of a saved adapter: from the cache, or written there in one step, with its proof.

    The cache is the user's own (spectune/served in it); a folder in it is named after the bytes of the adapter and the
    base's name. `ExportError` for what vLLM refuses.
    """
    folder = read_adapter_folder(adapter).require("SPECTUNE")
    digest = hashlib.sha256(base.encode())
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        digest.update((folder.path / name).read_bytes())
    goal = cache_folder() / digest.hexdigest()[:32]
    if not goal.exists():
        try:
            export_lora(adapter, goal, base_model=base)
        except OutputError:
            if not goal.exists():  # or else another process was faster
                raise
    lora = read_adapter_folder(goal)
    if any(not name.endswith(FACTORS) for name in lora.names) and os.environ.get(DROP) == "1":
        lora = bare(lora, goal.with_name(f"{goal.name}-bare"))
        log.warning("%s: modules that were trained in full are left out, so answers differ from training", adapter)
    if why := refusals(lora).get(VLLM):
        raise ExportError(
            f"{adapter}: vLLM refuses this adapter: {why}. Merge it (spectune export … --to merged), or set "
            f"{DROP}=1 to leave out what was trained in full."
        )
    method, r = (folder.config.get(name) for name in ("method", "r"))
    needed = vllm_rank(lora.config["r"])
    log.info("%s: %s with r=%s is a LoRA of rank %s: --max-lora-rank %s", adapter, method, r, lora.config["r"], needed)
    return lora.path


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


def named(adapters: Path, name: str) -> Path | None:
    """Get the Spectune folder of this name, directly in the folder of adapters; None if there is none."""
    place = adapters / name
    if Path(name).name != name or name in (".", "..") or not (place / "adapter_config.json").is_file():
        return None
    try:
        return place if read_adapter_folder(place).peft_type == "SPECTUNE" else None
    except SpectuneError as error:
        log.warning("%s", error)
        return None


def register() -> None:
    """Enter the resolver into vLLM's table, if SPECTUNE_VLLM_ADAPTERS is set: `OptionError` if that is not a folder."""
    if not (said := os.environ.get(ADAPTERS)):
        return
    adapters = Path(said).expanduser()
    if not adapters.is_dir():
        raise OptionError(f"{ADAPTERS}={said}: is not a folder. Name the folder that holds the adapters.")
    from vllm.lora.request import LoRARequest
    from vllm.lora.resolver import LoRAResolver, LoRAResolverRegistry

    class SpectuneResolver(LoRAResolver):  # type: ignore[misc, unused-ignore]
        """Finds the adapter of a request's name, and hands vLLM its LoRA."""

        async def resolve_lora(self, base_model_name: str, lora_name: str) -> Any:
            """Get the request for a Spectune adapter; None for other names, and for one that vLLM cannot serve."""
            if (place := named(adapters, lora_name)) is None:
                return None
            try:
                lora = await asyncio.to_thread(served, place, base_model_name)
            except SpectuneError as error:
                log.error("%s", error)
                return None
            number = int(lora.name[:7], 16) + 1  # another one for other numbers, as vLLM keeps LoRAs by it
            return LoRARequest(lora_name=lora_name, lora_int_id=number, lora_path=str(lora))

    LoRAResolverRegistry.register_resolver("spectune", SpectuneResolver())


if __name__ == "__main__":
    if len(sys.argv) != 3:
        raise SystemExit("python -m spectune.plugins.vllm BASE FOLDER: prints the folder of the LoRA.")
    try:
        print(served(sys.argv[2], sys.argv[1]))
    except SpectuneError as failure:
        raise SystemExit(f"error: {failure}") from None
