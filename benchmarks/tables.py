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

from fusion_tables import fusion_table
from gpu_tables import gpu_table
from recipe_tables import (
    gsm8k_table,
    merging_table,
    paired_table,
    qlora_table,
    rates_table,
    resizing_table,
    reward_table,
    sensitivity_table,
    sweep_table,
)

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


# What a reader of the README compares; docs/speed.md has every method.
SHOWN = (
    "LoRA",
    "DoRA",
    "spectral_a",
    "spectral_r",
    "specadapt, 64 directions",
    "svft plain, 8 directions",
    "svft banded, 64 directions",
    "svft plain, full basis",
)


def step_table(record: dict[str, Any]) -> str:
    settings = {setting["tokens"]: setting["adapters"] for setting in record["settings"]}
    lines = [
        "Time of a training step as a multiple of LoRA's in the same round (all-MiniLM-L6-v2, r = 8, float32, AdamW, "
        f"{record['threads']} CPU thread; median, quartiles; all methods in [docs/speed.md](docs/speed.md)):",
        "",
        "| method | trained numbers | " + " | ".join(f"{tokens} tokens a step" for tokens in settings) + " |",
        "| --- | ---: |" + " ---: |" * len(settings),
    ]
    for name in SHOWN:
        found = [adapters[name]["to_lora"]["step"] for adapters in settings.values()]
        trained = next(iter(settings.values()))[name]["trained"]
        cells = [f"{middle:.2f} ({low:.2f} to {high:.2f})" for low, middle, high in found]
        lines.append("| " + " | ".join([name, f"{trained:,}", *cells]) + " |")
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


