"""A LoRA cut to a share of its numbers: by energy over all layers, and by what its task would miss."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from spectune import SpectuneError
from spectune.checkpoint import read_lora
from spectune.errors import OptionError
from spectune.extraction import calibrated, resize_lora
from spectune.extraction.calibrate import directions_of, within_share
from spectune.recipes import parse_config
from spectune.runs import train_run
from spectune.surveys.direction_scores import scores_of
from spectune.training.yaml_file import write_yaml

from ..recipes import tiny


def base() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 5, bias=False))


@pytest.fixture
def tuned(tmp_path: Path) -> PeftModel:
    """A saved LoRA on two layers of unlike shapes, with random factors."""
    model = get_peft_model(base(), LoraConfig(r=4, lora_alpha=6, target_modules=["0", "2"], init_lora_weights=False))
    model.save_pretrained(tmp_path / "lora")
    return model


def batches() -> list[dict[str, Any]]:
    stream = torch.Generator().manual_seed(1)
    return [{"x": torch.randn(6, 12, generator=stream), "y": torch.randn(6, 5, generator=stream)} for _ in range(3)]


def loss(model: Any, batch: dict[str, Any]) -> torch.Tensor:
    found: torch.Tensor = (model(batch["x"]) - batch["y"]).square().mean()
    return found


def test_scores_are_those_of_the_whole_gradient(tuned: PeftModel, tmp_path: Path) -> None:
    source = read_lora(tmp_path / "lora")
    found = calibrated(tuned, source, batches(), loss)
    merged: Any = PeftModel.from_pretrained(base(), tmp_path / "lora").merge_and_unload()
    assert set(found) == {"0", "2"}
    wanted = {layer: torch.zeros(4) for layer in found}
    for batch in batches():
        weights = {layer: merged[int(layer)].weight.requires_grad_() for layer in found}
        gradients = torch.autograd.grad(loss(merged, batch), list(weights.values()))
        for layer, G_OI in zip(weights, gradients, strict=True):
            dW = read_lora(tmp_path / "lora").delta(layer)
            U, S, Vh = torch.linalg.svd(dW.left_OP * dW.core @ dW.right_QI, full_matrices=False)  # type: ignore[operator]
            wanted[layer] += ((U[:, :4].mT @ G_OI @ Vh[:4].mT).diagonal() * S[:4]).square()
    for layer, scores in found.items():
        torch.testing.assert_close(scores.float(), wanted[layer], rtol=1e-3, atol=1e-9)


def test_directions_stay_in_order_of_score_by_number() -> None:
    scores = {"a": torch.tensor([5.0, 1.0, 4.0]), "b": torch.tensor([6.0, 0.2, 0.1])}
    assert within_share(scores, {"a": 10, "b": 20}, 45) == {"a": [0, 2], "b": [0]}
    assert within_share(scores, {"a": 10, "b": 20}, 22) == {"a": [0, 2], "b": []}
    assert within_share(scores, {"a": 10, "b": 20}, 90) == {"a": [0, 1, 2], "b": [0, 1, 2]}
    with pytest.raises(OptionError, match="9 numbers are less than one direction of one layer, 10"):
        within_share(scores, {"a": 10, "b": 20}, 9)


@pytest.mark.parametrize("excluded", [None, ["4"], r"4"])
def test_a_layer_of_which_nothing_stays_is_left_out(tuned: PeftModel, tmp_path: Path, excluded: Any) -> None:
    config = tmp_path / "lora" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"exclude_modules": excluded}))
    scores = {"0": torch.tensor([1.0, 2.0, 3.0, 4.0]), "2": torch.zeros(4)}
    done = resize_lora(tmp_path / "lora", tmp_path / "cut", share=80 / 132, scores=scores)
    assert [(layer.rank, layer.lost == 1) for layer in done.layers] == [(4, False), (0, True)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        new = PeftModel.from_pretrained(base(), tmp_path / "cut")
    assert not hasattr(new.base_model.model[2], "lora_A") and hasattr(new.base_model.model[0], "lora_A")


def test_a_share_keeps_the_chosen_directions_and_nothing_else(tuned: PeftModel, tmp_path: Path) -> None:
    source = read_lora(tmp_path / "lora")
    scores = {"0": torch.tensor([0.0, 3.0, 0.0, 2.0]), "2": torch.tensor([0.0, 0.0, 1.0, 0.0])}
    done = resize_lora(tmp_path / "lora", tmp_path / "cut", share=0.42, scores=scores)
    new = PeftModel.from_pretrained(base(), tmp_path / "cut")
    assert [layer.rank for layer in done.layers] == [2, 1]
    assert read_lora(done.path).trained_count <= 0.42 * source.trained_count
    for layer, places in {"0": [1, 3], "2": [2]}.items():
        B_OK, A_KI = directions_of(source, layer)
        update: torch.Tensor = new.base_model.model[int(layer)].get_delta_weight("default")
        torch.testing.assert_close(update, (B_OK[:, places] @ A_KI[places]).float(), rtol=0, atol=1e-5)
    gone = next(layer for layer in done.layers if layer.name == "2")
    assert gone.cut == pytest.approx(gone.lost, abs=1e-6) and gone.cut > 0.5


@pytest.mark.parametrize("options", [{"share": 0.5, "rank": 2}, {"share": 0.0}, {"share": 1.5}, {"scores": {}}])
def test_a_share_that_means_nothing_is_refused(tuned: PeftModel, tmp_path: Path, options: dict[str, Any]) -> None:
    with pytest.raises(SpectuneError, match="share"):
        resize_lora(tmp_path / "lora", tmp_path / "cut", **options)
    assert not (tmp_path / "cut").exists()


@pytest.mark.slow
def test_a_run_tells_what_its_task_would_miss(tmp_path: Path) -> None:
    adapter = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["query", "value"]}
    trained = train_run(parse_config(tiny.text_run(tmp_path, adapter=adapter)), tmp_path / "run")
    told: list[tuple[int, int]] = []
    scores = scores_of(tmp_path / "run", tmp_path / "run", on_batch=lambda done, of: told.append((done, of)))
    assert set(scores) == set(read_lora(tmp_path / "run").layers) and told[-1][0] == told[-1][1]
    assert all(bool((score > 0).any()) for score in scores.values()), trained.result.losses


def test_of_a_layer_that_is_left_out_a_single_file_keeps_no_alpha(tmp_path: Path) -> None:
    stream = torch.Generator().manual_seed(0)
    tensors = {}
    for name, size in (("lora_unet_small", 0.01), ("lora_unet_large", 1.0)):
        tensors[f"{name}.lora_down.weight"] = size * torch.randn(2, 6, generator=stream)
        tensors[f"{name}.lora_up.weight"] = torch.randn(5, 2, generator=stream)
        tensors[f"{name}.alpha"] = torch.tensor(2.0)
    save_file(tensors, tmp_path / "old.safetensors")
    resize_lora(tmp_path / "old.safetensors", tmp_path / "new.safetensors", share=0.5)
    assert {name.partition(".")[0] for name in load_file(tmp_path / "new.safetensors")} == {"lora_unet_large"}


def test_a_lora_that_is_not_finite_is_refused(tmp_path: Path) -> None:
    tensors = {"a.lora_down.weight": torch.full((2, 6), float("nan")), "a.lora_up.weight": torch.ones(5, 2)}
    save_file(tensors, tmp_path / "old.safetensors")
    with pytest.raises(SpectuneError, match="a: the factors contain NaN or infinity"):
        resize_lora(tmp_path / "old.safetensors", tmp_path / "new.safetensors", share=0.5)


def test_calibration_wants_a_folder_of_the_runs_base(tuned: PeftModel, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.yaml").write_text(write_yaml(parse_config(tiny.text_run(tmp_path)).plain()))
    with pytest.raises(SpectuneError, match="calibration needs a PEFT folder, and this is a single file"):
        save_file(
            {"a.lora_down.weight": torch.ones(2, 6), "a.lora_up.weight": torch.ones(5, 2)}, tmp_path / "a.safetensors"
        )
        scores_of(tmp_path / "run", tmp_path / "a.safetensors")
    config = tmp_path / "lora" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": "other/base"}))
    with pytest.raises(SpectuneError, match=r"this LoRA is of other/base, and the run .* has"):
        scores_of(tmp_path / "run", tmp_path / "lora")
