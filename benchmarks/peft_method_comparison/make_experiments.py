"""Write experiments for PEFT's own method comparison (method_comparison/MetaMathQA of huggingface/peft).

    python benchmarks/peft_method_comparison/make_experiments.py

Each is a folder as theirs: `adapter_config.json`, and `training_params.json` with what differs from their defaults: the
learning rate. README.md beside this file says how to run them; its table is written here, too.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from spectune import SpectralConfig
from spectune.methods import Method, build_method

HERE = Path(__file__).parent
EXPERIMENTS = HERE / "MetaMathQA" / "experiments"
# meta-llama/Llama-3.2-3B: out x in of the layers that PEFT tunes in a LLaMA by default, in each of 28 blocks.
SHAPES, BLOCKS = {"q_proj": (3072, 3072), "v_proj": (1024, 3072)}, 28
# LoRA's experiment at r = 32 trains as many numbers as the first; svft's two are near 0.1M, the size of the
# smallest adapters of their table. Chosen.
METHODS: dict[str, dict[str, Any]] = {
    "spectral_a/llama-3.2-3B-rank32": {"method": "spectral_a", "r": 32},
    "spectral_r/llama-3.2-3B-rank64": {"method": "spectral_r", "r": 64},
    "svft/llama-3.2-3B-plain": {"method": "svft"},
    "svft/llama-3.2-3B-dense48": {"method": "svft", "pattern": "dense", "basis_rank": 48},
    "svft/llama-3.2-3B-dense404": {"method": "svft", "pattern": "dense", "basis_rank": 404},
    "specadapt/llama-3.2-3B-rank32": {"method": "specadapt", "r": 32, "basis_rank": 512},
    "one_sided/llama-3.2-3B-rank64": {"method": "one_sided", "r": 64},
}


def _method(options: dict[str, Any]) -> Method:
    return build_method(options["method"], {name: value for name, value in options.items() if name != "method"})


def trained(options: dict[str, Any]) -> int:
    """Get how many numbers an experiment trains."""
    method = _method(options)
    fitted = [method.fitted(*shape) for shape in SHAPES.values()]
    own = sum(_size(one.trained_shapes(*shape)) for one, shape in zip(fitted, SHAPES.values(), strict=True))
    shared = [_size(one.shared_shapes(*shape)) for one, shape in zip(fitted, SHAPES.values(), strict=True)]
    times = {"model": max(shared), "kind": sum(shared), "": BLOCKS * sum(shared)}
    return BLOCKS * own + times[method.shared_by()]


def _size(shapes: dict[str, tuple[int, ...]]) -> int:
    return sum(math.prod(shape) for shape in shapes.values())


def rate(options: dict[str, Any]) -> float:
    method = _method(options)
    return float(f"{method.usual_rate():.2g}")


def table() -> str:
    lines = ["| experiment | trained numbers | learning rate |", "|---|---:|---:|"]
    lines += [f"| `{name}` | {trained(options):,} | {rate(options):g} |" for name, options in METHODS.items()]
    return "\n".join(lines)


def readme() -> str:
    """Get README.md with the table as it should be."""
    start, end = "<!-- experiments -->", "<!-- /experiments -->"
    head, _, rest = (HERE / "README.md").read_text(encoding="utf-8").partition(start)
    return f"{head}{start}\n\n{table()}\n\n{end}{rest.partition(end)[2]}"


def main() -> None:
    for name, options in METHODS.items():
        folder = EXPERIMENTS / name
        folder.mkdir(parents=True, exist_ok=True)
        config = SpectralConfig(**options, target_modules=list(SHAPES), task_type="CAUSAL_LM")
        config.save_pretrained(str(folder))
        changed = {"optimizer_kwargs": {"lr": rate(options), "weight_decay": 0.1}}
        (folder / "training_params.json").write_text(json.dumps(changed, indent=2) + "\n")
    (HERE / "README.md").write_text(readme(), encoding="utf-8")


if __name__ == "__main__":
    main()
