"""Times of runs that take turns, by CUDA events on a GPU; peak memory."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from rounds import spread

from .notebook import Notebook, Setting

Job = Callable[[], Any]


def synchronize(setting: Setting) -> None:
    if setting.on_cuda:
        torch.cuda.synchronize()


def milliseconds(setting: Setting, job: Job) -> float:
    """Get the time of one call: between two events on the device's stream, or on the CPU's clock."""
    if not setting.on_cuda:
        started = time.perf_counter()
        job()
        return 1000 * (time.perf_counter() - started)
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    before.record()
    job()
    after.record()
    torch.cuda.synchronize()
    return before.elapsed_time(after)


def taking_turns(setting: Setting, notebook: Notebook, jobs: dict[str, Job], rounds: int) -> dict[str, list[float]]:
    """Get the milliseconds of every job in every round; fewer rounds, at least one, where the time runs out."""
    times: dict[str, list[float]] = {name: [] for name in jobs}
    for turn in range(rounds):
        if turn and notebook.out_of_time:
            break
        for name, job in jobs.items():
            times[name].append(milliseconds(setting, job))
    return times


def summary(times: list[float], **bases: list[float]) -> dict[str, Any]:
    """Get the median, the rounds, and the quartiles of the ratios to each base, `to_NAME`."""
    row: dict[str, Any] = {"milliseconds": round(statistics.median(times), 4), "rounds": len(times)}
    return row | {f"to_{name}": spread(times, base) for name, base in bases.items() if base}


def peak_mib(setting: Setting, job: Job) -> float | None:
    """Get the most that a call holds beyond what stands before it; None on a CPU, which does not count."""
    if not setting.on_cuda:
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    job()
    torch.cuda.synchronize()
    return round((torch.cuda.max_memory_allocated() - before) / 2**20, 1)
