"""Models that transformers renames, splits or joins on load are merged and exported like any other."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from spectune import SpectralConfig, export_lora, fuse, merge_checkpoint
from spectune.checkpoint import open_checkpoint
from spectune.checkpoint.live_names import live_view
from spectune.surveys.adapter_source import open_adapter

from .renamed import LEFT, RENAMED, logits

pytestmark = pytest.mark.filterwarnings("ignore:target_modules=.all-linear. leaves out the experts:UserWarning")

# Two orders of the same float32 sums over two layers, on logits of size 1 to 10.
TOLERANCE = 5e-5
# As transformers calls them in a ViT now, and before it renamed them.
QUERIES = r".*\.(q_proj|query)"


def adapted(name: str, folder: Path, shard: str = "5GB", **options: Any) -> tuple[Any, torch.Tensor]:
    """Save a base and an adapter; get the class, and the logits of the live adapter, which differ from the base's."""
    build, sees = RENAMED[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        base = build().eval()
        base.save_pretrained(folder / "base", max_shard_size=shard)
        plain = logits(base, sees)
        options = {"target_modules": "all-linear", "exclude_modules": LEFT.get(name)} | options
        model: Any = get_peft_model(base, SpectralConfig(r=2, init_weights=False, **options)).eval()
    model.save_pretrained(folder / "adapter")
    live = logits(model, sees)
    assert (live - plain).abs().max() > 0.01
    return type(base), live


@pytest.mark.parametrize("name", list(RENAMED))
def test_a_renamed_model_is_merged_under_the_names_of_its_files(name: str, tmp_path: Path) -> None:
    kind, live = adapted(name, tmp_path, shard="20KB")
    merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    loaded = kind.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(logits(loaded, RENAMED[name][1]), live, rtol=0, atol=TOLERANCE)
    base, merged = (open_checkpoint(tmp_path / folder) for folder in ("base", "merged"))
    assert merged.shapes == base.shapes
    assert [path.name for path in sorted((tmp_path / "base").glob("*.safetensors"))] == [
        path.name for path in sorted((tmp_path / "merged").glob("*.safetensors"))
    ]


@pytest.mark.parametrize("name", ["vit", "dinov2-swiglu", "mixtral"])
def test_a_renamed_model_is_exported_to_lora(name: str, tmp_path: Path) -> None:
    kind, live = adapted(name, tmp_path)
    export_lora(tmp_path / "adapter", tmp_path / "lora", base_model=tmp_path / "base")
    loaded: Any = PeftModel.from_pretrained(kind.from_pretrained(tmp_path / "base"), tmp_path / "lora").eval()
    torch.testing.assert_close(logits(loaded, RENAMED[name][1]), live, rtol=0, atol=TOLERANCE)


def test_one_half_of_a_joined_matrix_is_changed_alone(tmp_path: Path) -> None:
    _, _ = adapted("dinov2-swiglu", tmp_path, target_modules=r".*layer.*(gate_proj|weights_in)")
    merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    before, after = (load_file(tmp_path / folder / "model.safetensors") for folder in ("base", "merged"))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert len(changed) == 2 and all("weights_in.weight" in name for name in changed)
    if any("gate_proj" in name for name in open_checkpoint(tmp_path / "adapter" / "adapter_model.safetensors").names):
        for name in changed:
            first, second = (after[name] - before[name]).chunk(2)
            assert first.abs().max() > 0.01 and not second.any()


def test_renamed_modules_that_were_trained_in_full_are_merged(tmp_path: Path) -> None:
    kind, live = adapted("vit", tmp_path, target_modules=QUERIES, modules_to_save=["classifier", "fc2", "output.dense"])
    done = merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    assert "classifier" in done.copied
    torch.testing.assert_close(logits(kind.from_pretrained(tmp_path / "merged"), True), live, rtol=0, atol=TOLERANCE)


def test_the_legacy_names_of_layer_norms_stay_in_the_file(tmp_path: Path) -> None:
    """BERT's first files call them gamma and beta."""
    config = tf.BertConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, vocab_size=64, num_labels=3
    )
    torch.manual_seed(0)
    base = tf.BertForSequenceClassification(config).eval()
    base.save_pretrained(tmp_path / "base")
    path = tmp_path / "base" / "model.safetensors"
    old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    tensors = load_file(path)
    for new, legacy in old.items():
        tensors = {name.replace(new, legacy): tensor for name, tensor in tensors.items()}
    save_file(tensors, path, {"format": "pt"})
    options = {"target_modules": ["query"], "modules_to_save": ["LayerNorm"], "init_weights": False}
    model: Any = get_peft_model(base, SpectralConfig(r=2, **options)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                parameter.add_(0.5)
    model.save_pretrained(tmp_path / "adapter")
    merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    assert load_file(tmp_path / "merged" / "model.safetensors").keys() == tensors.keys()
    merged = tf.BertForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(logits(merged, False), logits(model, False), rtol=0, atol=TOLERANCE)


def test_renamed_adapters_are_fused_and_surveyed_on_their_base(tmp_path: Path) -> None:
    kind, live = adapted("vit", tmp_path, target_modules=QUERIES)
    shutil.copytree(tmp_path / "adapter", tmp_path / "again")
    parts = [tmp_path / "adapter", tmp_path / "again"]
    fuse(parts, rule="average", base=tmp_path / "base").save(tmp_path / "fused", as_lora=True)
    fused: Any = PeftModel.from_pretrained(kind.from_pretrained(tmp_path / "base"), tmp_path / "fused").eval()
    torch.testing.assert_close(logits(fused, True), live, rtol=0, atol=TOLERANCE)
    assert all(layer.W_OI is not None for layer in open_adapter(tmp_path / "adapter", tmp_path / "base").updates())
    assert all(layer.W_OI is not None for layer in open_adapter(tmp_path / "fused", tmp_path / "base").updates())


@pytest.mark.parametrize("name", ["dinov2-swiglu", "mixtral"])
def test_joining_and_splitting_go_both_ways(name: str, tmp_path: Path) -> None:
    adapted(name, tmp_path)
    base = open_checkpoint(tmp_path / "base")
    with torch.device("meta"):
        model = RENAMED[name][0]()
    view = live_view(base, model)
    assert {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()} == view.checkpoint.shapes
    for group, names in view.stored(set(view.groups)):
        stored = group.to_stored({name: view.checkpoint.tensor(name) for name in names})
        assert all(torch.equal(tensor, base.tensor(name)) for name, tensor in stored.items())
        assert set(stored) == set(group.stored)
