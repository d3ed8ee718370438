"""Fail when a training step has become slower, or keeps more memory, than the committed results say.

    python benchmarks/guard.py [--suite small] [--rounds 11]

Reruns a suite of benchmarks/step.py and compares ratios (to the frozen model and to LoRA in the same round), never
seconds, so another machine of the same kind may run it. A ratio has moved when the two spreads (quartiles) do not meet
and the medians differ by more than 3%; kept bytes when they differ at all upwards. Prints what moved, both ways; exits
with 1 when something of ours got worse. What the packages that it is compared with do is printed and is not a failure.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import torch
from step import RESULTS, SUITES, run
from step_cases import ADAPTERS

# Two runs of one tree on a quiet machine differ by less. Chosen.
LEAST_CHANGE = 0.03
KEYS = ("model", "tokens", "dtype", "compiled")
OURS = [name for name, how in ADAPTERS.items() if isinstance(how, dict) and "method" in how]


def moved(old: list[float], new: list[float]) -> float | None:
    """Get the change of the median as a fraction where the spreads (low, median, high) do not meet, else None."""
    change = new[1] / old[1] - 1
    apart = new[0] > old[2] or new[2] < old[0]
    return change if apart and abs(change) > LEAST_CHANGE else None


def compare(old: dict[str, Any], new: dict[str, Any]) -> list[tuple[str, bool]]:
    """Get a line for everything that moved, and whether it is a method of ours that got worse."""
    found: list[tuple[str, bool]] = []
    after = {tuple(setting[key] for key in KEYS) for setting in new["settings"]}
    before = {tuple(setting[key] for key in KEYS): setting for setting in old["settings"]}
    found += [(f"{where}: was measured and is no longer in the suite", True) for where in before.keys() - after]
    for setting in new["settings"]:
        where = tuple(setting[key] for key in KEYS)
        if where not in before:
            found.append((f"{where}: is not in the committed results", False))
            continue
        unknown = setting["adapters"].keys() - before[where]["adapters"]
        found += [(f"{where}: {name} is not in the committed results", False) for name in sorted(unknown)]
        for name, row in before[where]["adapters"].items():
            place = f"{setting['model']}, {setting['tokens']} tokens, {setting['dtype']}: {name}"
            if name not in setting["adapters"]:
                found.append((f"{place}: does not run any more ({setting['left_out'].get(name)})", name in OURS))
                continue
            again = setting["adapters"][name]
            for base in ("to_frozen", "to_lora"):
                for part, ratio in row[base].items():
                    if (change := moved(ratio, again[base][part])) is not None:
                        line = f"{place}: {part} {base}: {ratio[1]:.3f} -> {again[base][part][1]:.3f} ({change:+.1%})"
                        found.append((line, change > 0 and name in OURS and part == "step"))
            if row["kept_bytes"] is not None and again["kept_bytes"] != row["kept_bytes"]:
                line = f"{place}: kept bytes: {row['kept_bytes']:,} -> {again['kept_bytes']:,}"
                found.append((line, again["kept_bytes"] > row["kept_bytes"] and name in OURS))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", choices=list(SUITES), default="small")
    parser.add_argument("--rounds", type=int)
    given = parser.parse_args()
    file = RESULTS / f"step-{given.suite}.json"
    if not file.exists():
        raise SystemExit(f"{file}: there is nothing to compare with. Run benchmarks/step.py --suite {given.suite}.")
    old = json.loads(file.read_text())
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if old["device"] != device:
        raise SystemExit(f"{file}: measured on {old['device']}, this machine has {device}. Nothing can be compared.")
    torch.set_num_threads(old["threads"])  # ratios depend on it
    new = run(SUITES[given.suite], given.suite, given.rounds)
    lines = compare(old, new)
    for line, worse in lines:
        print("WORSE  " if worse else "moved  ", line)
    worst = sum(worse for _, worse in lines)
    print(f"{len(lines)} figures moved beyond the spread, {worst} of ours for the worse.")
    raise SystemExit(1 if worst else 0)


if __name__ == "__main__":
    main()
