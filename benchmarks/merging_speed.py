"""Time and memory of merging many LoRAs of a large model: random LoRAs in the shapes of an 8B Llama, in bfloat16.

    python benchmarks/merging_speed.py [--rule task_singular] [--adapters 10] [--r 16] [--blocks 32]

A block has seven weights, so 32 blocks are 224. Reading, merging, the report and writing are counted. Processor seconds
are those of all threads, and are what counts on a machine that does other work. Writes
benchmarks/results/merging_speed.json.
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
import time
from pathlib import Path

import torch
from provenance import provenance
from safetensors.torch import save_file

from spectune.checkpoint import write_atomically
from spectune.fusion import fuse

RESULTS = Path(__file__).parent / "results" / "merging_speed.json"
# Output and input sides in Llama 3 8B.
SHAPES = {
    "self_attn.q_proj": (4096, 4096),
    "self_attn.k_proj": (1024, 4096),
    "self_attn.v_proj": (1024, 4096),
    "self_attn.o_proj": (4096, 4096),
    "mlp.gate_proj": (14336, 4096),
    "mlp.up_proj": (14336, 4096),
    "mlp.down_proj": (4096, 14336),
}


def write_lora(folder: Path, seed: int, r: int, blocks: int) -> Path:
    """Write a random LoRA as PEFT stores it."""
    stream, tensors = torch.Generator().manual_seed(seed), {}
    for block in range(blocks):
        for name, (rows, cols) in SHAPES.items():
            stem = f"base_model.model.model.layers.{block}.{name}"
            for side, shape in (("A", (r, cols)), ("B", (rows, r))):
                numbers = torch.randn(*shape, generator=stream).mul_(0.01)
                tensors[f"{stem}.lora_{side}.weight"] = numbers.to(torch.bfloat16)
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    targets = [name.rpartition(".")[2] for name in SHAPES]
    config = {"peft_type": "LORA", "r": r, "lora_alpha": r, "target_modules": targets, "task_type": "CAUSAL_LM"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rule", default="task_singular")
    parser.add_argument("--adapters", type=int, default=10)
    parser.add_argument("--r", type=int, default=16)
    parser.add_argument("--blocks", type=int, default=32)
    parser.add_argument("--results", type=Path, default=RESULTS)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        adapters = [write_lora(Path(folder) / f"{i}", i, asked.r, asked.blocks) for i in range(asked.adapters)]
        started, processor = time.perf_counter(), time.process_time()
        saved = fuse(adapters, rule=asked.rule).save(Path(folder) / "merged")
        found = {"seconds": time.perf_counter() - started, "processor_seconds": time.process_time() - processor}
    sizes = {name: value for name, value in vars(asked).items() if name != "results"}
    record = {**provenance(), **sizes, "threads": torch.get_num_threads(), **found, "rank": saved.max_rank}
    record |= {
        "weights": asked.blocks * len(SHAPES),
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }
    write_atomically(asked.results, json.dumps(record, indent=1) + "\n")
    print(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
