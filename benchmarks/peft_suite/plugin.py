"""A pytest plugin: puts Spectune's configs in the place of others in PEFT's tests, and keeps the tests that have one.

PEFT's files are not changed. Its gates by class (what it knows to work for LoRA alone) are opened, since Spectune
promises the same: batches of several adapters, Conv1D layers.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image
from torch.optim import SGD

from spectune import SpectralConfig
from spectune.adapter import modules

from .cases import spectral

CONV1D_GATES = ("_skip_if_conv1d_not_supported", "_skip_if_not_conv1d_supported")
FOR_LORA_ALONE = ("_test_mixed_adapter_batches", "_test_generate_with_mixed_adapter_batches_and_beam_search")

OPTIONS: dict[str, Any] = json.loads(os.environ["SPECTUNE_OPTIONS"])
# PEFT's tests pick a learning rate of SGD for each of its methods, where .5 overflows or leaves a number where it was.
# The same for ours: (method, start of the test's name) -> rate.
RATES: dict[tuple[str, str], float] = {
    ("specadapt", "test_parameters_after_loading_model[spectune-MLP"): 0.01,
    ("specadapt", "test_only_params_are_updated[spectune-EmbConv1D"): 100.0,
}
# (method, start of the test's name) -> spread of the start under init_weights=False, where .02 is too little to see: a
# 2 x 20 weight has two directions, so one number for each side rotates it by hundredths of a radian. That moves outputs
# of up to 16 by .015, and PEFT asks whether they moved by more than .001 and a thousandth of themselves.
STARTS: dict[tuple[str, str], float] = {("spectral_r", "test_merge_layers_multi"): 0.2}
# Outputs of a model that FSDP has wrapped are compared with those of one that it has not. Its parameters then lie in
# one flat tensor, at other addresses, and the products round otherwise: up to 1.7e-5 of a log-probability, with
# nothing saved or loaded in between (PEFT asks for 1e-5).
FLAT = "test_save_load_roundtrip_fsdp_wrapped"
FLAT_TOLERANCE = 1e-4


class _Everything(defaultdict[str, int]):
    """Says of every model that it was read before: PEFT's tests then stay off the network."""

    def __contains__(self, name: object) -> bool:
        return True


@pytest.hookimpl(tryfirst=True)
def pytest_generate_tests(metafunc: Any) -> None:
    plain: Callable[..., None] = metafunc.parametrize
    metafunc.definition.is_spectral = False

    def parametrize(names: Any, rows: Any, *args: Any, **kwargs: Any) -> None:
        rows = list(rows)
        if (ours := spectral(names, rows, OPTIONS)) is not None:
            metafunc.definition.is_spectral = True
            rows, kwargs = ours, {key: value for key, value in kwargs.items() if key != "ids"}
        plain(names, rows, *args, **kwargs)

    metafunc.parametrize = parametrize


def pytest_collection_modifyitems(config: Any, items: list[Any]) -> None:
    kept = [item for item in items if any(_is_spectral(value) for value in _values(item))]
    config.hook.pytest_deselected(items=[item for item in items if item not in set(kept)])
    items[:] = kept
    for module in {item.module for item in kept}:
        _open_gates(module)


def _values(item: Any) -> list[Any]:
    return list(item.callspec.params.values()) if hasattr(item, "callspec") else []


def _is_spectral(value: Any) -> bool:
    return value is SpectralConfig or isinstance(value, SpectralConfig)


def _open_gates(module: Any) -> None:
    from tests import testing_common

    for place in (module, testing_common):
        for gate in CONV1D_GATES:
            if hasattr(place, gate):
                setattr(place, gate, lambda *args: None)


def pytest_configure(config: Any) -> None:
    from tests import testing_common, testing_utils

    testing_utils._HUB_MODEL_ACCESSES = _Everything(int)
    testing_utils.load_cat_image = _picture
    for test in FOR_LORA_ALONE:
        setattr(testing_common.PeftCommonTester, test, _as_if_lora(testing_common, test))


def _as_if_lora(module: Any, test: str) -> Callable[..., None]:
    """Get a common test that takes our config for LoRA's where it asks whether to skip."""
    plain = getattr(module.PeftCommonTester, test)

    @functools.wraps(plain)
    def opened(*args: Any, **kwargs: Any) -> None:
        with mock.patch.object(module, "LoraConfig", SpectralConfig):
            plain(*args, **kwargs)

    return opened


def _picture() -> Any:
    """Get what stands in for the picture that PEFT's tests download."""
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))


@pytest.fixture(autouse=True)
def _settings(request: Any) -> Iterator[None]:
    """Run a test at the rate of `RATES`, from the start of `STARTS`, and those of FSDP with `FLAT_TOLERANCE`."""
    name = request.node.name
    rate, start = _own(RATES, name), _own(STARTS, name)
    with contextlib.ExitStack() as stack:
        if start is not None:
            stack.enter_context(mock.patch.object(modules, "RANDOM_START", start))
        if rate is not None:
            stack.enter_context(mock.patch.object(torch.optim, "SGD", lambda numbers, lr: SGD(numbers, lr=rate)))
        if name.startswith(FLAT):
            near = functools.partial(torch.allclose, rtol=FLAT_TOLERANCE)
            stack.enter_context(mock.patch.object(torch, "allclose", near))
        yield


def _own(table: dict[tuple[str, str], float], name: str) -> float | None:
    """Get the entry of this method for a test, or None."""
    return next((at for (who, test), at in table.items() if who == OPTIONS["method"] and name.startswith(test)), None)


def pytest_runtest_logreport(report: Any) -> None:
    """Write one line for each test that has ended, in the process that reports."""
    if (report.when != "call" and report.passed) or "PYTEST_XDIST_WORKER" in os.environ:
        return
    if report.skipped:
        told = str(report.longrepr[-1]) if isinstance(report.longrepr, tuple) else str(report.longrepr)
    else:
        crash = getattr(report.longrepr, "reprcrash", None)
        told = "" if report.passed else str(getattr(crash, "message", report.longrepr))
    with open(os.environ["SPECTUNE_REPORT"], "a") as file:
        file.write(json.dumps({"test": report.nodeid, "outcome": report.outcome, "told": told}) + "\n")
