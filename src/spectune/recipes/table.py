"""The table of recipes. A new recipe is one file with a child of `Recipe`, and one row here."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from ..errors import OptionError, SpectuneError, nearest
from ..training.config import RunConfig, validate
from ..training.yaml_file import read_yaml
from ..tuner import build_adapter_config
from .recipe import Recipe

# Name -> (module in spectune, class); imported when needed, so that a recipe loads only its own libraries.
RECIPES: dict[str, tuple[str, str]] = {
    "text_classification": ("recipes.text_classification", "TextClassification"),
    "causal_lm": ("recipes.causal_lm", "CausalLM"),
    "preference": ("recipes.preference", "Preference"),
    "reward": ("recipes.reward", "FromRewards"),
    "image_classification": ("recipes.image_classification", "ImageClassification"),
    "text_to_image": ("concepts.text_to_image", "TextToImage"),
}


def recipe_class(name: str) -> type[Recipe]:
    """Get a recipe's class; `OptionError` with the near misses for a name that does not exist."""
    if name not in RECIPES:
        raise OptionError(f"recipe {name!r} does not exist. {nearest(str(name), list(RECIPES))}")
    module, kind = RECIPES[name]
    found: type[Recipe] = getattr(import_module(f"..{module}", __package__), kind)
    return found


def parse_config(values: Mapping[str, Any], where: str = "run") -> RunConfig:
    """Get the checked configuration of a run from plain values, as in YAML."""
    if "recipe" not in values:
        raise OptionError(f"{where}: recipe: is missing. {nearest('', list(RECIPES))}")
    if values["recipe"] == "text_to_image" and "pipeline" in values:
        raise OptionError(
            f"{where}: pipeline: it was written before 0.1.0. Write the sections of spectune init text_to_image: "
            f"pipeline is model, images is data.train, token is word.token, unet is adapter.unet."
        )
    config = validate(recipe_class(values["recipe"]).Config, values, where)
    for options in config.adapters:
        try:
            build_adapter_config(options)
        except SpectuneError as error:  # said here, so that no run of many begins before the last one is right
            raise type(error)(f"{where}: {error}") from error
    return config


def with_reward(config: RunConfig, asked: str | None) -> RunConfig:
    """Get a configuration with the function of FILE.py:function among its rewards; the file is run.

    A run's own file already names it: then it is only given to this process.
    """
    if asked is None:
        return config
    if config.recipe != "reward":
        raise OptionError(f"--reward {asked}: is for recipe reward, but this run has recipe {config.recipe}.")
    from .own_reward import own_reward

    found = own_reward(asked)
    mine: Any = config
    return config if found in mine.rewards else mine.model_copy(update={"rewards": [*mine.rewards, found]})


def load_config(path: str | Path, overrides: Iterable[str] = ()) -> RunConfig:
    """Get the checked configuration of a run from a YAML file; each `a.b=value` of `overrides` replaces a setting.

    training.steps or training.epochs replaces the file's length, whichever of the two it is.
    """
    overrides = list(overrides)
    values, keys = read_yaml(path, overrides), {override.partition("=")[0] for override in overrides}
    training = values.get("training")
    for length, other in (("steps", "epochs"), ("epochs", "steps")):
        if isinstance(training, dict) and f"training.{length}" in keys and f"training.{other}" not in keys:
            training.pop(other, None)
    return parse_config(values, str(path))
