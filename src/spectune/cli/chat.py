"""`spectune chat`: talk to a run's model, as it was trained to be asked."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import OptionError, SpectuneError

if TYPE_CHECKING:
    from ..recipes.recipe import Recipe

HELP = "/base: what the untouched model answers, /reset: begin anew, /quit: end"


def chat(
    run_dir: Annotated[Path, typer.Argument(help="Folder of a run of a language model.")],
    max_new_tokens: Annotated[int | None, typer.Option(help="Limit for each answer; default: the run's.")] = None,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token each time.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Seed for a temperature above 0.")] = 0,
) -> None:
    """Talk to a run's model over several turns; /base answers with the untouched model beside it."""
    if temperature < 0 or (max_new_tokens is not None and max_new_tokens < 1):
        raise OptionError("chat: --temperature must be at least 0, --max-new-tokens at least 1.")
    import torch

    from ..recipes.recipe import Recipe
    from ..runs import load_run
    from .terminal import say

    recipe, model = load_run(run_dir)
    if type(recipe).generate is Recipe.generate:
        raise OptionError(
            f"{run_dir}: a {recipe.config.recipe} run does not write text. Give a causal_lm, preference or reward run."
        )
    torch.manual_seed(seed)
    limit = {} if max_new_tokens is None else {"max_new_tokens": max_new_tokens}
    talk = Talk(recipe, model, {"temperature": temperature, **limit})
    say(HELP)
    for line in sys.stdin if not sys.stdin.isatty() else _typed():
        if not (words := line.strip()):
            continue
        if words == "/quit":
            return
        try:
            talk.hear(words)
        except SpectuneError as error:  # a slip of the fingers does not end a conversation
            say(f"spectune: {error}")


def _typed() -> Any:
    while True:
        try:
            yield input("> ")
        except EOFError:
            return


class Talk:
    """A conversation with a run's model.

    Where the run trains on conversations, the earlier turns are part of what the model is asked; where it trains on a
    prompt and an answer, every line is a prompt of its own.
    """

    def __init__(self, recipe: Recipe, model: Any, options: dict[str, Any]) -> None:
        self.recipe, self.model, self.options = recipe, model, options
        self.turns: list[dict[str, str]] = []
        self.asked: Any = None

    def hear(self, words: str) -> None:
        """Obey a command, or answer."""
        from .terminal import say

        if words == "/reset":
            self.turns, self.asked = [], None
            say("a new conversation")
        elif words == "/base":
            self._base()
        elif words.startswith("/"):
            raise OptionError(f"{words} is not a command. {HELP}.")
        else:
            prompt = self.recipe.as_prompt(words)
            self.asked = [*self.turns, *prompt] if isinstance(prompt, list) else prompt
            answer = self._answer()
            if isinstance(prompt, list):
                self.turns = [*self.asked, {"role": "assistant", "content": answer}]

    def _base(self) -> None:
        if self.asked is None:
            raise OptionError("/base answers the last line with the untouched model. Ask something first.")
        if not hasattr(self.model, "disable_adapter"):
            raise OptionError("/base needs an adapter that can be turned off, and this run trained all weights.")
        self._answer(untouched=True)

    def _answer(self, untouched: bool = False) -> str:
        from .terminal import say

        with self.model.disable_adapter() if untouched else nullcontext():
            (answer,) = self.recipe.generate(self.model, [self.asked], streamer=_streamer(self.recipe), **self.options)
        say()
        return answer.strip()


def _streamer(recipe: Recipe) -> Any:
    """Get what prints an answer while it is written."""
    from transformers import TextStreamer

    from .terminal import say

    class Printed(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            say(text, end="")
            sys.stdout.flush()

    return Printed(recipe.processing, skip_prompt=True, skip_special_tokens=True)
