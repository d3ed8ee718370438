"""A training step of every method against the frozen model and PEFT's LoRA: time, memory, as ratios.

    python benchmarks/step.py --suite small                       about five minutes on two quiet cores
    python benchmarks/step.py --suite medium | compile           wider models and bfloat16; torch.compile
    python benchmarks/step.py --suite large                      hours, meant for a GPU
    python benchmarks/step.py --models minilm --tokens 256 --dtypes float32 --name mine [--adapters LoRA spectral_a]

All adapters of a setting stand in memory and take turns, so a slow moment of the machine hits all of them; a figure is
the median over the rounds of a time divided by that of the frozen model (gradients flow to the input of the first
adapted layer, nothing trains) or of LoRA in the same round, with the quartiles. Memory does not depend on the machine
on a CPU: it is the bytes that autograd keeps, beyond parameters and buffers. Writes benchmarks/results/step-SUITE.json.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from provenance import provenance
from rounds import spread
from step_cases import ADAPTERS, FLOOR, LORA, MODELS, adapted, batch
from torch import nn

from spectune.checkpoint import write_atomically

RESULTS = Path(__file__).parent / "results"
PARTS = ("forward", "backward", "optimizer")
PROMISED = [FLOOR, LORA, "DoRA", "spectral_a", "spectral_r", "svft plain, 8 directions", "specadapt, 64 directions"]
FULL_PLAIN = ["svft plain, full basis", "official svft plain, full basis"]
# (models, tokens a step, dtypes, compiled, adapters, rounds)
SUITES: dict[str, list[dict[str, Any]]] = {
    "small": [
        {"models": ["minilm"], "tokens": [256], "rounds": 9},
        {"models": ["minilm"], "tokens": [2048], "rounds": 7},
    ],
    "compile": [
        {"models": ["minilm"], "tokens": [2048], "rounds": 5, "compiled": [True], "adapters": PROMISED},
    ],
    # The methods that are promised to cost no more than LoRA; half an hour on one thread.
    "medium": [
        {"models": ["smollm"], "tokens": [256], "rounds": 5, "adapters": PROMISED},
        {"models": ["stack1024"], "tokens": [256], "rounds": 5, "adapters": [*PROMISED, *FULL_PLAIN]},
        {"models": ["minilm"], "tokens": [2048], "rounds": 5, "dtypes": ["bfloat16"], "adapters": PROMISED},
        {"models": ["stack1024"], "tokens": [2048], "rounds": 5, "adapters": PROMISED},
    ],
    # Hours on two cores; meant for a GPU.
    "large": [
        {
            "models": list(MODELS),
            "tokens": [256, 2048, 8192],
            "dtypes": ["float32", "bfloat16"],
            "compiled": [False, True],
            "rounds": 15,
        },
    ],
}
Runs = dict[str, tuple[Any, torch.optim.Optimizer]]


def clock() -> float:
    """Get the time; with one thread the processor's, which other processes do not move."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


