"""A base whose vocabulary was resized before training: LoRA and merged checkpoint have its rows, or are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from peft import PeftModel, get_peft_model
from torch import nn

from spectune import SpectralConfig, export_lora, merge_checkpoint
from spectune.checkpoint import open_checkpoint
from spectune.errors import ExportError

from ..models import MODELS
from ..tuner.conftest import train

pytestmark = [
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`"),
    pytest.mark.filterwarnings("ignore:Model with `tie_word_embeddings=True`"),
]
OLD, NEW = 64, 67
WORDS = torch.tensor([[3, 64, 5, 66, 65, 9]])  # with new ones
BOTH, HEAD, INPUT = ["embed_tokens", "lm_head"], ["lm_head"], ["embed_tokens"]


def base_folder(root: Path, tied: bool) -> Path:
    config: Any = MODELS["llama"].fresh().config
    config.tie_word_embeddings = tied
    torch.manual_seed(0)
    tf.LlamaForCausalLM(config).save_pretrained(root / "base")
    return root / "base"


def resized(base: Path, kind: Any = tf.LlamaForCausalLM) -> Any:
    model = kind.from_pretrained(base).eval()
    model.resize_token_embeddings(NEW)
    return model


def tuned(model: nn.Module, folder: Path, **options: Any) -> PeftModel:
    config = SpectralConfig(**{"r": 3, "target_modules": ["q_proj"], **options})
    adapted = get_peft_model(model, config)
    train(adapted)
    adapted.eval().save_pretrained(folder)
    return adapted


def logits(model: nn.Module, **more: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=WORDS, **more).logits


def assert_close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=0, atol=5e-5)


@pytest.mark.parametrize("whole", [None, BOTH, HEAD, INPUT], ids=["auto", "both", "head", "input"])
@pytest.mark.parametrize("tied", [False, True], ids=["apart", "tied"])
def test_a_resized_vocabulary_is_merged_and_exported(tied: bool, whole: list[str] | None, tmp_path: Path) -> None:
    base = base_folder(tmp_path, tied)
    model = tuned(resized(base), tmp_path / "adapter", modules_to_save=whole, task_type="CAUSAL_LM")
    live = logits(model)
    merge_checkpoint(base, tmp_path / "adapter", tmp_path / "merged")
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config["vocab_size"] == NEW and config["tie_word_embeddings"] is (tied and whole is None)
    names = open_checkpoint(tmp_path / "merged").names
    assert not [name for name in names if "modules_to_save" in name or "original_module" in name]
    assert_close(logits(tf.LlamaForCausalLM.from_pretrained(tmp_path / "merged").eval()), live)
    export_lora(model, tmp_path / "from live")
    export_lora(tmp_path / "adapter", tmp_path / "from folder", base_model=base)
    for folder in ("from live", "from folder"):
        served = PeftModel.from_pretrained(resized(base), tmp_path / folder).eval()
        assert_close(logits(served), live)


@pytest.mark.parametrize("tied", [False, True], ids=["apart", "tied"])
def test_an_adapted_embedding_is_merged_into_its_resized_weight(tied: bool, tmp_path: Path) -> None:
    base = base_folder(tmp_path, tied)
    options: dict[str, Any] = {"target_modules": ["q_proj", "embed_tokens"], "modules_to_save": None if tied else HEAD}
    live = logits(tuned(resized(base), tmp_path / "adapter", **options))
    merge_checkpoint(base, tmp_path / "adapter", tmp_path / "merged")
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["vocab_size"] == NEW
    assert_close(logits(tf.LlamaForCausalLM.from_pretrained(tmp_path / "merged").eval()), live)


def test_rows_that_nothing_has_are_refused_in_one_line(tmp_path: Path) -> None:
    base = base_folder(tmp_path, False)
    tuned(resized(base), tmp_path / "adapter", target_modules=["q_proj", "embed_tokens"], task_type="CAUSAL_LM")
    line = r"resized to 67 rows, but lm_head has 64 in the base and is not in the adapter. Train with 'lm_head' in"
    with pytest.raises(ExportError, match=line):
        merge_checkpoint(base, tmp_path / "adapter", tmp_path / "merged")
    with pytest.raises(ExportError, match=line):
        export_lora(tmp_path / "adapter", tmp_path / "lora", base_model=base)
    assert not (tmp_path / "merged").exists() and not (tmp_path / "lora").exists()


def test_a_model_whose_ties_mean_more_keeps_them(tmp_path: Path) -> None:
    """T5 scales its outputs by `tie_word_embeddings`, so its weights cannot be stored apart."""
    MODELS["t5"].fresh().save_pretrained(tmp_path / "base")
    model = resized(tmp_path / "base", tf.T5ForConditionalGeneration)
    live = logits(tuned(model, tmp_path / "adapter", target_modules=["q"]), decoder_input_ids=WORDS)
    merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    merged = tf.T5ForConditionalGeneration.from_pretrained(tmp_path / "merged").eval()
    assert merged.config.vocab_size == NEW and "lm_head.weight" not in open_checkpoint(tmp_path / "merged").names
    assert_close(logits(merged, decoder_input_ids=WORDS), live)


def test_the_size_is_written_where_the_class_has_it(tmp_path: Path) -> None:
    vision = tf.CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4
    )
    text: Any = MODELS["llama"].fresh().config
    tf.LlavaForConditionalGeneration(
        tf.LlavaConfig(vision_config=vision, text_config=text, image_token_id=63)
    ).save_pretrained(tmp_path / "base")
    model = resized(tmp_path / "base", tf.LlavaForConditionalGeneration)
    live = logits(tuned(model, tmp_path / "adapter", modules_to_save=BOTH, target_modules=["o_proj"]))
    merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config["text_config"]["vocab_size"] == NEW and config.get("vocab_size", NEW) == NEW
    assert_close(logits(tf.LlavaForConditionalGeneration.from_pretrained(tmp_path / "merged").eval()), live)


def test_an_unchanged_vocabulary_leaves_the_config_alone(tmp_path: Path) -> None:
    base = base_folder(tmp_path, False)
    tuned(tf.LlamaForCausalLM.from_pretrained(base), tmp_path / "adapter", modules_to_save=BOTH)
    merge_checkpoint(base, tmp_path / "adapter", tmp_path / "merged")
    assert (tmp_path / "merged" / "config.json").read_text() == (base / "config.json").read_text()
