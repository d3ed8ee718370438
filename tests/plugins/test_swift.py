"""The ms-swift tuner: each method is a `--tuner_type`."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from spectune import METHODS
from spectune.errors import SpectuneError

from ..models import MODELS
from .stand_ins import PeftTuner, with_tool

LLAMA = MODELS["llama"]


@pytest.fixture
def tuners(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    plugin = with_tool(monkeypatch, "swift", swift__tuner_plugin={"PeftTuner": PeftTuner, "tuners_map": {"ia3": None}})
    assert issubclass(plugin.SpectuneTuner, plugin.PeftTuner) and set(METHODS) < set(plugin.tuners_map)
    return dict(plugin.tuners_map)


def args(method: str, **more: Any) -> Any:
    plain = {"target_modules": ["all-linear"], "target_regex": None, "modules_to_save": [], "lora_rank": 4}
    return SimpleNamespace(tuner_type=method, **{**plain, **more})


def test_a_new_adapter_has_swift_s_rank_and_targets(tuners: dict[str, Any]) -> None:
    model = tuners["spectral_a"].prepare_model(args("spectral_a", target_modules=["q_proj", "v_proj"]), LLAMA.fresh())
    config = model.peft_config["default"]
    assert (config.r, config.target_modules, config.task_type) == (4, {"q_proj", "v_proj"}, "CAUSAL_LM")
    whole = tuners["svdiff"].prepare_model(args("svdiff"), LLAMA.fresh())  # has no r
    assert "down_proj" in {name.rpartition(".")[2] for name, m in whole.named_modules() if hasattr(m, "base_layer")}


def test_further_options_come_from_the_environment(tuners: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPECTUNE_ADAPTER", "{r: 2, columns: bottom}")
    config = tuners["spectral_a"].prepare_model(args("spectral_a", target_regex=".*q_proj"), LLAMA.fresh()).peft_config
    assert (config["default"].r, config["default"].columns) == (2, "bottom")
    monkeypatch.setenv("SPECTUNE_ADAPTER", "r=2")
    with pytest.raises(SpectuneError, match="SPECTUNE_ADAPTER='r=2': must be options with values"):
        tuners["spectral_a"].prepare_model(args("spectral_a"), LLAMA.fresh())
