"""`spectune init`: a commented YAML file to begin a run with."""

from __future__ import annotations

from typing import Annotated

import typer


def init(
    recipe: Annotated[
        str, typer.Argument(help="text_classification, causal_lm, image_classification or text_to_image.")
    ],
) -> None:
    """Print a commented YAML file for a recipe: what is set, and everything that may be set."""
    from ..recipes import commented_yaml

    print(commented_yaml(recipe), end="")
