"""Write the tables and the plot of docs/speed.md from the committed results.

    python benchmarks/step_plot.py [--check]

Tables stand between their markers; a result that is not there yet leaves its place empty. The plot is docs/speed.svg:
time of a step and bytes kept for each method, as multiples of LoRA's.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from step import RESULTS
from tables import ROOT, rewritten

from spectune import METHODS

PAGE, PLOT = ROOT / "docs" / "speed.md", ROOT / "docs" / "speed.svg"
# In the units of the picture: where the two panels begin, the length of LoRA's bar, the longest bar in multiples of it.
WIDTH, TOP, LINE, PANELS, UNIT, LONGEST = 860, 52, 20, (220, 560), 100, 2.2


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
    """Get the drawing of one setting: bars of each method's time and bytes kept, LoRA's being 1."""
    rows = {name: row for name, row in setting["adapters"].items() if row["kept_bytes"]}
    lora = rows["LoRA"]["kept_bytes"]
    found = {name: (row["to_lora"]["step"][1], row["kept_bytes"] / lora) for name, row in rows.items()}
    height, bottom = TOP + LINE * len(found) + 12, TOP + LINE * len(found)
    said = f"{setting['model']}, {setting['tokens']} tokens a step, {setting['dtype']}"
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-family="sans-serif"',
        ' font-size="12" fill="#333">',
        f'<rect width="{WIDTH}" height="{height}" fill="white"/>',
        f'<text x="12" y="18">{said}; LoRA = 1, red: methods of Spectune</text>',
    ]
    for left, title in zip(PANELS, ("time of a step", "bytes kept for backward"), strict=True):
        parts.append(f'<text x="{left}" y="{TOP - 10}" font-weight="bold">{title} / LoRA&apos;s</text>')
    for place, (name, values) in enumerate(sorted(found.items(), key=lambda item: item[1])):
        middle = TOP + LINE * place + LINE // 2
        colour = "#b3261e" if name.split()[0].rstrip(",") in METHODS else "#777"
        parts.append(f'<text x="{PANELS[0] - 8}" y="{middle + 4}" text-anchor="end" fill="{colour}">{name}</text>')
        for left, value in zip(PANELS, values, strict=True):
            parts += bar(left, middle, value, colour)
    parts += [
        f'<line x1="{left + UNIT}" x2="{left + UNIT}" y1="{TOP}" y2="{bottom}" stroke="#000"/>' for left in PANELS
    ]
    return "\n".join([*parts, "</svg>"]) + "\n"


def bar(left: int, middle: int, value: float, colour: str) -> list[str]:
    """Get one bar and its figure; a bar beyond the panel ends at its edge, with an arrow."""
    length = round(min(value, LONGEST) * UNIT, 1)
    arrow = " \u2192" if value > LONGEST else ""
    figure = UNIT if UNIT - 32 < length < UNIT else length  # not across the line at 1
    return [
        f'<rect x="{left}" y="{middle - 6}" width="{length}" height="12" fill="{colour}"/>',
        f'<text x="{left + figure + 5}" y="{middle + 4}">{value:.2f}{arrow}</text>',
    ]


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
