"""How much work a test may cost, in the processor's time of this process: other programs do not lengthen that."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

# What a process that a test starts may take, by the clock on the wall. Hanging for ever is what is refused: none takes
# more than a minute alone, and a machine may be busy.
PATIENCE = 600


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Fail where the block computed for longer; give the bound that a broken version would pass many times over."""
    began = time.process_time()
    yield
    used = time.process_time() - began
    assert used < seconds, f"{used:.1f} seconds of the processor, at most {seconds} are allowed"
