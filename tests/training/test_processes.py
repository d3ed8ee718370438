"""Where a model stands before its first step."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from spectune.training import processes
from spectune.training.processes import SHARDS, on_training_device


@pytest.fixture(autouse=True)
def _elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the run train on another device: "meta" is the one that every machine has."""
    monkeypatch.setattr(processes, "join", lambda: SimpleNamespace(device=torch.device("meta")))


def test_a_model_is_moved_to_where_it_trains() -> None:
    assert on_training_device(nn.Linear(2, 3)).weight.device.type == "meta"


@pytest.mark.parametrize("name", SHARDS)
def test_a_model_that_will_be_sharded_stays(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "true")
    assert on_training_device(nn.Linear(2, 3)).weight.device.type == "cpu"


def test_a_quantised_model_stays() -> None:
    layer = nn.Linear(2, 3)
    layer.is_quantized = True  # type: ignore[assignment]
    assert on_training_device(layer).weight.device.type == "cpu"
