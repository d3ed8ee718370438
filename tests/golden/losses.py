"""Write the losses that test_losses.py compares: `python -m tests.golden.losses [RECIPE ...]`.

For a change that is meant to change numbers; say so in its commit. A restructuring leaves these files alone.
"""

from __future__ import annotations

import json
import platform
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from tests.golden.loss_cases import CASES, trained

HERE = Path(__file__).parent / "losses"
# Whose kernels, order of operations and random numbers stand behind a loss.
PACKAGES = ("torch", "transformers", "peft", "accelerate", "trl", "diffusers", "numpy", "scipy")


def here() -> dict[str, str]:
    """Get what decides the last bits of a loss."""
    return {name: version(name) for name in PACKAGES} | {
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "processor": processor(),
    }


def version(package: str) -> str:
    """Get a package's release, or that there is none."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def processor() -> str:
    """Get the model of the processor as its maker numbers it: virtual machines shorten its name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    found = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    return " ".join(found.get(key, "") for key in ("model name", "cpu family", "model", "stepping")).strip()


def kept(recipe: str) -> dict[str, Any]:
    """Get what stands in a recipe's file."""
    found: dict[str, Any] = json.loads((HERE / f"{recipe}.json").read_text())
    return found


def main(recipes: list[str]) -> None:
    HERE.mkdir(exist_ok=True)
    for recipe in recipes or list(CASES):
        runs = {}
        for name, make in CASES[recipe].items():
            with tempfile.TemporaryDirectory() as place:
                started = time.perf_counter()
                runs[name] = trained(make(Path(place)), Path(place, "run"))
                print(f"{recipe}, {name}: {time.perf_counter() - started:.1f} s")
        content = {"command": f"python -m tests.golden.losses {recipe}", "made_on": here(), "runs": runs}
        (HERE / f"{recipe}.json").write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
