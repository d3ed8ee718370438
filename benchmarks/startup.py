"""What starting costs: imports, the command line, attaching and loading an adapter with and without the basis cache.

    python benchmarks/startup.py [--repeats 7] [--only-start-up-file]

Every figure is the median of fresh processes, with the quartiles, in seconds. Attaching and loading are timed inside a
process that has already imported everything and built the model (all-MiniLM-L6-v2, every linear layer, r = 8; svft on
the full basis). The start-up file of the wheel is timed inside of a process, since it is less than what two
processes differ by. Writes benchmarks/results/startup.json; --only-start-up-file replaces only that part of it.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from provenance import provenance

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "startup.json"
PROCESSES = {
    "python alone": "pass",
    "import spectune": "import spectune",
    "import torch": "import torch",
    "import peft": "import peft",
    "import peft, then spectune": "import peft, spectune",
    "from spectune import SpectralConfig": "from spectune import SpectralConfig",
    "spectune --help": "import sys; sys.argv = ['spectune', '--help']\nfrom spectune.cli import main\nmain()",
    "spectune env": "import sys; sys.argv = ['spectune', 'env']\nfrom spectune.cli import main\nmain()",
}
METHODS: dict[str, dict[str, Any]] = {
    "spectral_a": {"method": "spectral_a"},
    "spectral_r": {"method": "spectral_r"},
    "svft, full basis": {"method": "svft"},
}
# What an installed spectune adds to a process that imports peft and not spectune: the start-up file, and the entry in
# PEFT's table; then the import itself, to compare with. Milliseconds of the processor's time.
START_UP = """
import json, site, sys, time
started = time.process_time()
site.addsitedir(sys.argv[1])
file = time.process_time() - started
import _spectune_autoload as ours
announce, spent = ours.announce, []
def timed(peft):
    began = time.process_time()
    announce(peft)
    spent.append(time.process_time() - began)
ours.announce = timed
started = time.process_time()
import peft
whole = time.process_time() - started
assert "spectune" not in sys.modules and "SPECTUNE" in peft.PEFT_TYPE_TO_CONFIG_MAPPING
print("\\n" + json.dumps({"start-up file": file * 1e3, "entry": spent[0] * 1e3, "import peft": whole * 1e3}))
"""
# One process for each: {options} in, the seconds of its parts out.
ADAPTER = """
import json, sys, time, torch
sys.path.insert(0, {here!r})
from peft import LoraConfig, PeftModel, get_peft_model
from spectune import SpectralConfig
from step_cases import MODELS
options, cache, folder = json.loads(sys.argv[1]), sys.argv[2], sys.argv[3]
model = MODELS["minilm"]
def config():
    if options is None:
        return LoraConfig(r=8, target_modules=list(model.targets))
    return SpectralConfig(target_modules=list(model.targets), svd={{"cache_dir": cache}}, **options)
bases = [model.build(torch.float32) for _ in range(2)]
times = {{}}
started = time.perf_counter()
tuned = get_peft_model(bases[0], config())
times["attach"] = time.perf_counter() - started
tuned.save_pretrained(folder)
saved = None if options is None else SpectralConfig.from_pretrained(folder)
if saved is not None:
    saved.svd.cache_dir = cache
started = time.perf_counter()
PeftModel.from_pretrained(bases[1], folder, config=saved)
times["load"] = time.perf_counter() - started
print("\\n" + json.dumps(times))
"""


def output_of(code: str, *arguments: str) -> tuple[float, str]:
    """Get the seconds of a fresh process and what it printed."""
    started = time.perf_counter()
    # As pip leaves an installation: compiled.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, env=environment)
    seconds = time.perf_counter() - started
    if done.returncode:
        raise SystemExit(done.stderr)
    return seconds, done.stdout


def quartiles(values: list[float]) -> list[float]:
    ordered = sorted(values)
    quarter = len(ordered) // 4
    return [round(one, 4) for one in (ordered[quarter], statistics.median(ordered), ordered[-1 - quarter])]


def adapters(repeats: int) -> dict[str, dict[str, list[float]]]:
    """Get the seconds to attach and to load each method, first without a cache, then with a filled one."""
    code, found = ADAPTER.format(here=str(HERE)), {}
    with tempfile.TemporaryDirectory() as place:
        cases: list[tuple[str, Any, str]] = [("LoRA of PEFT", None, "off")]
        for name, options in METHODS.items():
            cases += [(f"{name}, no cache", options, "off"), (f"{name}, cache", options, str(Path(place, "cache")))]
        for name, options, cache in cases:
            if cache != "off":
                output_of(code, json.dumps(options), cache, str(Path(place, "filling")))
            times: dict[str, list[float]] = {"attach": [], "load": []}
            for _ in range(repeats):
                _, printed = output_of(code, json.dumps(options), cache, str(Path(place, "adapter")))
                for what, seconds in json.loads(printed.splitlines()[-1]).items():
                    times[what].append(seconds)
            found[name] = {what: quartiles(values) for what, values in times.items()}
            print(name, found[name], flush=True)
    return found


def start_up(repeats: int) -> dict[str, list[float]]:
    """Get the milliseconds of the start-up file, of the entry in PEFT's table, and of `import peft` itself."""
    times: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as place:
        shutil.copy(HERE.parent / "src" / "spectune_autoload.pth", place)
        for _ in range(repeats):
            for what, spent in json.loads(output_of(START_UP, place)[1].splitlines()[-1]).items():
                times.setdefault(what, []).append(spent)
    return {what: quartiles(values) for what, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--only-start-up-file", action="store_true")
    asked = parser.parse_args()
    repeats = asked.repeats
    if asked.only_start_up_file:
        record = json.loads(RESULTS.read_text())
        record["start_up_file"] = {**provenance(), "milliseconds": start_up(repeats)}
        RESULTS.write_text(json.dumps(record, indent=1) + "\n")
        return
    processes: dict[str, list[float]] = {name: [] for name in PROCESSES}
    for number in range(repeats + 1):
        for name, code in PROCESSES.items():
            seconds, _ = output_of(code)
            if number:  # the first round fills the caches of files and of compiled modules
                processes[name].append(seconds)
    record = {**provenance(), "threads": os.environ.get("OMP_NUM_THREADS")}
    record["processes"] = {name: quartiles(values) for name, values in processes.items()}
    print(record["processes"], flush=True)
    record["start_up_file"] = {**provenance(), "milliseconds": start_up(repeats)}
    record["adapters"] = adapters(repeats)
    RESULTS.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
