"""Time of a training step of every method against PEFT's LoRA of the same r, on the demo's model and batch.

    python benchmarks/step.py [--repeats 15]

All models stand in memory and take turns, so a slow moment of the machine hits all of them; a method's figure is the
median over the rounds of its time divided by LoRA's of the same round. Writes benchmarks/results/step.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from provenance import provenance

from spectune import SpectralConfig
from spectune.recipes.demo import TARGETS, base_folder
from spectune.recipes.languages import load_languages
from spectune.recipes.text_classification import Setting, TextClassification, sentence_loss

RESULTS = Path(__file__).parent / "results" / "step.json"
CONFIGS: dict[str, Any] = {
    "LoRA r=8": LoraConfig(r=8, target_modules=TARGETS),
    "DoRA r=8": LoraConfig(r=8, use_dora=True, target_modules=TARGETS),
    "spectral_a r=8": SpectralConfig(target_modules=TARGETS),
    "spectral_r r=8": SpectralConfig(method="spectral_r", target_modules=TARGETS),
    "specadapt r=8, 64 directions": SpectralConfig(method="specadapt", basis_rank=64, target_modules=TARGETS),
    "svft plain, 64 directions": SpectralConfig(method="svft", basis_rank=64, target_modules=TARGETS),
    "svft plain, full basis": SpectralConfig(method="svft", target_modules=TARGETS),
    "svft banded 2, full basis": SpectralConfig(method="svft", pattern="banded", target_modules=TARGETS),
    "svdiff, full basis": SpectralConfig(method="svdiff", target_modules=TARGETS),
}


def step(model: Any, optimizer: torch.optim.Optimizer, batch: dict[str, torch.Tensor]) -> float:
    started = time.perf_counter()
    sentence_loss(model, batch).backward()
    optimizer.step()
    optimizer.zero_grad()
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=15)
    repeats = parser.parse_args().repeats
    task = load_languages()
    recipe = TextClassification(Setting(base_folder(), task.labels, 1, 0))
    rows = recipe.tokens(task.train.texts[:32])
    batch = dict(recipe.collate(rows)) | {"labels": torch.tensor(task.train.targets[:32])}
    runs = {}
    for name, config in CONFIGS.items():
        model = get_peft_model(recipe.fresh_model(), config).train()
        runs[name] = (model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5))
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats + 2):
        for name, (model, optimizer) in runs.items():
            seconds[name].append(step(model, optimizer, batch))
    found = []
    for name, times in seconds.items():
        ratios = sorted(a / b for a, b in zip(times[2:], seconds["LoRA r=8"][2:], strict=True))
        trained = sum(p.numel() for p in runs[name][0].parameters() if p.requires_grad)
        spread = [ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4]]
        found.append({"method": name, "trained": trained, "ratio": statistics.median(ratios), "quartiles": spread})
        print(found[-1], flush=True)
    record = {
        "what": f"all-MiniLM-L6-v2, {batch['input_ids'].numel()} tokens a step, float32, AdamW, {repeats} rounds",
        **provenance(),
        "methods": found,
    }
    RESULTS.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
