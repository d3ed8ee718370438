"""Models and data of the small versions of published experiments: from pip packages, or made in a minute.

Each maker writes into a folder and gets name -> value for the `${name}` words of an experiment's YAML.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers as tf

from ..checkpoint import write_atomically
from ..checkpoint.run_folder import MODEL
from ..demo.demo import base_folder
from ..demo.languages import LANGUAGES, load_languages, write_languages
from ..errors import MissingExtraError
from ..recipes.table import parse_config
from ..runs.result import RESULT_FILE
from ..runs.train import run

# Digits that the vision transformer learns first, and those that are new to it afterwards. Chosen.
KNOWN_DIGITS, NEW_DIGITS = range(6), range(6, 10)
# Few-shot sizes: SVFT (arXiv 2405.19597) took 10 training images a class and 2 for validation; 2 of 4 classes would
# choose at random, so that 20 stand here.
SHOTS, HELD_OUT = 10, 20
SEED = 0


def languages(folder: Path) -> dict[str, str]:
    """Get all-MiniLM-L6-v2 and the task of telling 24 languages apart (Django's own translations)."""
    files = {f"languages_{split}": str(path) for split, path in write_languages(folder).items()}
    return {"minilm": str(base_folder())} | files


def digits(folder: Path) -> dict[str, str]:
    """Get a small vision transformer that has learned the digits 0 to 5, and few-shot data of the digits 6 to 9."""
    pixels, labels = _digits()
    first = folder / "digits-known.npz"
    known = np.isin(labels, KNOWN_DIGITS)
    _arrays(first, x_train=pixels[known], y_train=labels[known])
    order = np.random.default_rng(SEED).permutation(len(labels))
    parts: dict[str, list[int]] = {"train": [], "validation": [], "test": []}
    for digit in NEW_DIGITS:
        places = [int(i) for i in order if labels[i] == digit]
        for split, (start, end) in {"train": (0, SHOTS), "validation": (SHOTS, SHOTS + HELD_OUT)}.items():
            parts[split] += places[start:end]
        parts["test"] += places[SHOTS + HELD_OUT :]
    second = folder / "digits-new.npz"
    _arrays(
        second,
        **{f"{kind}_{split}": a[ids] for split, ids in parts.items() for kind, a in (("x", pixels), ("y", labels))},
    )
    return {"vit": str(_pretrained_vit(folder, first)), "new_digits": str(second)}


def _digits() -> tuple[Any, Any]:
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise MissingExtraError("digits: this needs scikit-learn. Run: pip install 'spectune[train]'") from None
    pixels, labels = load_digits(return_X_y=True)
    return (pixels.reshape(-1, 8, 8) * 255 / 16).round().astype(np.uint8), labels


def _pretrained_vit(folder: Path, data: Path) -> Path:
    start, trained = folder / "vit-start", folder / "vit"
    if not (start / "config.json").is_file():
        config = tf.ViTConfig(
            hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4, image_size=8,
            patch_size=2, num_labels=len(KNOWN_DIGITS),
        )  # fmt: skip
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(SEED)
            tf.ViTForImageClassification(config).save_pretrained(start)
    training = {"steps": 400, "batch_size": 64, "learning_rate": 1e-3}  # Measured: the loss ends near 0.2.
    return _trained("image_classification", start, trained, {"train": str(data), "augment": False}, training)


def interface_lm(folder: Path) -> dict[str, str]:
    """Get a small language model that has read the Dutch of Django's interface, German to learn, Dutch held out."""
    task, found = load_languages(), {}
    for language, code in (("german", "de"), ("dutch", "nl")):
        place = list(LANGUAGES).index(code)
        for split in ("train", "validation", "test"):
            part, path = getattr(task, split), folder / f"{language}-{split}.jsonl"
            _rows(path, ({"text": t} for t, i in zip(part.texts, part.targets, strict=True) if i == place))
            found[f"{language}_{split}"] = str(path)
    return found | {"lm": str(_pretrained_lm(folder, found))}


def _pretrained_lm(folder: Path, files: dict[str, str]) -> Path:
    start = folder / "lm-start"
    if not (start / "config.json").is_file():
        texts = [json.loads(line)["text"] for key in ("dutch_train", "german_train") for line in _lines(files[key])]
        words = _tokenizer(texts)
        config = tf.LlamaConfig(
            hidden_size=96, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=4,
            vocab_size=len(words), max_position_embeddings=256, pad_token_id=0, bos_token_id=1, eos_token_id=1,
        )  # fmt: skip
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(SEED)
            tf.LlamaForCausalLM(config).save_pretrained(start)
        words.save_pretrained(start)
    data = {"train": files["dutch_train"], "format": "text", "loss_on": "all", "max_tokens": 48}
    # 400 steps learn the sentences by heart (measured: loss 0.16). Fewer are chosen, not measured.
    training = {"steps": 150, "batch_size": 16, "learning_rate": 3e-3}
    return _trained("causal_lm", start, folder / "lm", data, training)


def _lines(path: str) -> list[str]:
    return Path(path).read_text("utf-8").splitlines()


def _tokenizer(texts: Sequence[str]) -> Any:
    """Get a byte-pair tokenizer of both languages: what is new to the model is the language, not the letters."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=1024, special_tokens=["<pad>", "<end>"], initial_alphabet=alphabet)
    )
    return tf.PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="<end>")


def _trained(recipe: str, start: Path, folder: Path, data: dict[str, Any], training: dict[str, Any]) -> Path:
    """Get a model trained from scratch, or the one that was trained before; continues a stopped training."""
    if not (folder / RESULT_FILE).is_file():
        asked = {"recipe": recipe, "model": str(start), "adapter": "none", "data": data, "training": training}
        run(parse_config(asked), folder, resume=True)
    return folder / MODEL


def _arrays(path: Path, **arrays: Any) -> None:
    written = io.BytesIO()
    np.savez(written, **arrays)
    write_atomically(path, written.getvalue())


def _rows(path: Path, rows: Any) -> None:
    write_atomically(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


MAKERS: dict[str, Callable[[Path], dict[str, str]]] = {
    "languages": languages,
    "digits": digits,
    "interface_lm": interface_lm,
}
