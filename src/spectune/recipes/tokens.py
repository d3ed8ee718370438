"""A language model's examples and prompts, as tokens and labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ..checkpoint.chat_rendering import in_time, rendered
from ..errors import DataError, OptionError, one_line
from .answers import SPACES, prompt_ids
from .messages import Message, refuse_what_is_lost

IGNORED = -100  # torch's cross entropy leaves this label out


@dataclass(frozen=True)
class Tokens:
    """A tokenizer with its chat template, and which tokens have loss."""

    tokenizer: Any
    loss_on: Literal["response", "assistant", "all"]

    def taught(self, row: Mapping[str, Any]) -> tuple[list[int], list[int]]:
        """Get the tokens and labels of a prepared row; labels without loss are IGNORED."""
        ids, mask = self._conversation(row) if isinstance(row.get("prompt"), list) else (self._text(row), None)
        if "prompt" not in row:
            return ids, list(ids)
        asked = self.asked(row)
        if ids[: len(asked)] != asked and self.loss_on != "assistant":
            ids = self._apart(row, asked) or ids
        if self.loss_on == "all":
            return ids, list(ids)
        if self.loss_on == "assistant":
            return ids, [token if carries else IGNORED for token, carries in zip(ids, mask or [], strict=True)]
        start = _common(asked, ids)
        return ids, [IGNORED] * start + ids[start:]

    def asked(self, row: Mapping[str, Any]) -> list[int]:
        """Get the prompt tokens of a prepared row."""
        return prompt_ids(self.tokenizer, row["prompt"], row.get("tools"))

    def agrees(self, row: Mapping[str, Any]) -> bool:
        """Ask whether the row's training tokens begin with its prompt tokens."""
        asked = self.asked(row)
        return self.taught(row)[0][: len(asked)] == asked

    def _apart(self, row: Mapping[str, Any], asked: list[int]) -> list[int] | None:
        """Get prompt and answer as tokens that do not merge; None if the template's prompt differs from training."""
        if isinstance(row["prompt"], str):
            head, whole, end = row["prompt"], row["prompt"] + row["completion"], [self.tokenizer.eos_token_id]
        else:
            tools, talk = row.get("tools"), [*row["prompt"], *row["completion"]]
            head = rendered(self.tokenizer, row["prompt"], tools=tools, add_generation_prompt=True, tokenize=False)
            whole, end = rendered(self.tokenizer, talk, tools=tools, tokenize=False), []
        head = head.rstrip(SPACES)
        if not whole.startswith(head):
            return None
        rest = list(self.tokenizer(whole[len(head) :], add_special_tokens=False)["input_ids"])
        return [*asked, *rest, *end]

    def _text(self, row: Mapping[str, Any]) -> list[int]:
        ids = list(self.tokenizer(row["text"] if "text" in row else row["prompt"] + row["completion"])["input_ids"])
        # Not all tokenizers add the end token; a model that never saw it would never stop.
        return ids if ids[-1:] == [self.tokenizer.eos_token_id] else [*ids, self.tokenizer.eos_token_id]

    def _conversation(self, row: Mapping[str, Any]) -> tuple[list[int], list[int] | None]:
        messages, tools = [*row["prompt"], *row["completion"]], row.get("tools")
        template = str(self.tokenizer.chat_template or "")
        try:
            refuse_what_is_lost(messages, tools, template, self._rendered)
            found = self._rendered(messages, tools, return_assistant_tokens_mask=self._wants_mask())
        except DataError as error:
            where = getattr(row, "where", "")
            raise DataError(f"{where}: {error}" if where else str(error)) from None
        return list(found["input_ids"]), found.get("assistant_masks")

    def _rendered(self, messages: Sequence[Message], tools: Any, **options: Any) -> Any:
        try:
            return in_time(self.tokenizer, messages, tools=tools, **options)
        except OptionError:
            raise
        except Exception as error:  # a template can raise anything
            raise DataError(f"the chat template refuses it: {one_line(error)}.") from error

    def _wants_mask(self) -> bool:
        if self.loss_on != "assistant":
            return False
        if "generation" not in (self.tokenizer.chat_template or ""):
            raise OptionError(
                "data.loss_on=assistant: the chat template does not mark the assistant's part with {% generation %}. "
                "Give a data.chat_template that does (plain does), or loss_on: response (the last answer)."
            )
        return True


def _common(first: list[int], second: list[int]) -> int:
    """Get the number of tokens that two rows begin with in common: tokens may merge at the end of the prompt."""
    return next(
        (i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second))
    )
