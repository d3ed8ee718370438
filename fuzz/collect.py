"""Join the records of `fuzz/run.py` into one file: `python fuzz/collect.py FOLDER... > fuzz/results.json`.

Edges of covered code are those that libFuzzer printed at the end of each run that it guided.
"""

from __future__ import annotations

import json
import platform
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

EDGES = re.compile(r"cov: (\d+) ft: (\d+) corp: (\d+)")
PACKAGES = ("torch", "safetensors", "transformers", "peft", "gguf", "regex")


def record(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text())
    log = path.with_name(f"{found['target']}-{found['seed']}.log")
    if found["engine"] == "atheris" and log.exists() and (seen := EDGES.findall(log.read_text(errors="replace"))):
        edges, features, corpus = (int(number) for number in seen[-1])
        found |= {"covered_edges": edges, "covered_features": features, "corpus": corpus}
    return found


def main() -> None:
    runs = [record(path) for folder in sys.argv[1:] for path in sorted(Path(folder).glob("*-*-*.json"))]
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False).stdout
    changed = subprocess.run(["git", "status", "--porcelain"], capture_output=True, text=True, check=False).stdout
    result = {
        "command": "python fuzz/run.py TARGET --count N --seed S --engine ENGINE",
        "commit": commit.strip() + (" with uncommitted changes" if changed else ""),
        "machine": f"{platform.machine()}, {platform.system()}, Python {platform.python_version()}, one thread",
        "packages": {name: version(name) for name in PACKAGES},
        "inputs": sum(run["inputs"] for run in runs),
        "slowest_ms": max(run["slowest_ms"] for run in runs),
        "peak_growth_mib": max(run["peak_growth_mib"] for run in runs),
        "runs": runs,
    }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
