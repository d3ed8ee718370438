"""Part d: batches whose rows use different adapters: `AdapterBank`, PEFT's LoRA with `adapter_names`, and the base."""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig, get_peft_model

from spectune import AdapterBank, SpectralConfig

from .llama import SHAPES, TARGETS, VOCABULARY, llama, sharing
from .notebook import Notebook, NotHere, Setting
from .timing import Job, milliseconds, summary, taking_turns

R = 8
COUNTS = (1, 64, 1024)
# Each of PEFT's adapters is two modules in every linear layer, and attaching walks through all of them.
LAYERS = 4
LEAST_ROWS = 64
METHODS: dict[str, dict[str, Any]] = {
    "spectral_r": {"method": "spectral_r", "r": R},
    "svft": {"method": "svft", "basis_rank": R},
}


def names(count: int, rows: int) -> list[str]:
    return [f"adapter{row % count}" for row in range(rows)]


def filled_bank(base: Any, options: dict[str, Any], count: int) -> tuple[Any, AdapterBank]:
    model = get_peft_model(sharing(base), SpectralConfig(target_modules=TARGETS, **options)).eval()
    bank = AdapterBank(model)
    shapes = {path: layer.cores[0] for path, layer in bank._layers.items()}
    for place in range(count):
        bank.put(f"adapter{place}", {path: 0.01 * torch.randn_like(core) for path, core in shapes.items()})
    return model, bank


def lora(base: Any, count: int, notebook: Notebook) -> Any:
    config = LoraConfig(r=R, target_modules=TARGETS, init_lora_weights=False)
    model = get_peft_model(sharing(base), config, adapter_name="adapter0")
    for place in range(1, count):
        if notebook.out_of_time:
            raise NotHere(f"PEFT had attached {place} of {count} adapters when the time was over")
        model.add_adapter(f"adapter{place}", config)
    return model.eval()


def served(model: Any, bank: AdapterBank | None, ids: torch.Tensor, count: int) -> Job:
    """Get the call that serves a batch."""
    asked = names(count, len(ids))

    def through_bank() -> None:
        assert bank is not None
        with bank(asked):
            model(input_ids=ids)

    return through_bank if bank is not None else lambda: model(input_ids=ids, adapter_names=asked)


def measure(setting: Setting, notebook: Notebook, base: Any, count: int) -> None:
    """Measure one number of different adapters: one token a row, as in decoding, and as many rows as adapters."""
    rows = max(count, 4 if setting.tiny else LEAST_ROWS)
    ids = torch.randint(0, VOCABULARY, (rows, 1), generator=torch.Generator().manual_seed(0)).to(setting.device)
    jobs: dict[str, Job] = {"base": lambda: base(input_ids=ids)}
    for name, options in METHODS.items():

        def fill(name: str = name, options: dict[str, Any] = options) -> None:
            jobs[f"{name} bank"] = served(*filled_bank(base, options, count), ids, count)

        notebook.attempt(f"{count:,} adapters: {name} bank", fill)
    turns(setting, notebook, jobs, count, rows)

    # PEFT's many modules come last: where the time ends in them, the bank's rows stand already.
    def attach() -> Job:
        return served(lora(base, count, notebook), None, ids, count)

    job = notebook.attempt(f"{count:,} adapters: LoRA of PEFT", attach)
    if job is not None:
        jobs["LoRA of PEFT"] = job
        turns(setting, notebook, jobs, count, rows)


def turns(setting: Setting, notebook: Notebook, jobs: dict[str, Job], count: int, rows: int) -> None:
    """Let all take turns and write their rows."""
    for job in jobs.values():
        milliseconds(setting, job)
    times = taking_turns(setting, notebook, jobs, 2 if setting.tiny else 15)
    for name, found in times.items():
        row = summary(found, base=times["base"], lora=times.get("LoRA of PEFT", []))
        row["rows_per_second"] = round(1000 * rows / row["milliseconds"], 1)
        notebook.put(f"{count:,} adapters: {name}", {**row, "rows_of_the_batch": rows})


def run(setting: Setting, notebook: Notebook) -> None:
    counts = (1, 3, 5) if setting.tiny else COUNTS
    kinds = ("base", *(f"{name} bank" for name in METHODS), "LoRA of PEFT")
    notebook.plan([f"{count:,} adapters: {kind}" for count in counts for kind in kinds])
    shape = "tiny" if setting.tiny else "1B"
    layers = min(LAYERS, SHAPES[shape][2])
    base = llama(shape, setting, layers).eval()
    notebook.note("model", f"{layers} layers of {shape}, r = {R}, bfloat16, one token a row")
    with torch.no_grad():
        for count in counts:
            if notebook.out_of_time:
                break
            measure(setting, notebook, base, count)
