"""Peak memory and time of `spectune decompose` over a synthetic checkpoint of several shards.

    python benchmarks/streaming.py [--gib 4] [--folder DIR]

Writes the checkpoint (bfloat16 matrices, 4096 x 4096 and 11008 x 4096, power-law spectra), runs the command as a user
would, in a process of its own, and notes the peak of its resident memory. Writes benchmarks/results/streaming.json.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from provenance import provenance
from safetensors.torch import save_file

RESULTS = Path(__file__).parent / "results" / "streaming.json"
# The high-water mark of this process image: getrusage would count what the parent held when it forked.
RUN = """
import re, sys
from spectune.cli.app import app
app(sys.argv[1:], standalone_mode=False)
print("PEAK", 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]), file=sys.stderr)
"""


def write(folder: Path, size: int) -> int:
    """Write shards of about half a GiB; get the bytes of all tensors."""
    random, weight_map, shard, written, count = torch.Generator().manual_seed(0), {}, {}, 0, 0
    decay = torch.arange(1, 65) ** -0.5

    def flush() -> None:
        nonlocal shard
        name = f"model-{len(set(weight_map.values())) + 1:05}.safetensors"
        weight_map.update(dict.fromkeys(shard, name))
        save_file(shard, str(folder / name))
        shard = {}

    while written < size:
        rows = 4096 if count % 3 else 11008
        strong = torch.randn(rows, 64, generator=random) * decay @ torch.randn(64, 4096, generator=random)
        W_OI = (strong + 0.5 * torch.randn(rows, 4096, generator=random)).bfloat16()
        shard[f"layers.{count // 3}.{'up' if rows > 4096 else 'qk'[count % 2]}.weight"] = W_OI
        written, count = written + W_OI.nbytes, count + 1
        if sum(tensor.nbytes for tensor in shard.values()) > 2**29:
            flush()
    if shard:
        flush()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return written


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--gib", type=float, default=4.0)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--max-memory", default="640MiB")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=chosen.folder) as place:
        folder = Path(place)
        size = write(folder, int(chosen.gib * 2**30))
        rows = []
        for what in ("solved", "found in the cache"):
            started = time.perf_counter()
            words = ["decompose", place, "--r", "16", "--cache", f"{place}/bases", "--max-memory", chosen.max_memory]
            done = subprocess.run([sys.executable, "-c", RUN, *words, "--json"], capture_output=True, text=True)
            if done.returncode:
                raise SystemExit(done.stderr)
            peak = int(done.stderr.rpartition("PEAK ")[2])
            said = json.loads(done.stdout)
            seconds = time.perf_counter() - started
            rows.append({"what": what, "seconds": seconds, "peak_bytes": peak, "solved": said["solved"]})
            print(rows[-1], flush=True)
        stored = sum(path.stat().st_size for path in (folder / "bases").rglob("*.safetensors"))
    record = {**provenance(), "checkpoint_bytes": size, "max_memory": chosen.max_memory, "threads": os.cpu_count()}
    RESULTS.write_text(json.dumps({**record, "stored_bytes": stored, "runs": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
