"""The tables of a GPU's record: what docs/speed.md shows and benchmarks/gpu.py prints at its end."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

NOT_MEASURED = "not measured"
STEP_METHODS = ("frozen", "LoRA", "DoRA", "spectral_a", "spectral_r", "svft, r directions")
STEP_CELLS = [f"{shape}, {count} tokens, eager" for shape in ("1B", "3B", "8B") for count in ("2,048", "8,192")]
STEP_CELLS += [
    f"{shape}, {count} tokens, torch.compile" for shape in ("1B", "3B", "8B") for count in ("2,048", "8,192")
]
WEIGHTS = [f"{place}, r = {r}" for place in ("4096 x 4096", "4096 x 14336") for r in (16, 64)]
WEIGHTS += [f"all linear weights of 8B, r = {r}" for r in (16, 64)]
SOLVERS = ("spectune", "svd_lowrank, 4 steps", "torch.linalg.svd", "experiment: matrix sign, Newton-Schulz")
SERVED = ("base", "spectral_r bank", "svft bank", "LoRA of PEFT")
COUNTS = ("1", "64", "1,024")
GRAPHS = ("frozen", "LoRA", "spectral_a", "spectral_r")
FOUR_BIT = ("frozen", "LoRA", "spectral_a", "svft, dense core")
MERGED = ("task_singular", "match")
ENGINES, SHARED = ("DDP", "FSDP2"), ("LoRA", "spectral_a", "svft, r directions")
RUNS = ("before", *(f"{method}, seed {seed}" for seed in range(3) for method in ("spectral_a", "LoRA")))


class Rows:
    """The rows of a part, where there are any."""

    def __init__(self, record: dict[str, Any], part: str) -> None:
        self.part: dict[str, Any] = record.get("parts", {}).get(part, {})

    def cell(self, name: str, figure: str, form: str = "{:,.1f}") -> str:
        """Get a figure of a row, why it is left out, or that it is not measured."""
        value = self.part.get("rows", {}).get(name, {}).get(figure)
        if value is not None:
            return form.format(value[1] if isinstance(value, list) else value)
        if name in self.part.get("errors", {}):
            return "failed"
        why = self.part.get("left_out", {}).get(name, "")
        return "out of memory" if why.startswith("out of memory") else "–" if why else NOT_MEASURED


def gpu_table(record: dict[str, Any]) -> str:
    """Get the GPU tables of docs/speed.md. What was not measured is counted."""
    parts = (correctness, steps, weights, batches, graphs, four_bit, directions, merges, devices, runs)
    return "\n".join([head(record), *(line for part in parts for line in part(record))])


def head(record: dict[str, Any]) -> str:
    if not record:
        return "No GPU has run `benchmarks/gpu.py` yet, so every row says so."
    versions = ", ".join(f"{name} {version}" for name, version in record.get("versions", {}).items() if version)
    memory = f", {record['memory_gib']} GiB" if record.get("memory_gib") else ""
    return f"{record.get('card') or record.get('device')}{memory}; commit {record.get('commit')}; {versions}."


def correctness(record: dict[str, Any]) -> Iterator[str]:
    part = Rows(record, "a").part
    held, failed, planned = (len(part.get(key, ())) for key in ("rows", "errors", "planned"))
    said = f"{held} of {planned} checks hold, {failed} fail, {planned - held - failed} were not reached"
    why = "".join(f"; {name}: {error['message']}" for name, error in part.get("errors", {}).items())
    yield ""
    yield f"Correctness: {said + why if part else NOT_MEASURED}."


def table(title: str, columns: list[str], rows: list[list[str]], names: int = 1) -> Iterator[str]:
    """Get the rows that have a figure behind their `names` first cells, and how many have none."""
    asked, rows = len(rows), [row for row in rows if {*row[names:]} - {NOT_MEASURED, "–"}]
    if len(rows) < asked:
        title = f"{title[:-1]} ({len(rows)} of {asked} rows; {NOT_MEASURED}: the others):"
    if not rows:
        yield from ("", f"{title.split(';')[0].split(':')[0].split(' (0 of')[0]}: {NOT_MEASURED}.")
        return
    yield from ("", title, "", "| " + " | ".join(columns) + " |", "|---|" + "---:|" * (len(columns) - 1))
    yield from ("| " + " | ".join(row) + " |" for row in rows)


def steps(record: dict[str, Any]) -> Iterator[str]:
    found = Rows(record, "b")
    rows = []
    for cell in STEP_CELLS:
        names = [f"{cell}: {method}" for method in STEP_METHODS]
        if not cell.endswith("eager"):  # DoRA and svft are not compiled everywhere
            names = [
                name for name in names if "svft" not in name and ("DoRA" not in name or cell.startswith("1B, 2,048"))
            ]
        for name in names:
            figures = [("milliseconds", "{:,.1f}"), ("to_frozen", "{:.2f}"), ("to_lora", "{:.2f}")]
            rows.append([*name.split(": "), *(found.cell(name, *one) for one in figures)])
            rows[-1].append(found.cell(name, "peak_mib", "{:,.0f}"))
    title = "A training step on random Llama decoders, bfloat16, r = 16; medians of interleaved rounds:"
    return table(title, ["setting", "adapter", "ms", "/ frozen", "/ LoRA", "peak, MiB"], rows, 2)


def weights(record: dict[str, Any]) -> Iterator[str]:
    found = Rows(record, "c")
    rows = []
    for place in WEIGHTS:
        for solver in SOLVERS:
            whole = place.startswith("all")
            if (whole and solver not in SOLVERS[:2]) or (solver == SOLVERS[2] and place.endswith("64")):
                continue
            name = f"{place}: {solver}"
            angle = "–" if whole else found.cell(name, "angle", "{:.0e}")
            residual = found.cell(name, "residual", "{:.0e}") if solver == "spectune" else "–"
            rows.append([place, solver, found.cell(name, "milliseconds"), angle, residual])
    title = "Decomposition; the angle is the largest to the true subspace, the residual is the certificate:"
    return table(title, ["weight", "solver", "ms", "angle", "residual"], rows, 2)


def batches(record: dict[str, Any]) -> Iterator[str]:
    found = Rows(record, "d")
    rows = []
    for count in COUNTS:
        for served in SERVED:
            name = f"{count} adapters: {served}"
            figures = [found.cell(name, "rows_per_second"), found.cell(name, "to_base", "{:.2f}")]
            rows.append([count, served, *figures, found.cell(name, "to_lora", "{:.2f}")])
    title = "Batches of different adapters, one token a row; times as multiples:"
    return table(title, ["adapters", "served by", "rows / s", "/ base", "/ LoRA"], rows, 2)


def graphs(record: dict[str, Any]) -> Iterator[str]:
    found = Rows(record, "e")
    rows = []
    for name in GRAPHS:
        graph = f"{name}: CUDA graph of a step"
        figures = [found.cell(graph, key, "{:,.2f}") for key in ("milliseconds", "graph_milliseconds")]
        rows.append([name, *figures, found.cell(f"{name}: profile", "calls", "{:,.0f}")])
    title = "A small step (256 tokens, four layers) as a captured CUDA graph, and its kernels:"
    return table(title, ["adapter", "eager, ms", "graph, ms", "kernels a step"], rows)


def four_bit(record: dict[str, Any]) -> Iterator[str]:
    found = Rows(record, "g")
    rows = []
    for cell in ("8B, 2,048 tokens, eager", "8B, 8,192 tokens, eager"):
        for method in FOUR_BIT:
            name = f"{cell}: {method}"
            figures = [("milliseconds", "{:,.1f}"), ("to_lora", "{:.2f}"), ("peak_mib", "{:,.0f}")]
            rows.append([cell.removesuffix(", eager"), method, *(found.cell(name, *one) for one in figures)])
    title = "A training step on an NF4 base, r = 16:"
    return table(title, ["setting", "adapter", "ms", "/ LoRA", "peak, MiB"], rows, 2)


def directions(record: dict[str, Any]) -> Iterator[str]:
    found = Rows(record, "h")
    names = [f"1B: pass for {kind}" for kind in ("gradient", "activation", "weight_x_activation")]
    keys = ("pass_seconds", "attach_seconds")
    rows = [[name.removeprefix("1B: "), *(found.cell(name, key, "{:.2f}") for key in keys)] for name in names]
    title = "Directions of the data on the 1B decoder, 16 batches of 2,048 tokens:"
    return table(title, ["what", "pass, s", "attaching, s"], rows)


def merges(record: dict[str, Any]) -> Iterator[str]:
    found = Rows(record, "i")
    figures = [("seconds", "{:,.1f}"), ("rank", "{:,}"), ("peak_mib", "{:,.0f}")]
    rows = [[rule, *(found.cell(f"1B: {rule}", *one) for one in figures)] for rule in MERGED]
    return table("Merging five LoRAs of the 1B decoder, r = 16:", ["rule", "s", "rank", "peak, MiB"], rows)


def devices(record: dict[str, Any]) -> Iterator[str]:
    found = Rows(record, "j")
    rows = []
    for engine in ENGINES:
        for method in SHARED:
            name = f"8B, {engine}: {method}"
            figures = [
                ("processes", "{:,}"),
                ("milliseconds", "{:,.1f}"),
                ("speedup", "{:.2f}"),
                ("peak_mib", "{:,.0f}"),
            ]
            rows.append([engine, method, *(found.cell(name, *one) for one in figures)])
    title = "A training step of the 8B decoder on several GPUs, 2,048 tokens each; tokens a second over one GPU's:"
    return table(title, ["engine", "adapter", "GPUs", "ms", "speedup", "peak, MiB"], rows, 2)


def runs(record: dict[str, Any]) -> Iterator[str]:
    found = Rows(record, "f")
    rows = [[name, found.cell(name, "loss", "{:.3f}"), found.cell(name, "exact_match", "{:.1%}")] for name in RUNS]
    return table("SmolLM2-135M on GSM8K:", ["run", "loss", "exact match"], rows)


def printed(record: dict[str, Any]) -> str:
    """Get the few lines at the end of a run: every part, its state, how many rows it has, what failed."""
    lines = [
        head(record),
        "",
        f"{'part':30} {'state':12} {'seconds':>8} {'rows':>5} {'left out':>8} {'failed':>6} {'missing':>7}",
    ]
    for letter, part in sorted(record.get("parts", {}).items()):
        missing = set(part.get("planned", ())) - part.get("rows", {}).keys()
        missing -= part.get("left_out", {}).keys() | part.get("errors", {}).keys()
        counts = [len(part.get(key, ())) for key in ("rows", "left_out", "errors")]
        lines.append(
            f"{letter} {part['title'][:28]:28} {part['state']:12} {part.get('seconds', 0):8.1f} "
            f"{counts[0]:5} {counts[1]:8} {counts[2]:6} {len(missing):7}"
        )
        lines += [
            f"    {name}: {error['type']}: {error['message'].splitlines()[:1]}"
            for name, error in part.get("errors", {}).items()
        ]
        lines += [f"    {part['reason']}"] if part.get("reason") else []
    return "\n".join(lines)
