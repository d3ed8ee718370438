"""The vLLM plugin, against vLLM's interface: a name becomes an exact LoRA in the user's cache, once."""

from __future__ import annotations

import asyncio
import logging
import re
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model

from spectune import SpectralConfig
from spectune.checkpoint import read_adapter_folder
from spectune.errors import SpectuneError
from spectune.plugins import served

from ..models import MODELS, output
from ..tuner.conftest import train
from .stand_ins import LoRARequest, LoRAResolver, LoRAResolverRegistry, get_adapter_absolute_path, with_tool

LLAMA = MODELS["llama"]
NUMBERS: dict[str, Any] = {"r": 8, "target_modules": ["q_proj", "v_proj"]}


def saved(place: Path, base: Path | None = None, **options: Any) -> Any:
    config = SpectralConfig(**{**NUMBERS, **options})
    model = get_peft_model(LLAMA.fresh(), config)
    model.peft_config["default"].base_model_name_or_path = str(base) if base else None
    train(model)
    model.save_pretrained(place)
    return model.eval()


@pytest.fixture
def adapters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    LLAMA.fresh().save_pretrained(tmp_path / "base")  # type: ignore[operator]
    (tmp_path / "adapters").mkdir()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("SPECTUNE_VLLM_ADAPTERS", str(tmp_path / "adapters"))
    return tmp_path / "adapters"


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> Any:
    table = LoRAResolverRegistry()
    request = {"LoRARequest": LoRARequest}
    resolver = {"LoRAResolver": LoRAResolver, "LoRAResolverRegistry": table}
    utils = {"get_adapter_absolute_path": get_adapter_absolute_path}
    plugin = with_tool(
        monkeypatch, "vllm", vllm__lora__request=request, vllm__lora__resolver=resolver, vllm__lora__utils=utils
    )
    return plugin, table


def resolve(registry: Any, adapters: Path, name: str) -> Any:
    plugin, table = registry
    plugin.register()
    return asyncio.run(table.resolvers["spectune"].resolve_lora(str(adapters.parent / "base"), name))


def test_a_request_gets_the_exact_lora(registry: Any, adapters: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    tuned = saved(adapters / "poet")
    found = resolve(registry, adapters, "poet")
    assert found.lora_name == "poet" and found.lora_int_id > 0
    assert Path(found.lora_path).parent == adapters.parent / "cache" / "spectune" / "served"
    as_lora = PeftModel.from_pretrained(LLAMA.fresh(), found.lora_path).eval()
    torch.testing.assert_close(output(as_lora, LLAMA.inputs()), output(tuned, LLAMA.inputs()), rtol=0, atol=1e-4)
    assert "poet: is a LoRA of rank 16: --max-lora-rank 16" in caplog.text


def test_it_is_written_once_and_again_for_other_numbers(
    registry: Any, adapters: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, export = [], served.export_lora
    monkeypatch.setattr(served, "export_lora", lambda *a, **k: calls.append(a) or export(*a, **k))
    saved(adapters / "poet")
    first, second = (resolve(registry, adapters, "poet") for _ in range(2))
    assert first == second and len(calls) == 1
    saved(adapters / "poet", r=4)
    third = resolve(registry, adapters, "poet")
    assert len(calls) == 2 and third.lora_int_id != first.lora_int_id and third.lora_path != first.lora_path


@pytest.mark.parametrize("name", ["nobody", "../adapters/poet", ".", "", "/etc", "plain"])
def test_other_names_are_left_to_other_resolvers(registry: Any, adapters: Path, name: str) -> None:
    saved(adapters / "poet")
    registry[0].served(adapters / "poet", str(adapters.parent / "base")).rename(adapters / "plain")  # a LoRA
    assert resolve(registry, adapters, name) is None


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"modules_to_save": ["lm_head"]}, "vLLM refuses this adapter: lm_head was trained in full. Merge it ("),
        ({"bias": "spectune_only"}, "trains biases"),
    ],
)
def test_what_vllm_refuses_is_said_in_one_line(
    registry: Any, adapters: Path, options: dict[str, Any], said: str, caplog: pytest.LogCaptureFixture
) -> None:
    saved(adapters / "poet", **options)
    assert resolve(registry, adapters, "poet") is None
    assert said in caplog.text
    with pytest.raises(SpectuneError, match=re.escape(said)):
        registry[0].served(adapters / "poet", str(adapters.parent / "base"))


def test_what_was_trained_in_full_is_left_out_with_a_word_when_asked(
    registry: Any, adapters: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPECTUNE_VLLM_DROP", "1")
    saved(adapters / "poet", modules_to_save=["lm_head"])
    lora = read_adapter_folder(resolve(registry, adapters, "poet").lora_path)
    assert "poet: modules that were trained in full are left out, so answers differ" in caplog.text
    assert lora.names and all(".lora_" in name for name in lora.names) and not lora.config["modules_to_save"]


def test_vllm_finds_the_plugin_by_its_entry_point() -> None:
    points = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    assert '[project.entry-points."vllm.general_plugins"]\nspectune = "spectune.plugins.vllm:register"' in points
    assert callable(import_module("spectune.plugins.vllm").register)  # without vLLM


def test_without_its_variable_the_plugin_does_nothing(registry: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    plugin, table = registry
    monkeypatch.delenv("SPECTUNE_VLLM_ADAPTERS", raising=False)
    plugin.register()
    assert table.resolvers == {}
    monkeypatch.setenv("SPECTUNE_VLLM_ADAPTERS", "/nowhere/at/all")
    with pytest.raises(SpectuneError, match="SPECTUNE_VLLM_ADAPTERS=/nowhere/at/all: is not a folder"):
        plugin.register()


def test_a_path_leads_to_the_lora_wherever_vllm_takes_one(
    registry: Any, adapters: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SPECTUNE_VLLM_ADAPTERS")  # --lora-modules names the folder itself
    tuned = saved(adapters / "poet", base=adapters.parent / "base")
    registry[0].register()
    utils = import_module("vllm.lora.utils")
    lora = Path(utils.get_adapter_absolute_path(str(adapters / "poet")))
    assert lora.parent == served.cache_folder()
    as_lora = PeftModel.from_pretrained(LLAMA.fresh(), lora).eval()
    torch.testing.assert_close(output(as_lora, LLAMA.inputs()), output(tuned, LLAMA.inputs()), rtol=0, atol=1e-4)
    for other in (lora, adapters, Path("no/such/folder")):  # a LoRA, a folder without an adapter, a hub name
        assert utils.get_adapter_absolute_path(str(other)) == str(other)
    saved(adapters / "whole", base=adapters.parent / "base", modules_to_save=["lm_head"])
    with pytest.raises(SpectuneError, match="whole: vLLM refuses this adapter: lm_head was trained in full"):
        utils.get_adapter_absolute_path(str(adapters / "whole"))


def test_a_vllm_without_that_function_is_left_alone(registry: Any, caplog: pytest.LogCaptureFixture) -> None:
    registry[0].lead_to_loras(object())
    assert "write LoRAs before, spectune export FOLDER -o LORA" in caplog.text
