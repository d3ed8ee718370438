"""The SGLang plugin, against SGLang's interface: where it reads the path of a LoRA, a Spectune folder becomes one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from spectune.errors import SpectuneError
from spectune.plugins import served

from ..models import MODELS, output
from .stand_ins import HookRegistry, HookType, LoRAConfig, with_tool
from .test_vllm import saved

LLAMA = MODELS["llama"]


@pytest.fixture
def config_class(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    LLAMA.fresh().save_pretrained(tmp_path / "base")  # type: ignore[operator]
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    fresh: Any = type("LoRAConfig", (LoRAConfig,), {})  # of this test alone, since the hook stays
    hooks = {"HookRegistry": HookRegistry, "HookType": HookType}
    parts: dict[str, Any] = {"sglang__srt__plugins__hook_registry": hooks}
    plugin = with_tool(monkeypatch, "sglang", **parts, sglang__srt__lora__lora_config={"LoRAConfig": fresh})
    plugin.register()
    return fresh


def test_a_spectune_folder_is_read_as_its_lora(config_class: Any, tmp_path: Path) -> None:
    tuned = saved(tmp_path / "poet", base=tmp_path / "base")
    config = config_class(str(tmp_path / "poet"), base_vocab_size=64)
    assert Path(config.path).parent == served.cache_folder() and config.more == {"base_vocab_size": 64}
    as_lora = PeftModel.from_pretrained(LLAMA.fresh(), config.path).eval()
    torch.testing.assert_close(output(as_lora, LLAMA.inputs()), output(tuned, LLAMA.inputs()), rtol=0, atol=1e-4)
    assert config_class(path=str(tmp_path / "poet")).path == config.path
    for other in (config.path, str(tmp_path), "some/hub-name"):  # a LoRA, another folder, a name on the hub
        assert config_class(other).path == other
    sent = config_class(config_dict={"r": 8}, base_vocab_size=64)  # of an adapter that came over the wire
    assert (sent.path, sent.config_dict) == (None, {"r": 8})


def test_what_sglang_refuses_is_said_in_one_line(config_class: Any, tmp_path: Path) -> None:
    saved(tmp_path / "whole", base=tmp_path / "base", modules_to_save=["lm_head"])
    with pytest.raises(SpectuneError, match="whole: SGLang refuses this adapter: lm_head was trained in full"):
        config_class(str(tmp_path / "whole"))


def test_sglang_finds_the_plugin_by_its_entry_point() -> None:
    points = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    assert '[project.entry-points."sglang.srt.plugins"]\nspectune = "spectune.plugins.sglang:register"' in points
