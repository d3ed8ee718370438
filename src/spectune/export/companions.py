"""What stands beside the weights of a model: tokenizer, chat template, processor, generation config."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from ..checkpoint.task_file import TASK_FILE

# How transformers names them (utils/__init__.py, tokenization_utils_base.py); vocabularies go by many names.
TOKENIZER = re.compile(
    r"(tokenizer[\w.-]*|special_tokens_map|added_tokens|vocab|merges|spiece|sentencepiece[\w.-]*|bpe[\w.-]*)"
    r"\.(json|txt|model|jinja)"
)
OTHERS = re.compile(
    r"chat_template\.(json|jinja)|(\w+_)?(preprocessor|processor)_config\.json|generation_config\.json|dict\.txt"
)
# Two parts of one thing: an older file of the base beside the adapter's own tokenizer would add words to it.
OF_ONE_TOKENIZER = ("added_tokens.json", "special_tokens_map.json", "chat_template.json", "chat_template.jinja")
# Weights in a form that is not merged would be the old ones: they and their indexes stay behind. So do the base's own
# card and adapter: they say what is not true of the merged model.
UNMERGED = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".index.json")
OF_THE_BASE_ALONE = ("README.md", "adapter_config.json", ".gitattributes")


def copy_companions(adapter: Path, target: Path) -> None:
    """Copy what an adapter's folder has beside the tensors: files of known names only, and the names of classes."""
    for path in (*_companions(adapter), adapter / TASK_FILE):
        if path.is_file():
            _copy(path, target)


def copy_for_model(adapter: Path, target: Path, base: Path) -> None:
    """Copy the tokenizer and processor that were trained with, then the base's; what is there already stays.

    Of the base's folder all but weights. The names of classes stand in the merged config.json.
    """
    for path in _companions(adapter):
        _copy(path, target)
    own = (target / "tokenizer_config.json").exists()
    for path in sorted(base.iterdir()) if base.is_dir() else ():
        stale = own and path.name in OF_ONE_TOKENIZER
        if path.is_file() and not stale and path.name not in OF_THE_BASE_ALONE and not path.name.endswith(UNMERGED):
            _copy(path, target)


def _companions(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.iterdir()):
        if path.is_file() and (TOKENIZER.fullmatch(path.name) or OTHERS.fullmatch(path.name)):
            yield path


def _copy(path: Path, target: Path) -> None:
    if not (target / path.name).exists():
        shutil.copyfile(path, target / path.name)
