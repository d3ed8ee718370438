"""The part of OpenAI's wire format that is served: a request is obeyed or refused, field by field."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictInt

from spectune.errors import printable

from .batches import Asked

LARGEST, MOST_PROMPTS = 4096, 40
"""Tokens that one request may ask for, and prompts that it may have. Chosen."""


class RefusedError(Exception):
    """A request that is refused, in OpenAI's form."""

    def __init__(self, status: int, message: str, param: str | None, code: str | None) -> None:
        super().__init__(message)
        self.status = status
        kind = "rate_limit_error" if status == 429 else "invalid_request_error"
        self.body = {"message": message, "type": kind, "param": param, "code": code}


def encoded(tokenizer: Any, text: str, param: str, **options: Any) -> list[int]:
    """Get the tokens of a text; half of a surrogate pair is not text."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise RefusedError(400, f"{param}: this is not valid Unicode.", param, None) from None
    ids: list[int] = tokenizer(text, **options).input_ids
    return ids


class Sampling(BaseModel):
    """What both kinds of request have. Unknown fields are refused, and so is what cannot be done: streams, n > 1."""

    model_config = ConfigDict(extra="forbid")

    model: str
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: str | list[str] | None = None
    n: Literal[1] = 1
    stream: Literal[False] = False
    user: str | None = None

    def row(self, adapter: str, ids: list[int], max_tokens: int) -> Asked:
        """Get the row of a batch."""
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        if len(stop) > 4 or not all(stop):
            raise RefusedError(400, "stop: give up to four words, none of them empty.", "stop", None)
        return Asked(adapter, ids, max_tokens, self.temperature, self.top_p, self.seed, tuple(stop))


class Completion(Sampling):
    """POST /v1/completions."""

    prompt: str | list[str] | list[StrictInt] | list[list[StrictInt]]
    max_tokens: int = Field(16, ge=1, le=LARGEST)

    def asked(self, adapter: str, ids: list[int]) -> Asked:
        """Get the row of one prompt."""
        return self.row(adapter, ids, self.max_tokens)

    def token_ids(self, tokenizer: Any, size: int) -> list[list[int]]:
        """Get the tokens of each prompt."""
        given = self.prompt
        prompts: list[Any] = [given] if isinstance(given, str) or (given and isinstance(given[0], int)) else list(given)
        found = [encoded(tokenizer, one, "prompt") if isinstance(one, str) else one for one in prompts]
        if not 1 <= len(found) <= MOST_PROMPTS or not all(found):
            raise RefusedError(400, f"prompt: give 1 to {MOST_PROMPTS} prompts, none of them empty.", "prompt", None)
        if not all(0 <= token < size for ids in found for token in ids):
            raise RefusedError(400, f"prompt: tokens must be from 0 to {size - 1}.", "prompt", None)
        return found


class Message(BaseModel):
    """One message of a chat."""

    model_config = ConfigDict(extra="forbid")

    role: Literal["system", "user", "assistant"]
    content: str


class Chat(Sampling):
    """POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1, le=LARGEST)
    max_completion_tokens: int | None = Field(None, ge=1, le=LARGEST)

    def asked(self, adapter: str, ids: list[int]) -> Asked:
        """Get the row of the chat; without a length, 256 tokens (chosen)."""
        return self.row(adapter, ids, self.max_completion_tokens or self.max_tokens or 256)

    def token_ids(self, tokenizer: Any) -> list[int]:
        """Get the tokens of the chat, by the template of the base's tokenizer."""
        if not tokenizer.chat_template:
            raise RefusedError(400, "This model has no chat template. Use /v1/completions.", "messages", None)
        messages = [message.model_dump() for message in self.messages]
        try:
            text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # the template's own words, such as for two messages of one role in a row
            said = f"messages: the chat template refuses them: {printable(str(error)[:200])}"
            raise RefusedError(400, said, "messages", None) from None
        return encoded(tokenizer, text, "messages", add_special_tokens=False)
