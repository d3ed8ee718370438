"""`predict_elsewhere`: the predictions of a new process that reads base and adapter from the disk."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch


def predict_elsewhere(recipe: Any, adapter: Path, *, with_spectune: bool) -> list[int]:
    """Get the place of the likeliest class of each test sentence. Without spectune it is plain PEFT that loads."""
    job = {
        "base": str(recipe.config.model),
        "adapter": str(adapter),
        "texts": [row["text"] for row in recipe.splits["test"]],
        "labels": len(recipe.labels),
        "max_tokens": recipe.config.data.max_tokens,
        "with_spectune": with_spectune,
        "threads": torch.get_num_threads(),
    }
    with tempfile.TemporaryDirectory() as folder:
        asked, answered = Path(folder, "job.json"), Path(folder, "answer.json")
        asked.write_text(json.dumps(job))
        script = Path(__file__).with_name("elsewhere.py")
        done = subprocess.run([sys.executable, str(script), str(asked), str(answered)], capture_output=True, text=True)
        if done.returncode != 0:
            raise RuntimeError(f"{adapter}: a fresh process cannot use it: {done.stderr.strip().splitlines()[-1:]}")
        found: list[int] = json.loads(answered.read_text())
        return found
