"""The tables of what is kept when adapters are fused."""

from __future__ import annotations

from typing import Any

FUSION_METHODS = {"spectral_a": "`spectral_a`", "lora": "LoRA", "orthogonal_adaptation": "`orthogonal_adaptation`"}


def fusion_table(record: dict[str, Any]) -> str:
    lines: list[str] = []
    if "glyphs" in record:
        lines += _fused_glyphs(record["glyphs"])
    if "behind" in record:
        lines += ["", *_fused_behind(record["behind"])]
    if "text" in record:
        lines += [*([""] if lines else []), *_fused_text(record["text"])]
    return "\n".join(lines)


def _fused_glyphs(part: dict[str, Any]) -> list[str]:
    lines = [
        f"Three concepts of the glyph model ({_seeds(part)}, {part['steps']} steps each, {_sizes(part)}; "
        f"`python benchmarks/fusion.py`): share of {part['pictures']} pictures of each concept in which a classifier "
        "recognises it, mean of the three concepts, before and after fusion; the drop with its lowest and highest "
        "seed. The base draws "
        f"{part['base prompts of the base']:.0%} of its own prompts right. The word alone, without any adapter, is "
        f"recognised in {_bare(part, 'alone')} (alone) and {_bare(part, 'in company')} (in company).",
        "",
        "| rule | adapters | weights | alone | drop, points | in company | drop, points | base prompts | seconds |",
        "|---|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in part["rows"]:
        figures = [cell for figure in ("alone", "in company") for cell in _kept(row[figure], 0)]
        lines.append(_line(row, [*figures, f"{row['base prompts']['mean']:.0%}"]))
    return lines


def _fused_text(part: dict[str, Any]) -> list[str]:
    tasks = list(part["rows"][0]["accuracy"]["each"])
    lines = [
        f"Three language tasks on all-MiniLM-L6-v2 ({_seeds(part)}, {part['steps']} steps each, {_sizes(part)}; "
        f"`python benchmarks/fusion_text.py`): test accuracy, mean of the tasks, each with its own head, before and "
        f"after the bodies were fused; then the accuracy of each task after fusion. The heads on the untouched body "
        f"reach {_bare(part, 'accuracy')}.",
        "",
        f"| rule | adapters | weights | accuracy | drop, points | {' | '.join(tasks)} | seconds |",
        "|---|---|---|---:|---:|" + "---:|" * (len(tasks) + 1),
    ]
    for row in part["rows"]:
        each = [f"{row['accuracy']['each'][task]['after']['mean']:.1%}" for task in tasks]
        lines.append(_line(row, [*_kept(row["accuracy"], 1), *each]))
    return lines


def _line(row: dict[str, Any], cells: list[str]) -> str:
    collecting = f" + {row['gram_seconds']:.0f}" if row["gram_seconds"] >= 0.5 else ""
    weights = "–" if row["rule"] == "gradient" else "1" if row["weight"] == 1 else "1/N"
    start = [f"`{row['rule']}`", FUSION_METHODS[row["method"]], weights]
    return "| " + " | ".join([*start, *cells, f"{row['fuse_seconds']:.1f}{collecting}"]) + " |"


def _kept(figure: dict[str, Any], digits: int) -> list[str]:
    drop = figure["drop"]
    low, high = (f"{100 * drop[end]:+.{digits}f}" for end in ("lowest", "highest"))
    change = f"{100 * drop['mean']:+.{digits}f} ({low} to {high})"
    return [f"{figure['before']['mean']:.{digits}%} → {figure['after']['mean']:.{digits}%}", change]


def _seeds(part: dict[str, Any]) -> str:
    return f"{part['seeds']} seeds" if part["seeds"] > 1 else "1 seed"


def _sizes(part: dict[str, Any]) -> str:
    sizes = sorted({method["trained"] for method in part["methods"].values()})
    return " or ".join(f"{size:,}" for size in sizes) + " trained numbers"


def _bare(part: dict[str, Any], figure: str) -> str:
    means = [method["without adapter"][figure]["mean"] for method in part["methods"].values()]
    return f"{min(means):.0%} to {max(means):.0%}"


def _fused_behind(part: dict[str, Any]) -> list[str]:
    own = {figure: part["own"][figure]["mean"] for figure in ("alone", "in company")}
    lines = [
        f"LoRAs of the same three concepts ({_seeds(part)}), fused by rules that look at examples "
        f"(`python benchmarks/fusion_behind.py`): the share that is kept of each concept's own {own['alone']:.0%} "
        f"alone and {own['in company']:.0%} in company, with its lowest and highest seed, and the share of the base's "
        f"prompts that come out right. `keep` are {part['kept prompts']} prompts of the base, others than the judged "
        f"ones; the weight of the concepts beside it was chosen with another seed.",
        "",
        "| rule | alone, kept | in company, kept | base prompts |",
        "|---|---:|---:|---:|",
    ]
    for row in part["rows"]:
        cells = [_spread(row[figure]) for figure in ("alone", "in company", "base prompts")]
        lines.append(f"| {row['name']} | {' | '.join(cells)} |")
    tried = "; ".join(
        f"{weight}: {found['alone']:.0%}, {found['in company']:.0%}, {found['base prompts']:.0%}"
        for weight, found in part["tries"].items()
    )
    return [*lines, "", f"Weights that were tried (alone, in company, base prompts): {tried}.", ""]


def _spread(figure: dict[str, float]) -> str:
    return f"{figure['mean']:.0%} ({figure['lowest']:.0%} to {figure['highest']:.0%})"
