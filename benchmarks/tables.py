"""Write the tables of README and docs from the committed results, between their markers.

    python benchmarks/tables.py [--check]

`--check` changes nothing and fails when a page does not say what the results say.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def demo_table(record: dict[str, Any]) -> str:
    names = {
        "frozen": "frozen body, trained head",
        "spectral_a": "`spectral_a`, r = 8",
        "lora": "LoRA (PEFT), r = 8",
    }
    lines = [
        "Held-out accuracy on the demo's task (24 languages, all-MiniLM-L6-v2, "
        f"{record['steps']} steps of 32 sentences on {record['machine']['cpus']} CPU cores), mean of the seeds "
        "(lowest to highest); the learning rate is the best of three on a validation part, for each method:",
        "",
        "| method | trained numbers without the head | rate | accuracy | seeds |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for method, name in names.items():
        if method in record["chosen"]:
            row = record["chosen"][method]
            low, high = row["test_spread"]
            accuracy = f"{row['test_mean']:.1%} ({low:.1%} to {high:.1%})"
            rate = f"{row['rate']:g}" if row["rate"] else "–"
            lines.append(f"| {name} | {row['trained']:,} | {rate} | {accuracy} | {row['seeds']} |")
    return "\n".join(lines)


def portability_table(record: dict[str, Any]) -> str:
    lines = [
        "| method | change | as found | turned, median | turned, worst | refused |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for row in record["rows"]:
        turned = (f"{row[k]:.1e}" if row[k] is not None else "–" for k in ("turned_median", "turned_max"))
        cells = [
            row["method"],
            row["change"],
            f"{row['raw_median']:.1e}",
            *turned,
            f"{row['refused']}/{row['weights']}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    sizes = [row for row in record["rows"] if "trained" in row]
    lines += [
        "",
        "| method, on the largest of these weights (1536 x 384) | trained numbers | sketch |",
        "|---|---:|---:|",
    ]
    lines += [f"| {row['method']} | {row['trained']:,} | {row['sketch']:,} |" for row in sizes]
    return "\n".join(lines)


def step_table(record: dict[str, Any]) -> str:
    lines = [
        f"Time of a training step as a multiple of LoRA's in the same round ({record['what']}, "
        f"{record['machine']['cpus']} CPU cores; median, quartiles):",
        "",
        "| method | trained numbers | step time / LoRA's |",
        "| --- | ---: | ---: |",
    ]
    for row in record["methods"]:
        low, high = row["quartiles"]
        lines.append(f"| {row['method']} | {row['trained']:,} | {row['ratio']:.2f} ({low:.2f} to {high:.2f}) |")
    return "\n".join(lines)


def gradient_fusion_table(record: dict[str, Any]) -> str:
    names = {
        "closed form": "closed form (default)",
        "closed form, eps 0": "closed form, minimum change (eps 0)",
        "closed form, float32, eps 1e-5": "closed form, sums in float32, eps 1e-5",
        "L-BFGS 500": "L-BFGS, 500 iterations, float32",
    }
    rows = record["rows"]
    real = sum(row["width"] == 384 for row in rows)
    lines = [
        f"Measured on {len(rows)} layers ({real} of 384 x 384 from all-MiniLM-L6-v2 with real activations, "
        f"{len(rows) - real} of 768 x 768), {record['what'].split(',')[0]}, one thread "
        "(`python benchmarks/gradient_fusion.py`). The residual is what is left of `Σ |dW_i X_i|²`; it is not zero "
        "because there are more inputs than features.",
        "",
        "| solver | all layers, seconds | mean residual | layers no worse than L-BFGS |",
        "|---|---:|---:|---:|",
    ]
    for key, name in names.items():
        residual = sum(row[key]["residual"] for row in rows) / len(rows)
        better = f"{record['layers_no_worse'][key]} of {len(rows)}"
        lines.append(f"| {name} | {record['seconds'][key]:.2f} | {residual:.5f} | {better} |")
    return "\n".join(lines)


TABLES: dict[str, tuple[str, Callable[[dict[str, Any]], str]]] = {
    "demo": ("README.md", demo_table),
    "step": ("README.md", step_table),
    "portability": ("docs/portability.md", portability_table),
    "gradient_fusion": ("docs/fusion.md", gradient_fusion_table),
}


def rewritten(page: str, name: str, table: str) -> str:
    start, end = f"<!-- results:{name} -->", f"<!-- /results:{name} -->"
    head, _, rest = page.partition(start)
    return f"{head}{start}\n\n{table}\n\n{end}{rest.partition(end)[2]}"


def main() -> None:
    wrong = []
    for name, (page_name, make) in TABLES.items():
        path = ROOT / page_name
        page = path.read_text()
        new = rewritten(page, name, make(json.loads((RESULTS / f"{name}.json").read_text())))
        if new != page and "--check" in sys.argv:
            wrong.append(page_name)
        elif new != page:
            path.write_text(new)
    if wrong:
        raise SystemExit(f"{', '.join(wrong)}: not what the results say. Run python benchmarks/tables.py.")


if __name__ == "__main__":
    main()
