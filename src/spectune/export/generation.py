"""`complete_generation`: where the answers of a merged model end, as in its training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..checkpoint import CONFIG_LIMIT, write_atomically
from ..checkpoint.pretrained import load_tokenizer
from ..checkpoint.reader import read_json
from ..errors import SpectuneError

FILE = "generation_config.json"


def complete_generation(folder: Path) -> str:
    """Add the tokenizer's end token to generation_config.json, which is the base's; get what was done, or nothing.

    A base often ends at another token than the chat template that it was trained with, and would never stop. Training
    and `spectune generate` end at both.
    """
    try:
        tokenizer = load_tokenizer(folder)
    except SpectuneError as error:
        return f"{FILE} is the base's, because the tokenizer cannot be loaded ({str(error)[:120]})"
    end, path = tokenizer.eos_token_id, folder / FILE
    said: dict[str, Any] = read_json(path, CONFIG_LIMIT) if path.is_file() else {}
    own = said.get("eos_token_id", read_json(folder / "config.json", CONFIG_LIMIT).get("eos_token_id"))
    ends = [token for token in (own if isinstance(own, list) else [own]) if isinstance(token, int)]
    if end is None or (path.is_file() and end in ends):
        return ""
    both = sorted({end, *ends})
    said["eos_token_id"] = both if len(both) > 1 else both[0]
    for name in ("bos_token_id", "pad_token_id"):
        if said.get(name) is None and (token := getattr(tokenizer, name)) is not None:
            said[name] = token
    write_atomically(path, json.dumps(said, indent=2) + "\n")
    return f"{FILE}: an answer ends at {' or '.join(map(repr, tokenizer.convert_ids_to_tokens(both)))}"
