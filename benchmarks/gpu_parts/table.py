"""The parts, their order, and their shares of the time. Imports nothing heavy: the driver reads this at once."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Part:
    """One part: where its `run(setting, notebook)` stands, and how much of the time it may have."""

    module: str
    title: str
    share: float
    """Of all the parts' shares; what a part leaves over goes to those after it. On an H200 and 540 seconds, a took 61
    seconds, b 120 for a third of its rows, and e, g and h ended before their first row at 14, 27 and 24."""

    def runner(self) -> Callable[[Any, Any], None]:
        """Get the function that measures; this imports torch and PEFT."""
        found: Callable[[Any, Any], None] = importlib.import_module(f".{self.module}", __package__).run
        return found


PARTS: dict[str, Part] = {
    "a": Part("correctness", "Correctness", 15),
    "b": Part("training_step", "A training step", 40),
    "c": Part("decomposition", "Decomposition", 20),
    "d": Part("mixed_batches", "Batches of many adapters", 10),
    "e": Part("graphs", "CUDA graphs and kernels", 12),
    "g": Part("four_bit", "A 4-bit base", 25),
    "h": Part("data_directions", "Directions of the data", 20),
    "i": Part("merging", "Merging", 15),
    "j": Part("several_devices", "Several GPUs", 25),
    "f": Part("real_run", "A real run", 30),
}