def svd_table(record: dict[str, Any]) -> str:
    lines = [
        f"The leading {record['rank']} directions, {record['threads']} CPU threads, methods taking turns in one run; "
        "the ratio is that of the same round, the angle is the largest to the subspace of the float64 SVD "
        "(`python benchmarks/svd.py`). `svd_lowrank*` is `torch.svd_lowrank` at the fewest of 2, 4, 8, 16, 32 steps "
        "that came as close to the true subspace, or to 1e-4; a dash: none did.",
        "",
        "| weight | solver | full SVD, ms | spectune, ms | times faster | angle "
        "| svd_lowrank*, ms | ARPACK, ms | PROPACK, ms |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for weight in dict.fromkeys(row["weight"] for row in record["rows"]):
        rows = {row["method"]: row for row in record["rows"] if row["weight"] == weight}
        ours, full = rows["spectune"], rows["torch.linalg.svd"]
        enough = max(ours["angle"], 1e-4)
        rival = next((r for n, r in rows.items() if n.startswith("svd_lowrank") and r["angle"] <= enough), None)
        cells = [weight, ours["solver"], f"{full['milliseconds']:,.0f}", f"{ours['milliseconds']:,.1f}"]
        cells += [f"{ours['times_faster_than_full']:.1f}", f"{ours['angle']:.0e}"]
        cells += ["–" if rival is None else f"{rival['milliseconds']:,.1f}"]
        cells += [f"{rows[f'scipy {name}']['milliseconds']:,.1f}" for name in ("arpack", "propack")]
        lines.append("| " + " | ".join(cells) + " |")
    if whole := record["whole_model"]:
        solving, loading, cached = whole["solving"], whole["loading"], whole["from the cache"]
        lines += [
            "",
            f"All {whole['weights']} linear weights of SmolLM2-135M, r = {record['rank']}: solved in {solving:.1f} s "
            f"({solving / loading:.2f} of the time that transformers takes to load the model from its GGUF), "
            f"read from the cache in {cached:.2f} s ({cached / loading:.2f} of it).",
        ]
    return "\n".join(lines)


def streaming_table(record: dict[str, Any]) -> str:
    runs = {row["what"]: row for row in record["runs"]}
    first, again = runs["solved"], runs["found in the cache"]
    peaks = [f"{run['peak_bytes'] / 2**30:.2f} GiB" for run in (first, again)]
    return (
        f"`spectune decompose --r 16 --max-memory {record['max_memory']}` over a synthetic checkpoint of "
        f"{record['checkpoint_bytes'] / 2**30:.1f} GiB in bfloat16 shards: {first['seconds']:.0f} s for "
        f"{first['solved']} weights, at most {peaks[0]} resident; a second run, which only checks what is there, "
        f"{again['seconds']:.0f} s and {peaks[1]} (`python benchmarks/streaming.py`)."
    )


def compatibility_table(record: dict[str, Any]) -> str:
    lines = [
        "From the tests' own record (`benchmarks/compatibility.py`); a stand-in has the parts of a tool that we meet.",
        "",
        "| tool | version tried | what was run | tests |",
        "| --- | --- | --- | --- |",
    ]
    for row in record["tools"]:
        result = ", ".join(f"{row[word]} {word}" for word in ("passed", "failed", "skipped") if row[word])
        version = row["version"] if row["passed"] or row["failed"] else "not installed"
        lines.append(f"| {row['tool']} | {version} | {row['ran']} | {result} |")
    return "\n".join(lines)


def llama_cpp_table(record: dict[str, Any]) -> str:
    kinds = ("base", "lora", "lora, mixed ranks", "merged", "without the adapter")
    versions = ", ".join(f"{package} {version}" for package, version in record["versions"].items())
    lines = [
        "Largest difference of a log-probability from transformers', over all 512 words after four prompts of 20 "
        f"tokens: tiny random models of each family, float32, one CPU thread ({versions}; `benchmarks/llama_cpp.py`). "
        "The last column is how far the adapter moves them. llama.cpp takes the GELU of Gemma, Starcoder2 and GPT-2 "
        "from a table in float16, with or without an adapter.",
        "",
        f"| model | {' | '.join(kinds)} |",
        f"| --- |{' ---: |' * len(kinds)}",
    ]
    for row in record["rows"]:
        figures = [f"{row[kind]:.1f}" if kind == kinds[-1] else f"{row[kind]:.0e}" for kind in kinds]
        lines.append(f"| {row['model']} | {' | '.join(figures)} |")
    cut = ", ".join(f"{row['kind']} {row['differ']}" for row in record["words"])
    lines += [
        "",
        f"Of {record['words'][0]['texts']} paragraphs of these pages, llama.cpp cuts into other tokens: {cut}.",
    ]
    return "\n".join(lines)


def serving_table(record: dict[str, Any]) -> str:
    filled = record["filled"]
    cores, grown = (filled[kind] / 1e6 for kind in ("core_bytes", "grown_bytes"))
    each, lora = 1e3 * cores / record["residents"], 4 * record["numbers_of_a_lora"] / 1e6
    lines = [
        "A random Llama (4 layers of width 512), `spectral_r` with r = 8 on its 28 linear layers, "
        f"{record['residents']:,} adapters resident: {cores:.0f} MB of cores, the process grew by {grown:.0f} MB "
        f"({each:.0f} kB an adapter; a LoRA of r = 8 has {lora:.1f} MB). {record['rows']} requests at once, prompts of "
        f"16 tokens and 16 new ones, {record['threads']} CPU thread, {record['rounds']} rounds in turns: medians, "
        "ratios with quartiles (`python benchmarks/serving.py`).",
        "",
        "| served by | requests / s | / base | / LoRA |",
        "| --- | ---: | ---: | ---: |",
    ]
    for row in record["served"]:
        ratios = [f"{middle:.2f} ({low:.2f} to {high:.2f})" for low, middle, high in (row["to_base"], row["to_lora"])]
        lines.append(f"| {row['what']} | {row['requests_per_second']:.1f} | {' | '.join(ratios)} |")
    return "\n".join(lines)


TABLES: dict[str, tuple[str, Callable[[dict[str, Any]], str]]] = {
    "demo": ("README.md", demo_table),
    "step-small": ("README.md", step_table),
    "portability": ("docs/portability.md", portability_table),
    "svd": ("docs/svd.md", svd_table),
    "streaming": ("docs/svd.md", streaming_table),
    "fusion": ("docs/fusion.md", fusion_table),
    "gradient_fusion": ("docs/fusion.md", gradient_fusion_table),
    "merging": ("docs/fusion.md", merging_table),
    "gsm8k": ("docs/results.md", gsm8k_table),
    "rates": ("docs/results.md", rates_table),
    "small_glue": ("docs/results.md", sweep_table),
    "compare_small": ("docs/results.md", sweep_table),
    "data_spectra": ("docs/results.md", paired_table),
    "sensitivity": ("docs/results.md", sensitivity_table),
    "qlora": ("docs/recipes.md", qlora_table),
    "reward": ("docs/results.md", reward_table),
    "llama_cpp": ("docs/gguf.md", llama_cpp_table),
    "gpu": ("docs/speed.md", gpu_table),
    "resizing": ("docs/extract-and-resize.md", resizing_table),
    "serving": ("docs/serving.md", serving_table),
    "compatibility": ("docs/compatibility.md", compatibility_table),
}
# A GPU is there now and then only: until one has run benchmarks/gpu.py, its table says "not measured".
MAY_LACK = {"gpu"}


def rewritten(page: str, name: str, table: str) -> str:
    start, end = f"<!-- results:{name} -->", f"<!-- /results:{name} -->"
    head, _, rest = page.partition(start)
    return f"{head}{start}\n\n{table}\n\n{end}{rest.partition(end)[2]}"


def main() -> None:
    wrong = []
    for name, (page_name, make) in TABLES.items():
        path = ROOT / page_name
        page = path.read_text()
        file = RESULTS / f"{name}.json"
        record = {} if name in MAY_LACK and not file.exists() else json.loads(file.read_text())
        new = rewritten(page, name, make(record))
        if new != page and "--check" in sys.argv:
            wrong.append(page_name)
        elif new != page:
            path.write_text(new)
    if wrong:
        raise SystemExit(f"{', '.join(wrong)}: not what the results say. Run python benchmarks/tables.py.")


if __name__ == "__main__":
    main()
