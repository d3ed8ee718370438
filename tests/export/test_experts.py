"""Experts in an exported LoRA: PEFT reads them from its own layout, and gives the outputs of the spectral adapter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model

from spectune import METHODS, SpectralConfig
from spectune.errors import ExportError
from spectune.export import export_lora
from spectune.tuner import load_attached

from ..experts import MODELS, TARGETS, fresh, logits
from ..tuner.conftest import OPTIONS, train


def adapted(kind: str, method: str = "spectral_a", **more: Any) -> PeftModel:
    options = {"target_modules": ["q_proj"], "target_parameters": TARGETS, **OPTIONS[method], **more}
    model = get_peft_model(fresh(kind), SpectralConfig(method=method, **options)).eval()
    train(model)
    return model


def through_peft(kind: str, folder: Path) -> torch.Tensor:
    return logits(PeftModel.from_pretrained(fresh(kind), folder).eval())


def assert_near(theirs: torch.Tensor, ours: torch.Tensor) -> None:
    # Two roads to the same logits in float32, and the router's weights amplify a little.
    torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("kind", list(MODELS))
@pytest.mark.parametrize("targets", [TARGETS, TARGETS[:1], TARGETS[1:]], ids=["both", "gate_up", "down"])
def test_peft_gives_the_logits_of_the_spectral_adapter(kind: str, targets: list[str], tmp_path: Path) -> None:
    model = adapted(kind, target_parameters=targets)
    done = export_lora(model, tmp_path / "lora")
    assert done.proof.max_relative_error < 1e-6
    assert done.proof.logits.skipped is None and done.proof.logits.layers_run == 2 + 2 * 4 * len(targets)
    assert (logits(model) - logits(fresh(kind))).abs().max() > 1e-4
    assert_near(through_peft(kind, tmp_path / "lora"), logits(model))


@pytest.mark.parametrize("method", list(METHODS))
def test_every_method_is_exact(method: str, tmp_path: Path) -> None:
    model = adapted("gpt-oss", method, target_modules=[])
    export_lora(model, tmp_path / "lora")
    assert_near(through_peft("gpt-oss", tmp_path / "lora"), logits(model))


# PEFT looks for these names among modules only, says so, and then uses them for the parameters all the same.
@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match:RuntimeWarning")
def test_parameters_of_other_ranks_and_a_router_are_exact(tmp_path: Path) -> None:
    ranks = {"down_proj": 1, "layers.1.mlp.experts.gate_up_proj": 2}
    model = adapted("mixtral", target_parameters=[*TARGETS, "gate.weight"], rank_pattern=ranks)
    export_lora(model, tmp_path / "lora")
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert config["target_parameters"] == ["experts.down_proj", "experts.gate_up_proj", "gate.weight"]
    assert_near(through_peft("mixtral", tmp_path / "lora"), logits(model))


@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match:RuntimeWarning")
@pytest.mark.parametrize("more", [{}, {"rank_pattern": {"down_proj": 1}}, {"target_modules": ["q_proj"]}])
def test_the_lora_is_also_loaded_where_the_file_of_a_stranger_is_bounded(more: dict[str, Any], tmp_path: Path) -> None:
    model = adapted("mixtral", **{"target_modules": [], **more})
    export_lora(model, tmp_path / "lora", pad=False)  # so that the file names the ranks
    assert_near(logits(load_attached(fresh("mixtral"), tmp_path / "lora").eval()), logits(model))


def test_layers_without_experts_are_not_named(tmp_path: Path) -> None:
    model = adapted("mixtral", layers_to_transform=[1], exclude_modules=["experts.down_proj.2"])
    export_lora(model, tmp_path / "lora")
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    stem = "model.layers.1.mlp.experts."
    assert config["target_parameters"] == [stem + "down_proj", stem + "gate_up_proj"]
    assert_near(through_peft("mixtral", tmp_path / "lora"), logits(model))


def test_a_saved_adapter_is_exported_on_a_model(tmp_path: Path) -> None:
    model = adapted("llama4", target_modules=[])
    model.save_pretrained(tmp_path / "adapter")
    export_lora(tmp_path / "adapter", tmp_path / "lora", base_model=fresh("llama4"))
    assert_near(through_peft("llama4", tmp_path / "lora"), logits(model))


def test_a_merged_expert_is_refused(tmp_path: Path) -> None:
    model = adapted("mixtral", target_modules=[])
    model.merge_adapter()
    with pytest.raises(ExportError, match=r"experts\.\w+\.0: default is merged into the base"):
        export_lora(model, tmp_path / "lora")
