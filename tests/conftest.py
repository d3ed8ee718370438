"""Tests run without a network, on one thread each, and leave no trace in the user's cache."""

from __future__ import annotations

import os
import signal

import pytest

# Before anything imports huggingface_hub, also in the processes that tests start.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["TOKENIZERS_PARALLELISM"] = "false"

# A shell lets its background jobs ignore Ctrl-C, and the processes that tests start would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_configure(config: pytest.Config) -> None:
    """Ignore PEFT's own advice in situations that the tests bring about on purpose.

    Not in pyproject.toml: pytest imports a category named there before it reads this file, and with
    peft comes huggingface_hub, which reads the environment once.
    """
    config.addinivalue_line("filterwarnings", "ignore::peft.utils.warning.PeftWarning")
