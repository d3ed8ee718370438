"""`spectune trl`: trl's own training scripts with a spectral adapter in place of their LoRA."""

from __future__ import annotations

from typing import Annotated

import typer


def trl(
    script: Annotated[str, typer.Argument(help="sft, dpo, grpo, … as in trl.")],
    words: Annotated[
        list[str] | None,
        typer.Argument(help="Options of trl's script, and --adapter NAME --adapter_r 8 --adapter_OPTION VALUE."),
    ] = None,
) -> None:
    """Run a training script of trl: spectune trl sft --adapter spectral_a --adapter_r 8 --model_name_or_path … ."""
    from ..plugins.trl import run

    run(script, words or [])
