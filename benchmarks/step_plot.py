"""Write the tables and the plot of docs/speed.md from the committed results.

    python benchmarks/step_plot.py [--check]

Tables stand between their markers; a result that is not there yet leaves its place empty. The plot is docs/speed.svg:
one dot for each method, time of a step against bytes kept, both as multiples of LoRA's.
"""

from __future__ import annotations

import json
import math
import sys
from typing import Any

from step import RESULTS
from tables import ROOT, rewritten

PAGE, PLOT = ROOT / "docs" / "speed.md", ROOT / "docs" / "speed.svg"
WIDTH, HEIGHT, EDGE = 640, 420, 60


def ratio(figures: list[float]) -> str:
    low, middle, high = figures
    return f"{middle:.2f} ({low:.2f} to {high:.2f})"


def step_tables(record: dict[str, Any]) -> str:
    """Get one table for each setting of a suite."""
    lines = [
        f"{record['machine']['cpus']} CPU cores, {record['threads']} threads, {record['device']}; median, quartiles."
    ]
    for setting in record["settings"]:
        mode = "torch.compile" if setting["compiled"] else "eager"
        lines += ["", f"{setting['model']}, {setting['tokens']} tokens a step, {setting['dtype']}, {mode}:", ""]
        lines += [
            "| method | trained | step / frozen | step / LoRA | forward / LoRA | backward / LoRA | kept, MiB |",
            "|---|---:|---:|---:|---:|---:|---:|",
        ]
        for name, row in setting["adapters"].items():
            to_lora = row["to_lora"]
            parts = [ratio(row["to_frozen"]["step"]), ratio(to_lora["step"])]
            parts += [f"{to_lora[part][1]:.2f}" for part in ("forward", "backward")]
            kept = "–" if row["kept_bytes"] is None else f"{row['kept_bytes'] / 2**20:.1f}"
            lines.append(f"| {name} | {row['trained']:,} | {' | '.join(parts)} | {kept} |")
        lines += [f"\n{name} is left out: {why}" for name, why in setting["left_out"].items()]
    return "\n".join(lines)


def bank_table(record: dict[str, Any]) -> str:
    lines = [
        f"{record['rows']} rows a batch, {record['residents']:,} residents, {record['threads']} threads:",
        "",
        "| tokens a row | different adapters | served by | rows / s | / base | / one adapter | / LoRA |",
        "|---:|---:|---|---:|---:|---:|---:|",
    ]
    for row in record["throughput"]:
        ratios = [f"{row[key][1]:.2f}" if key in row else "–" for key in ("to_base", "to_one_adapter", "to_lora")]
        cells = [row["tokens_a_row"], row["different"] or "–", row["what"], row["rows_per_second"], *ratios]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def startup_table(record: dict[str, Any]) -> str:
    lines = ["| process | seconds |", "|---|---:|"]
    lines += [f"| `{name}` | {ratio(found)} |" for name, found in record["processes"].items()]
    lines += ["", "| adapter on all-MiniLM-L6-v2 | attach, s | load, s |", "|---|---:|---:|"]
    for name, found in record["adapters"].items():
        lines.append(f"| {name} | {ratio(found['attach'])} | {ratio(found['load'])} |")
    return "\n".join(lines)


def plot(setting: dict[str, Any]) -> str:
    """Get the drawing of one setting: x bytes kept, y time of a step, both logarithmic multiples of LoRA's."""
    rows = {name: row for name, row in setting["adapters"].items() if row["kept_bytes"]}
    lora = rows["LoRA"]["kept_bytes"]
    points = {name: (row["kept_bytes"] / lora, row["to_lora"]["step"][1]) for name, row in rows.items()}
    (left, right), (low, high) = ((min(v) * 0.9, max(v) * 1.3) for v in zip(*points.values(), strict=True))

    def place(value: float, low: float, high: float, start: float, end: float) -> float:
        return round(start + (end - start) * math.log(value / low) / math.log(high / low), 1)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}"',
        ' font-family="sans-serif" font-size="11">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        f'<text x="{WIDTH / 2}" y="{HEIGHT - 12}" text-anchor="middle">bytes kept / LoRA&apos;s</text>',
        f'<text x="14" y="{HEIGHT / 2}" transform="rotate(-90 14 {HEIGHT / 2})" text-anchor="middle">'
        f"time of a step / LoRA&apos;s ({setting['model']}, {setting['tokens']} tokens)</text>",
    ]
    for name, (kept, time) in points.items():
        x, y = place(kept, left, right, EDGE, WIDTH - EDGE), place(time, low, high, HEIGHT - EDGE, EDGE / 2)
        colour = "#b3261e" if name.split()[0] in OURS else "#555"
        parts.append(f'<circle cx="{x}" cy="{y}" r="3.5" fill="{colour}"><title>{name}: {time:.2f}</title></circle>')
        parts.append(f'<text x="{x + 6}" y="{y + 4}" fill="{colour}">{name} {time:.2f}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


OURS = {"spectral_a", "spectral_r", "svft", "specadapt", "svdiff,", "lidb", "orthogonal_adaptation"}
TABLES = {
    "step-small": step_tables,
    "step-medium": step_tables,
    "step-compile": step_tables,
    "bank": bank_table,
    "startup": startup_table,
}


def main() -> None:
    page = new = PAGE.read_text()
    for name, table in TABLES.items():
        file = RESULTS / f"{name}.json"
        if file.exists() and f"<!-- results:{name} -->" in page:
            new = rewritten(new, name, table(json.loads(file.read_text())))
    if "--check" in sys.argv:
        raise SystemExit(f"{PAGE}: not what the results say. Run benchmarks/step_plot.py." if new != page else 0)
    PAGE.write_text(new)
    if (RESULTS / "step-small.json").exists():
        settings = json.loads((RESULTS / "step-small.json").read_text())["settings"]
        PLOT.write_text(plot(next(s for s in settings if s["tokens"] == 2048 and s["dtype"] == "float32")))


if __name__ == "__main__":
    main()
