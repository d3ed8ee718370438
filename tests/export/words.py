"""Tiny tokenizers of the two kinds that llama.cpp knows."""

from __future__ import annotations

from typing import Any

import transformers as tf
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers


def tokenizer(kind: str) -> Any:
    made = Tokenizer(models.BPE(byte_fallback=kind == "llama", unk_token="<unk>" if kind == "llama" else None))
    special = ["<unk>", "<s>", "</s>"]
    if kind == "llama":
        made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
        letters: list[str] = [f"<0x{byte:02X}>" for byte in range(256)]
        trainer = trainers.BpeTrainer(vocab_size=340, special_tokens=special + letters)
    else:
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        made.decoder = decoders.ByteLevel()
        letters = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=special, initial_alphabet=letters)
    made.train_from_iterator(["the cat sat on the mat and the dog on the log", "don't, he said"] * 3, trainer)
    return tf.PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
