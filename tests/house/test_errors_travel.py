"""Every exception of the house survives the way to another process: pickle and copy keep what it says."""

from __future__ import annotations

import copy
import importlib
import inspect
import pickle
import pkgutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

import spectune
from spectune.training.checkpoints import Interrupted

# What a class is made of, where it is not one line of text.
PARTS: dict[str, tuple[Any, ...]] = {"Interrupted": (Path("runs", "a"), 7)}


def children(kind: type[BaseException]) -> Iterator[type[BaseException]]:
    for child in kind.__subclasses__():
        yield child
        yield from children(child)


@pytest.fixture(scope="module")
def kinds() -> list[type[BaseException]]:
    """Every exception class that a module of the house defines, whatever it descends from."""
    for module in pkgutil.walk_packages(spectune.__path__, "spectune."):
        if not module.name.endswith("__main__"):
            with suppress(ImportError):  # an extra that is not installed
                importlib.import_module(module.name)
    found = {child for child in children(BaseException) if child.__module__.split(".")[0] == "spectune"}
    assert {"SpectuneError", "OptionError", "OutputError", "Interrupted"} <= {kind.__name__ for kind in found}
    return sorted(found, key=lambda kind: kind.__qualname__)


@pytest.mark.parametrize(
    "travel",
    [
        *(lambda error, way=way: pickle.loads(pickle.dumps(error, way)) for way in range(2, 6)),
        copy.copy,
        copy.deepcopy,
    ],
    ids=["pickle 2", "pickle 3", "pickle 4", "pickle 5", "copy", "deepcopy"],
)
def test_every_exception_arrives_as_it_was_sent(kinds: list[type[BaseException]], travel: Callable[[Any], Any]) -> None:
    for kind in kinds:
        error = kind(*PARTS.get(kind.__name__, ("layers.3.q_proj: r=64 is more than 32. Lower r.",)))
        error.row = 5  # type: ignore[attr-defined]
        arrived = travel(error)
        assert type(arrived) is kind
        assert (arrived.args, vars(arrived), str(arrived)) == (error.args, vars(error), str(error))
        # What Python's own parents keep beside args: errno of an OSError, name of an ImportError.
        for name, _ in inspect.getmembers(kind, inspect.isdatadescriptor):
            if not name.startswith("__"):
                assert getattr(arrived, name, None) == getattr(error, name, None), (kind, name)


def test_an_interrupted_run_says_where_it_stopped() -> None:
    error = pickle.loads(pickle.dumps(Interrupted(Path("runs", "a"), 7)))
    assert str(error) == f"stopped at step 7, which is saved in {Path('runs', 'a')}. Continue with --resume."
    assert (error.folder, error.step) == (Path("runs", "a"), 7)
