"""A tokenizer as GGUF metadata: only kinds whose words llama.cpp splits as they do."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from ..checkpoint.pretrained import load_tokenizer
from ..checkpoint.reader import read_json
from ..errors import ExportError, one_line
from .gguf_family import load_gguf

FILE = "tokenizer.json"
# The largest at hand (Gemma's) has 33 MB. Chosen.
LIMIT = 2**28
BYTE = re.compile(r"<0x[0-9A-F]{2}>")
# No word is worse than one that no merge makes: it is only matched whole.
NEVER = -1e9
_Got = TypeVar("_Got")


@dataclass(frozen=True)
class Vocabulary:
    """What llama.cpp needs to know of a tokenizer."""

    model: str
    """`gpt2` merges bytes by rank, `llama` merges letters by score."""
    pre: str
    """How the text is cut before merging (src/llama-vocab.cpp)."""
    tokens: list[str]
    types: list[int]
    scores: list[float]
    merges: list[str]
    space_prefix: bool


@cache
def _cuts() -> dict[str, str]:
    """Get the expression that cuts a text -> llama.cpp's name; transformers has them in its own sources."""
    import inspect

    from transformers.convert_slow_tokenizer import TikTokenConverter
    from transformers.models.qwen2 import tokenization_qwen2

    llama3 = inspect.signature(TikTokenConverter.__init__).parameters["pattern"].default
    return {llama3: "llama-bpe", getattr(tokenization_qwen2, "PRETOKENIZE_REGEX", ""): "qwen2"}


def read_words(folder: Path, rows: int) -> Vocabulary | None:
    """Get the tokenizer of a model's folder, with `rows` words; None if it has none.

    `ExportError` for a kind that llama.cpp may cut otherwise: a model that is asked other tokens answers badly.
    """
    if not (folder / FILE).is_file():
        return None
    return _read(folder, lambda said: _words(said, rows, folder))


def refuse_unknown(*folders: Path) -> bool:
    """Raise `ExportError` if the first tokenizer in these folders is of an unknown kind; get whether there is one."""
    found = next((folder for folder in folders if (folder / FILE).is_file()), None)
    if found is not None:
        _read(found, lambda said: _known_kind(said, found))
    return found is not None


def _read(folder: Path, use: Callable[[dict[str, Any]], _Got]) -> _Got:
    said = read_json(folder / FILE, LIMIT)
    try:
        return use(said)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        if isinstance(error, ExportError):
            raise
        raise ExportError(
            f"{folder / FILE}: the tokenizer cannot be read: {one_line(error)}. Copy it again."
        ) from error


def _words(said: dict[str, Any], rows: int, folder: Path) -> Vocabulary:
    model, kind = said["model"], _known_kind(said, folder)
    types = load_gguf().TokenType
    known = {place: word for word, place in model["vocab"].items()}
    merges = [
        pair if isinstance(pair, str) else " ".join(part.replace(" ", "Ġ") for part in pair) for pair in model["merges"]
    ]
    rank = {pair.replace(" ", "", 1): -float(place) for place, pair in reversed(list(enumerate(merges)))}
    kinds = {place: types.BYTE if BYTE.fullmatch(word) else types.NORMAL for place, word in known.items()}
    for token in said.get("added_tokens") or ():
        known[token["id"]] = token["content"]
        kinds[token["id"]] = types.CONTROL if token["special"] else types.USER_DEFINED
    if kind == "llama" and model.get("unk_token") in model["vocab"]:
        kinds[model["vocab"][model["unk_token"]]] = types.UNKNOWN
    if max(known) >= rows:
        raise ExportError(
            f"{folder}: the tokenizer has {max(known) + 1} words, but the model only {rows}. Copy it again."
        )
    return Vocabulary(
        "llama" if kind == "llama" else "gpt2",
        "default" if kind == "llama" else kind,
        [known.get(place, f"[PAD{place}]") for place in range(rows)],
        [int(kinds.get(place, types.UNUSED)) for place in range(rows)],
        [rank.get(known.get(place, ""), NEVER) for place in range(rows)] if kind == "llama" else [],
        [] if kind == "llama" else merges,
        kind == "llama" and _prefixes_space(said),
    )


def _known_kind(said: dict[str, Any], folder: Path) -> str:
    kind = _kind(said)
    if kind is None:
        raise ExportError(
            f"{folder / FILE}: how llama.cpp cuts the text of this tokenizer ({said['model']['type']}) is not known "
            "here. Export with --to merged and use llama.cpp's convert_hf_to_gguf.py."
        )
    return kind


def _kind(said: dict[str, Any]) -> str | None:
    """Get `llama` for letters with bytes to fall back on, else llama.cpp's word for how the text is cut; or None."""
    if said["model"]["type"] != "BPE":
        return None
    if said["model"].get("byte_fallback"):
        return "llama" if (said.get("pre_tokenizer") or {}).get("type") in (None, "Metaspace", "Split") else None
    cut = said.get("pre_tokenizer") or {}
    steps = cut.get("pretokenizers", [cut])
    match [step.get("type") for step in steps]:
        case ["ByteLevel"] if steps[0].get("use_regex", True) and not steps[0]["add_prefix_space"]:
            return "gpt-2"
        case ["Digits", "ByteLevel"] if steps[0]["individual_digits"] and steps[1].get("use_regex", True):
            return "smollm"
        case ["Split", "ByteLevel"] if not steps[1].get("use_regex", True):
            return _cuts().get((steps[0]["pattern"] or {}).get("Regex") or " ")
    return None


def _prefixes_space(said: dict[str, Any]) -> bool:
    normal = said.get("normalizer") or {}
    steps = normal.get("normalizers", [normal])
    metaspace = said.get("pre_tokenizer") or {}
    return any(step.get("type") == "Prepend" for step in steps) or (
        metaspace.get("type") == "Metaspace" and metaspace.get("prepend_scheme") != "never"
    )


def add_words(writer: Any, words: Vocabulary | None, folder: Path, rows: int) -> None:
    """Write a tokenizer with its special tokens and chat template; without one, that there is none."""
    if words is None:
        writer.add_tokenizer_model("none")
        return
    writer.add_tokenizer_model(words.model)
    writer.add_tokenizer_pre(words.pre)
    writer.add_token_list([word.encode() for word in words.tokens])
    writer.add_token_types(words.types)
    if words.model == "llama":
        writer.add_token_scores(words.scores)
        writer.add_add_space_prefix(words.space_prefix)
    else:
        writer.add_token_merges(words.merges)
    special = load_gguf().SpecialVocab(folder, load_merges=False, n_vocab=rows)
    # Said either way: llama.cpp has a default of its own for some kinds.
    special.add_special_token = _framing(folder)
    special.add_to_gguf(writer, quiet=True)


def _framing(folder: Path) -> dict[str, bool]:
    """Get whether the tokenizer puts its first and last special token around a text, by trying."""
    tokenizer = load_tokenizer(folder)
    ids = tokenizer("a")["input_ids"]
    ends = {"bos": (ids[:1], tokenizer.bos_token_id), "eos": (ids[-1:], tokenizer.eos_token_id)}
    return {name: token is not None and found == [token] for name, (found, token) in ends.items()}
