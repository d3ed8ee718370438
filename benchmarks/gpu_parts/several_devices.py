"""Part j: a training step on several GPUs under DDP and FSDP2, one process a device, beside one device alone.

Run by torchrun, this file is the part's process on one device: it prints a line of JSON if it is the first.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import distributed, nn

ROUNDS = 5  # chosen
ENGINES = ("DDP", "FSDP2")
METHODS = ("LoRA", "spectral_a", "svft, r directions")
LIMIT = 300.0
"""Seconds until a launch that hangs is given up; chosen."""


def run(setting: Any, notebook: Any) -> None:
    from .notebook import NotHere

    count = torch.cuda.device_count() if setting.on_cuda else 2
    shape = "tiny" if setting.tiny else "8B"
    names = [f"{shape}, {engine}: {method}" for engine in ENGINES for method in METHODS]
    if setting.tiny:  # launches take seconds each; one shows that they work
        names = [f"{shape}, FSDP2: spectral_a"]
    if count < 2:
        raise NotHere("not run: needs two GPUs")
    notebook.note("processes", count)
    notebook.plan(names)
    for name in names:
        engine, method = name.partition(", ")[2].split(": ")
        notebook.row(name, partial(beside_one, setting, shape, engine, method, count))


def beside_one(setting: Any, shape: str, engine: str, method: str, count: int) -> dict[str, Any]:
    """Get the step of all devices, and the ratio of their tokens a second to those of one device alone."""
    alone = launched(setting, shape, engine, method, 1)
    together = launched(setting, shape, engine, method, count)
    speedup = count * alone["milliseconds"] / together["milliseconds"]
    return together | {"alone_milliseconds": alone["milliseconds"], "speedup": round(speedup, 2)}


def launched(setting: Any, shape: str, engine: str, method: str, count: int) -> dict[str, Any]:
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count), str(Path(__file__))]
    words += [setting.device, str(int(setting.tiny)), shape, engine, method]
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, timeout=LIMIT)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        raise RuntimeError(f"torchrun ended with {done.returncode}: {done.stderr.strip()[-2000:]}")
    found: dict[str, Any] = json.loads(lines[-1])
    return found


def spread_over(model: nn.Module, engine: str, device: torch.device) -> nn.Module:
    """Get the model under an engine."""
    if engine == "DDP":
        names = [name for name, _ in model.named_buffers()]  # bases: equal everywhere, never sent
        nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, names)
        return nn.parallel.DistributedDataParallel(model, device_ids=[device.index] if device.type == "cuda" else None)
    from torch.distributed.fsdp import fully_shard

    from spectune.adapter import bases_as_parameters

    bases_as_parameters(model)
    for layer in (module for module in model.modules() if type(module).__name__ == "LlamaDecoderLayer"):
        fully_shard(layer)
    fully_shard(model)
    return model


def one_process(kind: str, tiny: bool, shape: str, engine: str, method: str) -> None:
    """Be one of torchrun's processes: measure steps, say what the first one saw."""
    from gpu_parts.llama import adapted, adapters, llama, loss_of, tokens
    from gpu_parts.notebook import Setting
    from gpu_parts.timing import milliseconds

    rank = int(os.environ["LOCAL_RANK"])
    device = torch.device(f"cuda:{rank}" if kind.startswith("cuda") else kind)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    setting = Setting(str(device), tiny, LIMIT)
    model = spread_over(adapted(llama(shape, setting), adapters(4 if tiny else 16)[method]), engine, device)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, weight_decay=0.0)
    ids = tokens(64 if tiny else 2048, 32 if tiny else 2048, setting)

    def step() -> None:
        loss_of(model, ids).backward()
        optimizer.step()
        optimizer.zero_grad()

    step()  # allocates
    times = [milliseconds(setting, step) for _ in range(ROUNDS)]
    peak = round(torch.cuda.max_memory_allocated() / 2**20, 1) if device.type == "cuda" else None
    if rank == 0:
        found = {"milliseconds": round(statistics.median(times), 3), "rounds": ROUNDS, "peak_mib": peak}
        print(json.dumps(found | {"processes": distributed.get_world_size()}), flush=True)
    distributed.barrier()
    os._exit(0)  # gloo, taken down after DDP's reducer, may wait for a thread that waits for Python (torch 2.13)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    one_process(sys.argv[1], sys.argv[2] == "1", *sys.argv[3:])