def loss_of(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    hidden: torch.Tensor = model(**inputs).last_hidden_state
    return hidden.float().square().mean()


def step(model: Any, optimizer: torch.optim.Optimizer, inputs: dict[str, torch.Tensor]) -> dict[str, float]:
    """Get the seconds of the parts of one training step."""
    times = [clock()]
    loss = loss_of(model, inputs)
    times.append(clock())
    loss.backward()
    times.append(clock())
    optimizer.step()
    optimizer.zero_grad()
    times.append(clock())
    parts = dict(zip(PARTS, (b - a for a, b in itertools.pairwise(times)), strict=True))
    return {**parts, "step": times[-1] - times[0]}


def kept_bytes(model: nn.Module, inputs: dict[str, torch.Tensor]) -> int:
    """Get the bytes that autograd keeps between forward and backward; on a GPU the allocator's peak of a step."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        loss_of(model, inputs).backward()
        return torch.cuda.max_memory_allocated() - before
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = loss_of(model, inputs)  # alive until here, so that no storage is used twice
    del loss
    return sum(kept.values())


def prepared(setting: dict[str, Any], adapters: list[str], device: str) -> tuple[Runs, dict[str, str]]:
    """Get the adapted models with their optimizers, and why the others are left out."""
    runs: Runs = {}
    left_out: dict[str, str] = {}
    for name in adapters:
        try:
            model = adapted(MODELS[setting["model"]], name, getattr(torch, setting["dtype"])).to(device)
        except (ImportError, ValueError, NotImplementedError) as error:
            left_out[name] = str(error).splitlines()[0]
            continue
        trained = [p for p in model.parameters() if p.requires_grad] or [nn.Parameter(torch.zeros(1))]
        if setting["compiled"]:
            model.compile()
        runs[name] = (model, torch.optim.AdamW(trained, lr=1e-6))
    return runs, left_out


def measure(setting: dict[str, Any], adapters: list[str], rounds: int, device: str) -> dict[str, Any]:
    """Get the row of every adapter for one model, number of tokens, dtype and mode."""
    runs, left_out = prepared(setting, adapters, device)
    inputs = {k: v.to(device) for k, v in batch(MODELS[setting["model"]], setting["tokens"]).items()}
    seconds: dict[str, list[dict[str, float]]] = {name: [] for name in runs}
    for name, (model, optimizer) in list(runs.items()):
        try:
            for _ in range(2):
                step(model, optimizer, inputs)
        except Exception as error:  # a method of another package may fail in a dtype or under compile: say so
            if name in (FLOOR, LORA):
                raise
            left_out[name] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
            del runs[name], seconds[name]
    for _ in range(rounds):
        for name, (model, optimizer) in runs.items():
            seconds[name].append(step(model, optimizer, inputs))
    rows = {}
    for name, (model, _) in runs.items():
        row: dict[str, Any] = {"trained": sum(p.numel() for p in model.parameters() if p.requires_grad)}
        row["kept_bytes"] = None if setting["compiled"] else kept_bytes(model, inputs)
        row["milliseconds"] = round(1000 * statistics.median(one["step"] for one in seconds[name]), 2)
        for base, key in ((FLOOR, "to_frozen"), (LORA, "to_lora")):
            for part in ("step", "forward", "backward"):
                theirs = [one[part] for one in seconds[base]]
                row.setdefault(key, {})[part] = spread([one[part] for one in seconds[name]], theirs)
        row["optimizer_ms"] = round(1000 * statistics.median(one["optimizer"] for one in seconds[name]), 3)
        rows[name] = row
        print(
            f"  {name:34} {row['to_lora']['step'][1]:.3f} of LoRA, {row['to_frozen']['step'][1]:.3f} of frozen",
            flush=True,
        )
    return {**setting, "rounds": rounds, "adapters": rows, "left_out": left_out}


def settings(part: dict[str, Any]) -> list[dict[str, Any]]:
    axes = (part["models"], part["tokens"], part.get("dtypes", ["float32"]), part.get("compiled", [False]))
    return [dict(zip(("model", "tokens", "dtype", "compiled"), one, strict=True)) for one in itertools.product(*axes)]


def run(
    parts: list[dict[str, Any]], name: str, least_rounds: int | None = None, file: Path | None = None
) -> dict[str, Any]:
    """Get the record of a suite; written to `file` after every setting, since a long one may run out of memory."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    found = []
    for part in parts:
        for setting in settings(part):
            print(setting, flush=True)
            names = part.get("adapters") or list(ADAPTERS)
            found.append(measure(setting, names, least_rounds or part["rounds"], device))
            gc.collect()
            record = {"suite": name, **provenance(), "device": device, "threads": torch.get_num_threads()}
            record["settings"] = found
            if file is not None:
                write_atomically(file, json.dumps(record, indent=1) + "\n")
    return record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", choices=list(SUITES), default="small")
    parser.add_argument("--models", nargs="+", choices=list(MODELS))
    parser.add_argument("--tokens", nargs="+", type=int, default=[256])
    parser.add_argument("--dtypes", nargs="+", default=["float32"], choices=["float32", "bfloat16"])
    parser.add_argument("--adapters", nargs="+", choices=list(ADAPTERS), help="frozen and LoRA are always there")
    parser.add_argument("--compiled", action="store_true")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--name", help="writes results/step-NAME.json; default the suite; with --models: nothing")
    given = parser.parse_args()
    parts, name = SUITES[given.suite], given.name or (None if given.models else given.suite)
    if given.models:
        adapters = list(dict.fromkeys([FLOOR, LORA, *(given.adapters or ADAPTERS)]))
        parts = [{"rounds": 9, "adapters": adapters, "compiled": [given.compiled]}]
        parts[0] |= {"models": given.models, "tokens": given.tokens, "dtypes": given.dtypes}
    run(parts, name or "once", given.rounds, RESULTS / f"step-{name}.json" if name else None)


if __name__ == "__main__":
    main()
