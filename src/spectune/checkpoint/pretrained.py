"""Loading by name with transformers: only its own classes, never code from a model's folder."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..errors import AdapterError, OptionError, SpectuneError, one_line


def load_auto(kind: Any, name: str | Path, **options: Any) -> Any:
    """Get `kind.from_pretrained(name)`, without running code of the folder and without a prompt whether to.

    `AdapterError` if the config needs such code (auto_map); else whatever transformers raises.
    """
    try:
        return kind.from_pretrained(str(name), trust_remote_code=False, **options)
    except ValueError as error:
        # transformers' resolve_trust_remote_code has no class of its own for this.
        if isinstance(error, SpectuneError) or "trust_remote_code" not in str(error):
            raise
        raise AdapterError(
            f"{name}: its config needs its own Python code (auto_map), which spectune never runs. Use a model whose "
            f"class is part of transformers."
        ) from error


# What `from_pretrained` is told, so that it returns (model, info) where tensors do not fit, for `replaced`.
TELL_MISFITS = {"ignore_mismatched_sizes": True, "output_loading_info": True}


def replaced(info: Mapping[str, Any], is_head: Callable[[str], bool]) -> list[str]:
    """Get the tensors of a head that is for other classes, which transformers has filled with random numbers.

    `ValueError` for any other tensor of another shape: nothing else may be filled so.
    """
    names = sorted(entry if isinstance(entry, str) else entry[0] for entry in info["mismatched_keys"])
    for name in names:
        if not is_head(name):
            raise ValueError(f"its {name} has another shape than its config says")
    return names


def load_tokenizer(name: str | Path, revision: str | None = None) -> Any:
    """Get the tokenizer of a model; `OptionError` if it cannot be loaded, `AdapterError` if it needs its own code.

    Foreign parsers read tokenizers and check little, so whatever they raise, the files are the reason.
    """
    from transformers import AutoTokenizer

    try:
        return load_auto(AutoTokenizer, name, revision=revision or "main")
    except SpectuneError:
        raise
    except Exception as error:
        raise OptionError(f"model: cannot load the tokenizer of {name}: {one_line(error)}.") from error
