"""Preferences as they stand in files: a prompt with a chosen and a rejected answer, or one answer with a label."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import DataError
from .conversations import fill
from .data import Row, each, is_missing
from .messages import conversation
from .preference_config import PreferenceData


def preferences(rows: Sequence[Mapping[str, Any]], data: PreferenceData, labelled: bool, split: str) -> list[Row]:
    """Get rows with prompt, chosen and rejected, or prompt, completion and label; `DataError` gives file and row."""
    read = _labelled if labelled else _pair
    return each(rows, split, "a labelled answer" if labelled else "a preference", lambda row: read(row, data))


def _pair(row: Mapping[str, Any], data: PreferenceData) -> dict[str, Any]:
    chosen, rejected = _answered(row, data, "chosen"), _answered(row, data, "rejected")
    if chosen["prompt"] != rejected["prompt"]:
        raise DataError("chosen and rejected answer different prompts. Only their last message may differ.")
    if chosen["completion"] == rejected["completion"]:
        raise DataError("chosen and rejected are equal, so nothing is preferred. Remove the row.")
    return chosen | {"chosen": chosen.pop("completion"), "rejected": rejected["completion"]}


def _labelled(row: Mapping[str, Any], data: PreferenceData) -> dict[str, Any]:
    found = _answered(row, data, "completion")
    label = row["label"]
    if isinstance(label, str) and label.strip().lower() in ("true", "false"):  # as in CSV
        label = label.strip().lower() == "true"
    if not isinstance(label, bool):
        raise DataError(f"label must be true or false, not {label!r}.")
    return found | {"label": label}


def _answered(row: Mapping[str, Any], data: PreferenceData, side: str) -> dict[str, Any]:
    """Get prompt and completion (and tools, if any) of one answer."""
    if data.format == "messages":
        found = conversation(_messages(row, side), row.get("tools"), row.get("system"))
    else:
        prompt, said = _text(row, data.prompt, "prompt"), _text(row, getattr(data, side), side)
        found = {"prompt": prompt, "completion": said}
        if data.chat:
            found = conversation([_said("user", prompt), _said("assistant", said)])
    last = found["completion"]
    if isinstance(last, list) and not last[-1]["content"].strip() and not last[-1].get("tool_calls"):
        raise DataError(f"{side} is empty. Fill it in, or remove the row.")
    return found


def _text(row: Mapping[str, Any], template: str | None, name: str) -> str:
    if template is None and is_missing(row[name]):
        raise DataError(f"{name} is null. Fill it in, or remove the row.")
    if template is None and isinstance(row[name], list):
        raise DataError(f"{name} is a list, not a text. For lists of messages, give data.format: messages.")
    found = fill(template or f"{{{name}}}", row)
    if not found.strip():
        raise DataError(f"{name} is empty. Fill it in, or remove the row.")
    return found


def _messages(row: Mapping[str, Any], side: str) -> list[Any]:
    """Get the whole conversation that ends in an answer: the prompt stands in it, or in a column of its own."""
    answer, prompt = row[side], row.get("prompt")
    if is_missing(answer) or answer in ("", []):
        raise DataError(f"{side} is {'null' if is_missing(answer) else 'empty'}. Fill it in, or remove the row.")
    talk = list(answer) if isinstance(answer, (list, tuple)) else [_said("assistant", answer)]
    if len(talk) > 1:  # a conversation from its beginning; a prompt beside it repeats its question
        return talk
    if is_missing(prompt) or prompt in ("", []):
        raise DataError(f"the prompt is missing: {side} has only one message, and the column prompt is empty.")
    return [*(prompt if isinstance(prompt, (list, tuple)) else [_said("user", prompt)]), *talk]


def _said(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}
