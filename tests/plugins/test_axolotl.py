"""The axolotl plugin: `adapter: spectral_a` makes, resumes and refuses adapters as axolotl asks for them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from spectune import METHODS
from spectune.errors import SpectuneError

from ..models import MODELS, output
from ..tuner.conftest import train
from .stand_ins import AXOLOTL, with_tool


def test_a_plugin_beside_a_stand_in_is_forgotten_with_it() -> None:
    before = sys.modules.get("spectune.plugins.axolotl")
    with pytest.MonkeyPatch.context() as patch:
        with_tool(patch, "axolotl", **AXOLOTL)
    assert sys.modules.get("spectune.plugins.axolotl") is before


LLAMA = MODELS["llama"]


class Cfg(dict[str, Any]):
    """axolotl's DictDefault: what is not there is None."""

    def __getattr__(self, name: str) -> Any:
        return self.get(name)


@pytest.fixture
def plugin(monkeypatch: pytest.MonkeyPatch) -> Any:
    return with_tool(monkeypatch, "axolotl", **AXOLOTL).SpectunePlugin()


def test_every_method_is_an_adapter_of_axolotl(plugin: Any) -> None:
    capabilities = plugin.get_adapter_capabilities()
    assert [one.name for one in capabilities] == list(METHODS) and not any(one.lora_like for one in capabilities)
    assert plugin.load_adapter(None, Cfg(adapter="lora")) is None


def test_its_block_is_part_of_axolotl_s_configuration(plugin: Any) -> None:
    assert plugin.get_input_args() == "spectune.plugins.axolotl.SpectuneArgs"
    found = type(plugin).get_input_args.__globals__["SpectuneArgs"]
    assert found().spectune == {} and found(spectune={"r": 4}).spectune == {"r": 4}


def test_it_trains_saves_and_goes_on(plugin: Any, tmp_path: Path) -> None:
    cfg = Cfg(adapter="svft", lora_target_modules=["q_proj"], spectune={"pattern": "banded", "off_diagonals": 1})
    nothing, config = plugin.load_adapter(LLAMA.fresh(), cfg, config_only=True)
    assert nothing is None and config.target_modules == {"q_proj"}
    model, config = plugin.load_adapter(LLAMA.fresh(), cfg)
    assert (config.method, config.pattern, config.task_type) == ("svft", "banded", "CAUSAL_LM")
    train(model)
    model.save_pretrained(tmp_path)
    for inference in (False, True):
        again, config = plugin.load_adapter(LLAMA.fresh(), Cfg(cfg, lora_model_dir=str(tmp_path)), inference)
        assert config.pattern == "banded"
        assert any(p.requires_grad for p in again.parameters()) != inference
        torch.testing.assert_close(output(again.eval(), LLAMA.inputs()), output(model.eval(), LLAMA.inputs()))
    linear, _ = plugin.load_adapter(LLAMA.fresh(), Cfg(adapter="svdiff", lora_target_linear=True))
    assert "down_proj" in {name.rpartition(".")[2] for name, m in linear.named_modules() if hasattr(m, "base_layer")}


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"lora_r": 8}, "lora_r is for a LoRA, and adapter is spectral_a. Use the block `spectune:`."),
        ({"spectune": {"rr": 8}}, "unexpected keyword argument 'rr'"),
    ],
)
def test_a_wrong_option_is_refused_in_one_line(plugin: Any, more: dict[str, Any], said: str) -> None:
    with pytest.raises(SpectuneError) as refusal:
        plugin.load_adapter(LLAMA.fresh(), Cfg(adapter="spectral_a", lora_target_modules=["q_proj"], **more))
    assert said in str(refusal.value)
