"""Tests run without a network, on one thread each, and leave no trace in the user's cache."""

from __future__ import annotations

import os

import pytest

# Before anything imports huggingface_hub, also in the processes that tests start.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["TOKENIZERS_PARALLELISM"] = "false"


def pytest_configure(config: pytest.Config) -> None:
    """Ignore PEFT's own advice in situations that the tests bring about on purpose.

    Not in pyproject.toml: pytest imports a category named there before it reads this file, and with
    peft comes huggingface_hub, which reads the environment once.
    """
    config.addinivalue_line("filterwarnings", "ignore::peft.utils.warning.PeftWarning")
