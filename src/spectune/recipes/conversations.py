"""Instruction and chat data: messages, prompt and completion, alpaca, or a template over columns."""

from __future__ import annotations

import json
import string
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from ..errors import DataError, OptionError, nearest
from .answers import begins_texts
from .data import Row, each, filled
from .messages import conversation

Format = Literal["messages", "prompt_completion", "alpaca", "text"]

# The two prompts of tatsu-lab/stanford_alpaca, for models and data sets of this format.
_REQUEST = "Write a response that appropriately completes the request."
ALPACA = (
    "Below is an instruction that describes a task. "
    + _REQUEST
    + "\n\n### Instruction:\n{instruction}\n\n### Response:\n"
)
ALPACA_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    + _REQUEST
    + "\n\n### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
# A template for tokenizers without one; it adds no tokens. It marks the assistant's part, so that every answer can
# have loss. Chosen.
PLAIN_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}Assistant: {% generation %}{{ message['content'] }}{{ eos_token }}"
    "{% endgeneration %}\n"
    "{% else %}{{ message['role'] | capitalize }}: {{ message['content'] }}\n{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)


class _Columns(string.Formatter):
    """str.format on plain columns, without attributes and indices, so that a template cannot run code."""

    def get_field(self, field_name: str, args: Any, kwargs: Any) -> Any:
        if field_name not in kwargs:
            raise DataError(f"the template's column {field_name!r} does not exist. {nearest(field_name, list(kwargs))}")
        return filled(kwargs[field_name], field_name), field_name


def fill(template: str, row: Mapping[str, Any]) -> str:
    """Get a template with its {columns} filled in; `DataError` for a column that does not exist."""
    try:
        return _Columns().vformat(template, (), dict(row))
    except (ValueError, KeyError, IndexError) as error:
        if isinstance(error, DataError):
            raise
        raise OptionError(f"data: {template!r} is not a template: {error}. Write {{{{ for a brace.") from None


def columns_of(template: str) -> list[str]:
    """Get the names of the columns in a template, in their order."""
    return list(dict.fromkeys(name for _, name, _, _ in string.Formatter().parse(template) if name))


def prepared(
    rows: Sequence[Mapping[str, Any]],
    form: Format,
    prompt: str | None,
    completion: str | None,
    chat: bool,
    split: str = "train",
) -> list[Row]:
    """Get rows in trl's form: `text`, or `prompt` and `completion` (texts, or messages with `chat`).

    messages: everything before the last answer is the prompt, the last answer the completion.
    """
    return each(rows, split, f"format {form}", lambda row: _one(row, form, prompt, completion, chat))


def _one(
    row: Mapping[str, Any], form: Format, prompt: str | None, completion: str | None, chat: bool
) -> dict[str, Any]:
    if form == "text":
        return {"text": fill(prompt, row) if prompt else _text(row, "text")}
    if form == "messages":
        messages = row["messages"] if "messages" in row or "conversations" not in row else row["conversations"]
        return conversation(messages, row.get("tools"), row.get("system"))
    if form == "alpaca":
        return _pair(instruction(row, chat), _text(row, "output"), chat)
    if not prompt and not completion and isinstance(row["prompt"], list) and isinstance(row["completion"], list):
        return conversation([*row["prompt"], *row["completion"]], row.get("tools"))
    first = fill(prompt, row) if prompt else _text(row, "prompt")
    return _pair(first, fill(completion, row) if completion else _text(row, "completion"), chat)


def instruction(row: Mapping[str, Any], chat: bool) -> str:
    """Get the prompt of an alpaca row: in Stanford's words, or bare for a chat template. `input` may be missing."""
    for name in ("history", "system"):
        if row.get(name):
            raise DataError(
                f"alpaca's prompt does not use the column {name!r}. Use format messages, or drop the column."
            )
    more = _text(row, "input") if "input" in row else ""
    if chat:
        return _text(row, "instruction") + (f"\n\n{more}" if more else "")
    return fill(ALPACA_INPUT if more else ALPACA, row)


def _text(row: Mapping[str, Any], name: str) -> str:
    return str(filled(row[name], name))


def _pair(prompt: str, completion: str, chat: bool) -> dict[str, Any]:
    if chat:
        return {"prompt": [_message("user", prompt)], "completion": [_message("assistant", completion)]}
    return {"prompt": prompt, "completion": completion}


def _message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def as_asked(text: str, form: Format, prompt: str | None, chat: bool) -> str:
    """Get a user's words in the prompt template of the rows; several columns need a JSON object."""
    if form == "alpaca":
        found = _object(text)
        return instruction(found if found and "instruction" in found else {"instruction": text}, chat)
    if form != "prompt_completion" or not prompt:
        return text
    names = columns_of(prompt)
    if len(names) == 1:
        return fill(prompt, {names[0]: text})
    found = _object(text)
    if found is None:
        raise OptionError(f"this run's prompt has the columns {', '.join(names)}. Give a JSON object with these keys.")
    return fill(prompt, found)


def _object(text: str) -> dict[str, Any] | None:
    try:
        found = json.loads(text)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def prompt_of(row: Mapping[str, Any]) -> Any:
    """Get the prompt of a prepared row."""
    if "prompt" not in row:
        raise OptionError(
            "data.format=text has no prompts, so nothing can be generated and scored. Use prompt_completion."
        )
    return row["prompt"]


def answer_of(row: Mapping[str, Any]) -> str:
    """Get the answer of a prepared row."""
    completion = row["completion"]
    return str(completion[-1]["content"] if isinstance(completion, list) else completion)


def question_of(row: Mapping[str, Any]) -> str:
    """Get the prompt of a prepared row, or the last message of it."""
    prompt = row["prompt"]
    return str(prompt[-1]["content"] if isinstance(prompt, list) else prompt)


def template(tokenizer: Any, asked: str) -> str:
    """Get the chat template of a file, or the plain one, which begins the way the tokenizer begins a text."""
    if asked == "plain":
        return ("{{ bos_token }}" if begins_texts(tokenizer) else "") + PLAIN_TEMPLATE
    if not Path(asked).is_file():
        raise OptionError(f"data.chat_template: the file {asked} does not exist. Give a .jinja file, or plain.")
    return Path(asked).read_text("utf-8")
