"""Part a: the checks of checks.py, on the device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from spectune import METHODS
from spectune.spectrum.engine import SOLVERS

from . import checks
from .notebook import Notebook, Setting

Check = tuple[str, Callable[[], dict[str, Any]]]


def listed(device: str, backend: str) -> list[Check]:
    """Get every check by its name: what has no partner on a CPU first, torch.compile last, since it takes longest."""
    rows: list[Check] = []

    def add(name: str, check: Callable[..., dict[str, Any]], *arguments: Any) -> None:
        rows.append((name, lambda: check(device, *arguments)))

    for solver in ("auto", *SOLVERS):
        add(f"solver {solver}", checks.solver_agrees, solver)
    for method in METHODS:
        add(f"{method}: saved, loaded on the CPU", checks.saved_adapter_loads_on_the_cpu, method)
    for dtype in (torch.bfloat16, torch.float16):
        for method in METHODS:
            name = str(dtype).removeprefix("torch.")
            add(f"{method}: autocast {name}", checks.autocast_rounds_once, method, dtype)
    add("GradScaler, float16", checks.grad_scaler_steps)
    for method in METHODS:
        add(f"{method}: gradient checkpointing", checks.checkpointing_changes_nothing, method)
        add(f"{method}: grad_norm, singular_decay", checks.dynamics_act, method)
    for method in checks.FROZEN_FACTORS:
        add(f"{method}: AdapterBank", checks.bank_serves_each_row, method)
    for method in METHODS:
        add(f"{method}: torch.compile", checks.compiled_agrees, method, backend)
    return rows


def run(setting: Setting, notebook: Notebook) -> None:
    # On a CPU, inductor starts a C++ compiler for every graph; that time is not what this part measures.
    backend = "inductor" if setting.on_cuda else "aot_eager"
    rows = listed(setting.device, backend)
    notebook.plan([name for name, _ in rows])
    for name, check in rows:
        notebook.row(name, check)
