"""The vLLM plugin: a Spectune folder is served as the exact LoRA that it is, written when it is first asked for.

vLLM calls `register` in each of its processes. A path leads to a Spectune folder wherever vLLM takes one:
`--lora-modules NAME=FOLDER`, `/v1/load_lora_adapter`, `LoRARequest`. SPECTUNE_VLLM_ADAPTERS names a folder of adapters;
a request then names one of them as its model. `python -m spectune.plugins.vllm BASE FOLDER` writes the LoRA before.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
from functools import wraps
from pathlib import Path
from typing import Any

from _spectune_autoload import after_import

from ..errors import OptionError, SpectuneError
from ..export.readers import VLLM, vllm_rank
from . import served as cached

ADAPTERS, DROP = "SPECTUNE_VLLM_ADAPTERS", "SPECTUNE_VLLM_DROP"
log = logging.getLogger("vllm.plugins.spectune")  # below vLLM's own, so that its settings count


def served(adapter: str | Path, base: str | None) -> Path:
    """Get the LoRA folder of a saved adapter, and say which rank vLLM must allow. `ExportError` for what it refuses."""
    lora = cached.served(adapter, base, VLLM, log, DROP)
    r, needed = lora.config["r"], vllm_rank(lora.config["r"])
    log.info("%s: is a LoRA of rank %s: --max-lora-rank %s", adapter, r, needed)
    return lora.path


def named(adapters: Path, name: str) -> Path | None:
    """Get the Spectune folder of this name, directly in the folder of adapters; None if there is none."""
    place = adapters / name
    if Path(name).name != name or name in (".", "..") or not cached.is_spectune(place, log):
        return None
    return place


def lead_to_loras(utils: Any) -> None:
    """Make vLLM's own function from a LoRA's path to its folder lead from a Spectune folder to the LoRA.

    Resolvers are asked for unknown names only, and paths are read by the workers (vllm/lora/worker_manager.py, 0.33).
    """
    find = getattr(utils, "get_adapter_absolute_path", None)
    if find is None:
        log.warning("this vLLM has no get_adapter_absolute_path: write LoRAs before, spectune export FOLDER -o LORA")
        return

    @wraps(find)
    def found(lora_path: str) -> str:
        place: str = find(lora_path)
        return str(served(place, None)) if cached.is_spectune(Path(place), log) else place

    readers: tuple[Any, ...] = (utils, sys.modules.get("vllm.lora.worker_manager"))
    for module in readers:
        if getattr(module, "get_adapter_absolute_path", None) is find:
            module.get_adapter_absolute_path = found


def register() -> None:
    """Let paths lead to Spectune folders, and enter the resolver into vLLM's table if SPECTUNE_VLLM_ADAPTERS is set.

    `OptionError` if that is not a folder. Nothing of vLLM's layers is imported before vLLM does it.
    """
    after_import("vllm.lora.utils", lead_to_loras)
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
