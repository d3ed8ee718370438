"""Throughput of batches whose rows use different adapters: `AdapterBank` against PEFT's mixed-batch LoRA.

    python benchmarks/bank.py [--rounds 11] [--residents 10000]

all-MiniLM-L6-v2, 64 rows a batch, r = 8 on every linear layer; 1, 8 or 64 different adapters in the batch, rows of 1
token (as in decoding) and of 16. All take turns; figures are quartiles of the rounds' ratios. `added_of_lora` is what
PEFT's LoRA adds to the time of the base, in multiples of what this adds. Writes benchmarks/results/bank.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from provenance import provenance
from rounds import spread
from step import clock
from step_cases import MODELS, R

from spectune import AdapterBank, SpectralConfig
from spectune.adapter import spectral_modules

RESULTS = Path(__file__).parent / "results" / "bank.json"
ROWS, ROW_LENGTHS, DIFFERENT = 64, (1, 16), (1, 8, 64)
METHODS: dict[str, dict[str, Any]] = {
    "spectral_r": {"method": "spectral_r", "r": R},
    "svft": {"method": "svft", "basis_rank": R},
}
MINILM = MODELS["minilm"]


def names(different: int) -> list[str]:
    return [f"adapter{row % different}" for row in range(ROWS)]


def inputs(length: int) -> dict[str, torch.Tensor]:
    return {"input_ids": torch.randint(5, 500, (ROWS, length), generator=torch.Generator().manual_seed(0))}


def lora_model() -> Any:
    config = LoraConfig(r=R, target_modules=list(MINILM.targets), init_lora_weights=False)
    model = get_peft_model(MINILM.build(torch.float32), config, adapter_name="adapter0")
    for place in range(1, max(DIFFERENT)):
        model.add_adapter(f"adapter{place}", config)
    return model.eval()


def spectral_model(options: dict[str, Any]) -> Any:
    return get_peft_model(MINILM.build(torch.float32), SpectralConfig(target_modules=list(MINILM.targets), **options))


def filled_bank(model: Any, residents: int, basis: str = "default") -> AdapterBank:
    bank = AdapterBank(model, basis)
    with torch.no_grad():
        like = {path: torch.zeros_like(layer.cores[0]) for path, layer in bank._layers.items()}
        for place in range(residents):
            bank.put(f"adapter{place}", {path: 0.01 * torch.randn_like(core) for path, core in like.items()})
    return bank


def live_model(options: dict[str, Any]) -> Any:
    """The same adapters as ordinary ones of PEFT: grouped without a bank."""
    config = SpectralConfig(target_modules=list(MINILM.targets), **options)
    model = get_peft_model(MINILM.build(torch.float32), config, adapter_name="adapter0")
    for place in range(1, max(DIFFERENT)):
        model.add_adapter(f"adapter{place}", config)
    for _, _, module in spectral_modules(model):
        for parameter in module.parameters():
            parameter.data += 0.01 * torch.randn_like(parameter)
    return model.eval()


def measure(runs: dict[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds + 1):
        for name, run in runs.items():
            started = clock()
            run()
            if number:
                seconds[name].append(clock() - started)
    return seconds


def loading(model: Any, bank: AdapterBank) -> dict[str, float]:
    """Get milliseconds to load a saved adapter into a full bank, to replace it, and to unload it."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        times: dict[str, float] = {}
        jobs = (
            ("load", lambda: bank.load("new", folder)),
            ("replace", lambda: bank.load("new", folder)),
            ("unload", lambda: bank.unload("new")),
        )
        for what, job in jobs:
            started = time.perf_counter()
            job()
            times[what] = round(1000 * (time.perf_counter() - started), 2)
        return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--residents", type=int, default=10_000)
    given = parser.parse_args()
    lora, live = lora_model(), live_model(METHODS["spectral_r"])
    models = {name: spectral_model(options).eval() for name, options in METHODS.items()}
    banks = {name: filled_bank(model, given.residents) for name, model in models.items()}
    base = MINILM.build(torch.float32).eval()
    found = []
    for length in ROW_LENGTHS:
        batch = inputs(length)
        runs: dict[str, Callable[[], None]] = {"base": lambda batch=batch: base(**batch)}
        for different in DIFFERENT:
            asked = names(different)
            for name, bank in banks.items():

                def serve(bank=bank, model=models[name], asked=asked, batch=batch) -> None:
                    with bank(asked):
                        model(**batch)

                runs[f"{name} bank, {different}"] = serve
            runs[f"spectral_r live, {different}"] = lambda a=asked, b=batch: live(**b, adapter_names=a)
            runs[f"LoRA of PEFT, {different}"] = lambda a=asked, b=batch: lora(**b, adapter_names=a)
        with torch.no_grad():
            seconds = measure(runs, given.rounds)
        for name, times in seconds.items():
            kind, _, different = name.rpartition(", ")
            row = {"tokens_a_row": length, "what": kind or name, "different": int(different) if kind else 0}
            row["rows_per_second"] = round(ROWS / statistics.median(times), 1)
            row["to_base"] = spread(seconds["base"], times)
            if kind:
                row["to_one_adapter"] = spread(seconds[f"{kind}, 1"], times)
                lora_times = seconds[f"LoRA of PEFT, {different}"]
                row["to_lora"] = spread(lora_times, times)
                bare = statistics.median(seconds["base"])
                mine, theirs = (statistics.median(t) - bare for t in (times, lora_times))
                row["added_of_lora"] = round(theirs / mine, 1) if mine > 0 else None
            found.append(row)
            print(row, flush=True)
    sizes = {name: sum(layer.cores.nbytes for layer in bank._layers.values()) for name, bank in banks.items()}
    times = {name: loading(models[name], bank) for name, bank in banks.items()}
    print(sizes, times)
    record = {**provenance(), "threads": torch.get_num_threads(), "rows": ROWS, "residents": given.residents}
    record |= {"core_bytes": sizes, "milliseconds": times, "throughput": found}
    RESULTS.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
