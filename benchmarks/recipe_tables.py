"""Tables of what the recipes measured: sweeps, learning rates, GSM8K."""

from __future__ import annotations

import math
from typing import Any


def sweep_table(record: dict[str, Any]) -> str:
    """Get one table a task, the mean over the tasks, and what a reader must know."""
    summary = record["summary"]
    lines = [
        f"{len(record['runs'])} runs in {record['minutes']:.0f} minutes on {record['machine']['cpus']} CPU cores, "
        f"{record['jobs']} at a time; mean of "
        f"{len(summary['seeds'])} seeds on test, with lowest and highest.",
        "",
    ]
    for task in summary["tasks"]:
        rows = [row for row in summary["rows"] if row["task"] == task]
        if len(summary["tasks"]) > 1:
            lines += [f"**{task}**", ""]
        lines += [
            f"| method | {summary['task_metrics'][task]}, % | low to high | rate | trained numbers |",
            "|---|---:|---:|---:|---:|",
        ]
        lines += [_sweep_row(row) for row in sorted(rows, key=lambda row: -(row["test"] or -math.inf))] + [""]
    if summary["averages"]:
        means = sorted(summary["averages"], key=lambda row: -(row["test"] or -math.inf))
        lines += [
            "Mean of the tasks: " + ", ".join(f"{row['method']} {100 * row['test']:.1f}" for row in means) + ".",
            "",
        ]
    # Of memory, times and forgetting nothing is shown here.
    said = [
        sentence for sentence in summary["says"] if not sentence.startswith(("Peak memory", "Step times", "Forgetting"))
    ]
    lines += [f"- {sentence}" for sentence in [*summary.get("published", {}).get("deviations", []), *said]]
    return "\n".join(lines).rstrip()


def _sweep_row(row: dict[str, Any]) -> str:
    figures = [f"{100 * row[key]:.1f}" for key in ("test", "low", "high")]
    rate = f"{row['rate']:g}" + (" (end of grid)" if row["at_edge"] else "")
    span = "one seed" if row["seeds"] == 1 else f"{figures[1]} to {figures[2]}"
    cells = [row["method"], figures[0], span, rate, f"{row['trainable']:,}"]
    return "| " + " | ".join(cells) + " |"


def paired_table(record: dict[str, Any]) -> str:
    """Get one row a method: its figure and rate on each task, and its mean gain over the baseline."""
    summary = record["summary"]
    tasks, base = summary["tasks"], summary["baseline"]
    gains = {gain["method"]: gain for gain in summary["gains"]}
    lines = [
        f"{len(record['runs'])} runs on {record['machine']['cpus']} CPU cores; accuracy on test in %, mean of "
        f"{len(summary['seeds'])} seeds, with the rate; the gain is the mean over tasks of the paired differences to "
        f"{base}, with its standard error over seeds, and its 95% bootstrap interval.",
        "",
        "| method | trained numbers | " + " | ".join(tasks) + f" | gain over {base} | 95% interval |",
        "|---|---:|" + "---:|" * (len(tasks) + 2),
    ]
    for method in summary["methods"]:
        rows = {row["task"]: row for row in summary["rows"] if row["method"] == method}
        cells = [f"{100 * rows[task]['test']:.1f} ({rows[task]['rate']:g})" for task in tasks]
        gain = ["", ""]
        if (found := gains.get(method)) is not None:
            mean, error, low, high = (100 * found[key] for key in ("mean", "error", "low", "high"))
            gain = [f"{mean:+.2f} ± {error:.2f}", f"{low:+.2f} to {high:+.2f}"]
        numbers = rows[tasks[0]]["trainable"]
        lines.append("| " + " | ".join([method, f"{numbers:,}", *cells, *gain]) + " |")
    lines += ["", "| gain | " + " | ".join(tasks) + " |", "|---|" + "---:|" * len(tasks)]
    for method, gain in gains.items():
        lines.append("| " + " | ".join([method, *(f"{100 * gain['by_task'][task]:+.1f}" for task in tasks)]) + " |")
    return "\n".join(lines)


