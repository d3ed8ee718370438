"""What transformers loads by a name in somebody's config: its own classes only, and never code that a folder holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import AdapterError, OptionError, SpectuneError, one_line


def load_auto(kind: Any, name: str | Path, **options: Any) -> Any:
    """Get what `kind.from_pretrained(name)` gives, without running code of the folder and without asking whether to.

    `AdapterError` where the config asks for such code (auto_map); else whatever transformers raises.
    """
    try:
        return kind.from_pretrained(str(name), trust_remote_code=False, **options)
    except ValueError as error:
        # transformers' resolve_trust_remote_code has no class of its own for this.
        if isinstance(error, SpectuneError) or "trust_remote_code" not in str(error):
            raise
        raise AdapterError(
            f"{name}: its config asks for Python code of its own (auto_map), and code of a model is not run here. Use "
            f"a model whose class is part of transformers."
        ) from error


def load_tokenizer(name: str | Path, revision: str | None = None) -> Any:
    """Get the tokenizer of a model; `OptionError` where there is none, `AdapterError` for one that needs its own code.

    Tokenizers are read by foreign parsers that check little, so whatever they raise, the files are the reason.
    """
    from transformers import AutoTokenizer

    try:
        return load_auto(AutoTokenizer, name, revision=revision or "main")
    except SpectuneError:
        raise
    except Exception as error:
        raise OptionError(f"model: the tokenizer of {name} cannot be loaded: {one_line(error)}.") from error
