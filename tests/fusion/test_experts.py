"""Adapters of experts are fused by the rule that keeps them spectral; what would become a LoRA is refused first."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from typer.testing import CliRunner

from spectune import SpectralConfig, fuse, merge_checkpoint
from spectune.cli.app import app
from spectune.errors import AdapterError

from ..experts import TARGETS, fresh, logits


def saved(kind: str, folder: Path, name: str, columns: list[int], **options: Any) -> Path:
    given = {"r": 2, "target_modules": [], "target_parameters": TARGETS} | options
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(columns[0])
        config = SpectralConfig(method="spectral_a", columns=columns, init_weights=False, **given)
        get_peft_model(fresh(kind), config).save_pretrained(folder / name)
    return folder / name


@pytest.mark.parametrize("kind", ["mixtral", "gpt-oss"])
def test_experts_on_disjoint_columns_are_fused_exactly(kind: str, tmp_path: Path) -> None:
    fresh(kind).save_pretrained(tmp_path / "base")
    parts = [saved(kind, tmp_path, name, columns) for name, columns in {"a": [0, 1], "b": [3, 2]}.items()]
    fuse(parts, base=tmp_path / "base", weights=1).save(tmp_path / "both")
    both = logits(PeftModel.from_pretrained(fresh(kind), tmp_path / "both").eval())
    one_by_one = fresh(kind)
    for part in parts:  # disjoint directions: the sum of the updates, up to what they share in second order
        one_by_one = PeftModel.from_pretrained(fresh(kind), part, adapter_name="one").eval()
        assert not torch.allclose(logits(one_by_one), both, rtol=1e-3)
    pair = PeftModel.from_pretrained(fresh(kind), parts[0], adapter_name="a")
    pair.load_adapter(str(parts[1]), adapter_name="b")
    pair.base_model.set_adapter(["a", "b"])
    torch.testing.assert_close(logits(pair.eval()), both, rtol=1e-4, atol=2e-6)
    merge_checkpoint(tmp_path / "base", tmp_path / "both", tmp_path / "merged")
    merged = type(fresh(kind)).from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(logits(merged), both, rtol=1e-4, atol=2e-6)


def test_adapters_of_other_layers_name_the_parameters_that_they_have_together(tmp_path: Path) -> None:
    fresh("mixtral").save_pretrained(tmp_path / "base")
    first = saved("mixtral", tmp_path, "a", [0, 1], target_parameters=TARGETS[:1], layers_to_transform=[0])
    second = saved("mixtral", tmp_path, "b", [2, 3], target_parameters=TARGETS[1:], target_modules=["q_proj"])
    fuse([first, second], base=tmp_path / "base", weights=1).save(tmp_path / "both")
    config = json.loads((tmp_path / "both" / "adapter_config.json").read_text())
    stem = "model.layers.{}.mlp.experts."
    down, up = [stem.format(0) + "down_proj", stem.format(1) + "down_proj"], stem.format(0) + "gate_up_proj"
    assert config["target_parameters"] == [down[0], up, down[1]] and "expert" not in config["target_modules"]
    loaded = PeftModel.from_pretrained(fresh("mixtral"), tmp_path / "both").eval()
    assert sum(name.endswith(".spectune_adapter.default") for name, _ in loaded.named_modules()) == 2 + 3 * 4


def test_what_leaves_out_an_expert_is_named(tmp_path: Path) -> None:
    fresh("mixtral").save_pretrained(tmp_path / "base")
    left = {"exclude_modules": ["experts.down_proj.1"], "target_parameters": TARGETS[1:]}
    parts = [saved("mixtral", tmp_path, "a", [0, 1], **left), saved("mixtral", tmp_path, "b", [2, 3], **left)]
    fuse(parts, base=tmp_path / "base", weights=1).save(tmp_path / "both")
    PeftModel.from_pretrained(fresh("mixtral"), tmp_path / "both")
    other = saved("mixtral", tmp_path, "c", [2, 3], **left, layers_to_transform=[0])
    with pytest.raises(AdapterError, match=r"experts\.down_proj\.1: the adapters leave out this expert"):
        fuse([parts[0], other], base=tmp_path / "base", weights=1).save(tmp_path / "no")
    assert not (tmp_path / "no").exists()


def test_a_lora_of_experts_is_refused_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fresh("mixtral").save_pretrained(tmp_path / "base")
    parts = [saved("mixtral", tmp_path, name, columns) for name, columns in {"a": [0, 1], "b": [2, 3]}.items()]
    together = fuse(parts, base=tmp_path / "base", weights=1)
    with pytest.raises(AdapterError, match=r"as_lora writes a LoRA, and \S+experts\.\w+\.0 is an expert"):
        together.save(tmp_path / "no", as_lora=True)
    monkeypatch.setattr(import_module("spectune.fusion.fuse"), "common_base", None)
    for rule in ("average", "task_singular", "orthogonal"):
        with pytest.raises(AdapterError, match=rf"a: rule '{rule}' writes a LoRA, and \S+ is an expert"):
            fuse(parts, base=tmp_path / "base", rule=rule)
    words = ["fuse", *map(str, parts), "-o", str(tmp_path / "no"), "--as-lora"]
    assert "--as-lora writes a LoRA" in str(CliRunner().invoke(app, words).exception)
    assert not (tmp_path / "no").exists()