SENSITIVE = {
    "lora": "LoRA",
    "core": "core, gradient's directions",
    "specadapt": "`specadapt`",
    "specadapt_rules": "`specadapt`, decay and gradient norm",
}


def sensitivity_table(record: dict[str, Any]) -> str:
    """Get one row an adapter and rank: validation figures at 1/10 to 10 times its middle rate, and what they span."""
    summary = record["summary"]
    lines = [
        f"Validation {summary['metric']} in %, {len(summary['seeds'])} seed, at five learning rates around a middle "
        "one; the last column is the best minus the worst of the three within a factor of three:",
        "",
        "| adapter | rank | trained numbers | middle rate | x 0.1 | x 0.3 | x 1 | x 3 | x 10 | within x 3 |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    rows = {row["method"]: row for row in summary["rows"]}
    for name, said in SENSITIVE.items():
        for method in (method for method in summary["methods"] if method.rpartition("-")[0] == name):
            row, curve = rows[method], rows[method]["validation_by_rate"]
            values = [100 * value for _, value in curve]
            figures = [f"**{value:.1f}**" if value == max(values) else f"{value:.1f}" for value in values]
            cells = [said, method.rpartition("-")[2], f"{row['trainable']:,}", f"{curve[2][0]:g}", *figures]
            lines.append("| " + " | ".join([*cells, f"{max(values[1:4]) - min(values[1:4]):.1f}"]) + " |")
    return "\n".join(lines)


def rates_table(record: dict[str, Any]) -> str:
    """Get each method's best rate on each task beside its default, and what the default costs against the best."""
    tasks = record["tasks"]
    lines = [
        "| method | default | compromise | " + " | ".join(f"{task}: best, at default" for task in tasks) + " |",
        "|---|---:|---:|" + "---:|" * len(tasks),
    ]
    for method in record["adapters"]:
        cells = []
        for task in tasks.values():
            found, percent = task["methods"][method], task["metric"] != "loss"
            at_default = value_near(found["curve"], record["defaults"][method])
            cells.append(f"{found['best']:g}: {_value(found['value'], percent)}, {_value(at_default, percent)}")
        rates = [f"{record[key][method]:g}" for key in ("defaults", "compromise")]
        lines.append("| " + " | ".join([f"`{method}`", *rates, *cells]) + " |")
    return "\n".join(lines)


def value_near(curve: dict[str, float | None], rate: float) -> float | None:
    """Get the figure of the tried rate that is nearest, by their ratio."""
    return curve[min(curve, key=lambda tried: abs(math.log(float(tried) / rate)))]


def _value(value: float | None, percent: bool) -> str:
    return "diverged" if value is None else f"{value:.1%}" if percent else f"{value:.3f}"


def gsm8k_table(record: dict[str, Any]) -> str:
    """Get exact match and loss before and after."""
    lines = [
        f"{record['what']}: {record['steps']} steps of {record['batch_size']} examples in bfloat16, seed "
        f"{record['seed']}, scored on {record['questions']} test questions by the official rule "
        f"(`python benchmarks/gsm8k.py`, {record['machine']['cpus']} CPU cores).",
        "",
        "| method | rate | trained numbers | exact match before | after | loss of the answer before | after |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for method, row in record["methods"].items():
        before, after = row["before"], row["after"]
        cells = [
            f"`{method}`",
            f"{row['learning_rate']:g}",
            f"{row['trained']:,}",
            *(f"{figures['gsm8k']:.1%}" for figures in (before, after)),
            *(f"{figures['loss']:.3f}" for figures in (before, after)),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def reward_table(record: dict[str, Any]) -> str:
    lines = [
        f"{record['steps']} steps of {record['answers']} answers, {record['trained']:,} trained numbers; 16 answers to "
        "each of 16 held-out prompts (`python benchmarks/reward.py`, CPU).",
        "",
        "| seed | right, untouched | right, tuned | surprise by the untouched model's answers | by the tuned model's |",
        "|---|---:|---:|---:|---:|",
    ]
    for row in record["rows"]:
        shares = (f"{row[name]:.1%}" for name in ("base", "tuned"))
        bits = (f"{row[name]:.2f}" for name in ("base_surprise", "tuned_surprise"))
        lines.append("| " + " | ".join([str(row["seed"]), *shares, *bits]) + " |")
    return "\n".join(lines)


def merging_table(record: dict[str, Any]) -> str:
    tasks = list(record["rows"][0]["own"])
    seeds = len(record["rows"])
    own = ", ".join(f"{task} {record['rows'][0]['own'][task]:.1%}" for task in tasks)
    lines = [
        f"{len(tasks)} tasks, {seeds} {'seed' if seeds == 1 else 'seeds'}, {record['epochs']:g} epochs "
        f"(`python benchmarks/merging.py`): share of each adapter's own test score that is left after the merge. "
        f"Alone, seed {record['rows'][0]['seed']}: {own}.",
        "",
        f"| rule | mean | lowest task | {' | '.join(tasks)} | rank |",
        f"|---|---:|---:|{'---:|' * len(tasks)}---:|",
    ]
    for arm, figures in record["kept"].items():
        shares = [
            sum(row["arms"][arm]["scores"][task] / row["own"][task] for row in record["rows"]) / seeds for task in tasks
        ]
        cells = [f"{figures['mean']['mean']:.1%}", f"{figures['worst']['mean']:.1%}", *(f"{s:.1%}" for s in shares)]
        lines.append(f"| {arm} | {' | '.join(cells)} | {figures['rank']} |")
    return "\n".join(lines)


def qlora_table(record: dict[str, Any]) -> str:
    lines = [
        f"SmolLM2-135M-Instruct, {', '.join(f'`{layer}`' for layer in record['layers'])}; {record['steps']} steps of "
        f"{record['batch']} x {record['tokens']} tokens on one CPU core (`python benchmarks/qlora.py`). Memory is the "
        "peak of the steps above what the process needs before it loads the model. The step is a multiple of that of "
        f"LoRA on the same 4-bit base in the same round (median and quartiles of {record['rounds']}); the loss is the "
        "mean of the first and of the last three steps.",
        "",
        "| adapter | base | trained numbers | peak memory | step | loss, first | loss, last |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for arm, row in record["rows"].items():
        low, middle, high = row["ratio"]
        first, last = (sum(part) / len(part) for part in (row["losses"][:3], row["losses"][-3:]))
        name, _, base = arm.partition(", float32")
        cells = [name, "float32" if base else "nf4", f"{row['trained']:,}", f"{row['bytes'] / 1e6:,.0f} MB"]
        cells += [f"{middle:.2f} ({low:.2f} to {high:.2f})", f"{first:.2f}", f"{last:.2f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def resizing_table(record: dict[str, Any]) -> str:
    """Get the share of its score that each LoRA keeps, by way and share of numbers; the last column is their mean."""
    tasks = record["tasks"]
    names = [task["run"].rpartition("-")[0] for task in tasks]
    lines = [f"| numbers | cut by | {' | '.join(names)} | mean |", "|---:|---|" + "---:|" * (len(names) + 1)]
    ways = {(row["share"], row["way"]): None for task in tasks for row in task["rows"]}
    for share, way in sorted(ways, key=lambda one: -one[0]):
        kept = [row["kept"] for task in tasks for row in task["rows"] if (row["share"], row["way"]) == (share, way)]
        lines.append(_kept_row(f"{share:.1%}", way, kept))
    lines.append(_kept_row("0", "untouched", [task["untouched"] for task in tasks]))
    return "\n".join(lines)


def _kept_row(share: str, way: str, kept: list[float]) -> str:
    return f"| {share} | {way} | {' | '.join(f'{one:.1%}' for one in kept)} | {sum(kept) / len(kept):.1%} |"
