"""Imported first: nothing starts a thread, as a fork copies only the one that forks."""

from __future__ import annotations

import gc
import os
from pathlib import Path

for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[variable] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("HF_HUB_OFFLINE", "1")


def ready_to_fork() -> None:
    """Raise where there are threads; keep the collector from touching, and so copying, what is there already."""
    threads = {Path("/proc/self/task", task, "comm").read_text().strip() for task in os.listdir("/proc/self/task")}
    if len(threads - {"jemalloc_bg_thd"}) > 1:  # pyarrow's allocator, which sees to forks itself
        raise SystemExit(f"kills.py: a fork would copy one thread only, this process has {sorted(threads)}.")
    gc.collect()
    gc.freeze()
