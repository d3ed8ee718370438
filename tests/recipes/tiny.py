"""Tiny pretrained models with tokenizers, as folders, and data files to train them on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers as tf
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from tests.models import vit_targets

WORDS = [f"w{i}" for i in range(40)] + [
    "good",
    "bad",
    "Question",
    "Answer",
    ":",
    "####",
    "user",
    "User",
    "Assistant",
    "1",
    "2",
]


def tokenizer(pairs: bool = False) -> Any:
    """A tokenizer of whole words, the special tokens first."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate([*special, *WORDS])}, "[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return tf.PreTrainedTokenizerFast(
        tokenizer_object=made,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        eos_token="[SEP]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"]
        if pairs
        else ["input_ids", "attention_mask"],
    )


def save(model: Any, folder: Path, with_tokenizer: bool = True) -> str:
    model.save_pretrained(folder)
    if with_tokenizer:
        tokenizer().save_pretrained(folder)
    return str(folder)


def bert(folder: Path) -> str:
    torch.manual_seed(0)
    words = tokenizer(pairs=True)
    words._tokenizer.post_processor = processors.TemplateProcessing(
        "[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1", [("[CLS]", 2), ("[SEP]", 3)]
    )
    config = tf.BertConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=64,
        max_position_embeddings=64, initializer_range=0.2,
    )  # fmt: skip
    tf.BertModel(config).save_pretrained(folder)
    words.save_pretrained(folder)
    return str(folder)


def llama(folder: Path) -> str:
    torch.manual_seed(0)
    config = tf.LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=64, pad_token_id=0, eos_token_id=3, bos_token_id=2, max_position_embeddings=128,
        initializer_range=0.2,
    )  # fmt: skip
    return save(tf.LlamaForCausalLM(config), folder)


def vit(folder: Path) -> str:
    torch.manual_seed(0)
    config = tf.ViTConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=8, patch_size=4,
        num_labels=3, initializer_range=0.2,
    )  # fmt: skip
    return save(tf.ViTForImageClassification(config), folder, False)


def reviews(path: Path, count: int = 24) -> str:
    """Texts whose first word tells the class."""
    rows = [
        {"text": f"{('bad', 'good')[i % 2]} w{i % 7} w{i % 5}", "label": ("no", "yes")[i % 2]} for i in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def sums(path: Path, count: int = 16) -> str:
    """Questions with answers in GSM8K's form."""
    rows = [{"question": f"w{i} w{i + 1}", "answer": f"w{i} #### {1 + i % 2}"} for i in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def squares(path: Path, count: int = 24) -> str:
    """Dark and bright pictures of 8 x 8 pixels, in three channels."""
    noise = np.random.default_rng(0).integers(0, 60, (count, 8, 8, 3))
    labels = np.arange(count) % 2
    pixels = (noise + 180 * labels[:, None, None, None]).astype(np.uint8)
    np.savez(path, x_train=pixels, y_train=labels, x_test=pixels[:8], y_test=labels[:8])
    return str(path)


def picture(i: int) -> Any:
    """A dark or a bright picture of 8 x 8 pixels."""
    noise = np.random.default_rng(i).integers(0, 120, (8, 8, 3)) + 120 * (i % 2)
    return Image.fromarray(noise.astype(np.uint8))


def text_run(folder: Path, **more: Any) -> dict[str, Any]:
    """The values of a small text run; `more` replaces whole keys, dicts are merged."""
    base: dict[str, Any] = {
        "recipe": "text_classification",
        "model": bert(folder / "bert"),
        "adapter": {"method": "spectral_a", "r": 2, "target_modules": ["query", "value"]},
        "data": {"train": reviews(folder / "train.jsonl"), "validation": reviews(folder / "validation.jsonl", 8)},
        "training": {"steps": 6, "batch_size": 4, "learning_rate": 1e-2, "save_every": 2},
    }
    return merged(base, more)


def lm_run(folder: Path, **more: Any) -> dict[str, Any]:
    base: dict[str, Any] = {
        "recipe": "causal_lm",
        "model": llama(folder / "llama"),
        "adapter": {"method": "spectral_a", "r": 2, "target_modules": ["q_proj", "v_proj"]},
        "data": {
            "train": sums(folder / "train.jsonl"),
            "test": sums(folder / "test.jsonl", 4),
            "prompt": "Question : {question} Answer :",
            "completion": " {answer}",
            "max_tokens": 32,
        },
        "evaluation": {"metrics": ["loss"], "max_new_tokens": 4},
        "training": {"steps": 4, "batch_size": 4, "learning_rate": 1e-2},
    }
    return merged(base, more)


def pairs(path: Path, count: int = 12) -> str:
    """Prompts, each with a better and a worse answer, and with one of them and its label."""
    rows = [
        {"prompt": f"Question : w{i} Answer :", "chosen": f" w{i} good", "rejected": " bad"}
        | {"completion": (" bad", f" w{i} good")[i % 2], "label": bool(i % 2)}
        for i in range(count)
    ]
    return lines(path, rows)


def lines(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def preference_run(folder: Path, **more: Any) -> dict[str, Any]:
    base: dict[str, Any] = {
        "recipe": "preference",
        "model": llama(folder / "llama"),
        "adapter": {"method": "spectral_a", "r": 2, "target_modules": ["q_proj", "v_proj"]},
        "data": {"train": pairs(folder / "train.jsonl"), "test": pairs(folder / "test.jsonl", 5)},
        "evaluation": {"batch_size": 4, "max_new_tokens": 4},
        "training": {"steps": 6, "batch_size": 4, "learning_rate": 1e-2, "save_every": 2},
    }
    return merged(base, more)


def reward_run(folder: Path, **more: Any) -> dict[str, Any]:
    base: dict[str, Any] = {
        "recipe": "reward",
        "model": llama(folder / "llama"),
        "adapter": {"method": "spectral_a", "r": 2, "target_modules": ["q_proj", "v_proj"]},
        "data": {
            "train": sums(folder / "train.jsonl"),
            "test": sums(folder / "test.jsonl", 4),
            "prompt": "Question : {question} Answer :",
        },
        "rewards": [{"reward": "regex", "pattern": "w[0-4]\\b"}],
        "group_size": 4,
        "generation": {"max_new_tokens": 4},
        "training": {"steps": 6, "batch_size": 8, "learning_rate": 1e-2, "save_every": 2},
    }
    return merged(base, more)


def image_run(folder: Path, **more: Any) -> dict[str, Any]:
    base: dict[str, Any] = {
        "recipe": "image_classification",
        "model": vit(folder / "vit"),
        "adapter": {"method": "spectral_a", "r": 2, "target_modules": list(vit_targets()[:2])},
        "data": {"train": squares(folder / "squares.npz")},
        "training": {"steps": 6, "batch_size": 4, "learning_rate": 1e-2, "save_every": 2},
    }
    return merged(base, more)


def merged(base: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    joined = {
        k: (
            merged(v, more[k])
            if isinstance(v, dict) and isinstance(more.get(k), dict) and k != "adapter"
            else more.get(k, v)
        )
        for k, v in base.items()
    }
    return joined | {k: v for k, v in more.items() if k not in base}
