"""Tests run without a network, on one thread each, and leave no trace in the user's cache."""

from __future__ import annotations

import gc
import os
import signal
import sys
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

# Before anything imports huggingface_hub, also in the processes that tests start.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["TOKENIZERS_PARALLELISM"] = "false"

# A shell lets its background jobs ignore Ctrl-C, and the processes that tests start would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


# gloo looks up the machine's own name otherwise, which not every machine knows.
if sys.platform == "linux":
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")

# The same examples everywhere, however busy the machine is; fuzz/ looks for new ones.
settings.register_profile("same", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("same")

# What a user may have set for the spectune of every day.
for name in [name for name in os.environ if name.startswith("SPECTUNE_")]:
    del os.environ[name]


@pytest.fixture(scope="session", autouse=True)
def _one_terminal() -> Iterator[None]:
    """Let every test and process write for the same terminal: narrow tables wrap, and colours stand between words."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"COLUMNS": "100", "TERM": "xterm", "NO_COLOR": "1"}.items():
            patch.setenv(name, value)
        for name in ("FORCE_COLOR", "CLICOLOR_FORCE", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "LINES"):
            patch.delenv(name, raising=False)
        yield


def pytest_configure(config: pytest.Config) -> None:
    """Ignore PEFT's own advice in situations that the tests bring about on purpose.

    Not in pyproject.toml: pytest imports a category named there before it reads this file, and with
    peft comes huggingface_hub, which reads the environment once.
    """
    config.addinivalue_line("filterwarnings", "ignore::peft.utils.warning.PeftWarning")
    # The tiny ViT has three classes and the tests' pictures have two; where it matters a test looks for the words.
    config.addinivalue_line("filterwarnings", "ignore:model. the head of .* is for other classes:UserWarning")


def pytest_collection_finish() -> None:
    """Let garbage collection pass over what libraries and test modules hold to the end.

    A collection looks at a million objects otherwise, and every run of a model ends with one: a third of their time.
    """
    gc.collect()
    gc.freeze()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """Skip a test in which transformers itself refuses the installed PEFT: it does so for a LoRA, too.

    transformers 5.24 does so for `add_adapter` and its kin until PEFT 0.22 is out; we allow it in no range.
    """
    try:
        return (yield)
    except ValueError as error:
        if "The version of PEFT you are using is not compatible" not in str(error):
            raise
        pytest.skip(f"transformers refuses this PEFT for every method: {error}")
