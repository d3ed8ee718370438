"""`spectune trl sft|dpo|grpo|…`: trl's own training scripts with any adapter in place of their LoRA.

For several processes: `accelerate launch -m spectune.plugins.trl sft …`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any

from ..errors import OptionError, SpectuneError, nearest
from ..methods import METHODS
from .options import config_of, value_of

# Those of trl's scripts that put a LoRA on a model.
SCRIPTS = ("sft", "dpo", "grpo", "kto", "reward", "rloo", "distillation")
ADAPTER = "--adapter"
# What trl would build its LoRA from.
OF_LORA = ("--use_peft", "--lora_", "--use_rslora", "--use_dora")
LISTS = ("target_modules", "modules_to_save", "target_parameters", "exclude_modules")


def run(script: str, words: Sequence[str]) -> None:
    """Run one of trl's scripts with its own options and `--adapter NAME --adapter_OPTION VALUE …`."""
    module = _script(script)
    options, rest = split(words)
    name = str(options.pop("", ""))
    if not name:
        raise OptionError(f"spectune trl {script}: --adapter is missing. Choose from: {', '.join(METHODS)}, or lora.")
    for word in rest:
        if word.startswith(OF_LORA) and word != "--lora_task_type":
            raise OptionError(f"spectune trl {script}: {word} has no effect with --adapter. Write --adapter_OPTION.")
    config_of(name, options)  # a wrong option is refused before trl loads anything
    import trl

    def peft_config(model: Any) -> Any:
        return config_of(name, options, task_type=model.lora_task_type)

    parsed = module.make_parser(prog=f"spectune trl {script}").parse_args_and_config(rest)
    present = trl.get_peft_config
    trl.get_peft_config = peft_config  # the scripts import it from here when they start
    try:
        module.main(*parsed)
    finally:
        trl.get_peft_config = present


def split(words: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """Get the options of the adapter, its name under "", and the words that are trl's."""
    found: dict[str, list[str]] = {}
    rest: list[str] = []
    current: list[str] = rest
    for word in words:
        stem, equals, value = word.partition("=")
        if stem == ADAPTER or stem.startswith(f"{ADAPTER}_"):
            current = found.setdefault(stem.removeprefix(ADAPTER).removeprefix("_"), [])
            current += [value] if equals else []
        elif word.startswith("--"):
            current = rest
            rest.append(word)
        else:
            current.append(word)
    options = {option: value_of(f"adapter_{option}".rstrip("_"), given) for option, given in found.items()}
    for option in LISTS:
        if isinstance(named := options.get(option), str) and named.isidentifier():
            options[option] = [named]
    return options, rest


def _script(name: str) -> Any:
    if name not in SCRIPTS:
        raise OptionError(f"spectune trl {name}: trl has no such training script. {nearest(name, SCRIPTS)}")
    try:
        return import_module(f"trl.scripts.{name}")
    except ImportError as error:
        raise OptionError(f"cannot import trl's {name} ({error}). Install it: pip install 'spectune[llm]'") from error


if __name__ == "__main__":
    try:
        run(sys.argv[1] if len(sys.argv) > 1 else "", sys.argv[2:])
    except SpectuneError as failure:
        raise SystemExit(f"error: {failure}") from None
