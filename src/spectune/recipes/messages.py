"""The messages of a conversation: OpenAI's role, content and tool calls, or ShareGPT's from and value."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..errors import DataError, nearest
from .data import is_missing

Message = dict[str, Any]
# ShareGPT's words for the speakers, and those of similar data sets.
SPEAKERS = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
}
ROLES = ("system", "developer", "user", "assistant", "tool")
# Keys of a message with contents, besides role and content: a template that leaves them out would lose these.
CARRYING = ("tool_calls", "function_call", "reasoning_content", "reasoning", "thinking", "weight")


def conversation(messages: Any, tools: Any = None, system: Any = None) -> dict[str, Any]:
    """Get prompt (everything before the last answer), completion (the last answer) and tools, if any.

    `system` is the column of that name, which becomes the first message.
    """
    turns = read_messages(messages)
    if not _is_empty(system):
        if any(turn["role"] == "system" for turn in turns):
            raise DataError("there are both a system message and a column system. Leave one out.")
        turns = [*read_messages([{"role": "system", "content": system}]), *turns]
    if len(turns) < 2 or turns[-1]["role"] != "assistant":
        raise DataError("a conversation must end with an answer of the assistant, after a question.")
    return {"prompt": turns[:-1], "completion": turns[-1:]} | read_tools(tools)


def read_messages(messages: Any) -> list[Message]:
    """Get the messages with role and content; `DataError` gives the number of the first malformed one."""
    if not isinstance(messages, (list, tuple)):
        raise DataError(f"messages must be a list, not {type(messages).__name__}.")
    found = []
    for number, message in enumerate(messages, 1):
        try:
            found.append(_message(message))
        except DataError as error:
            raise DataError(f"message {number}: {error}") from None
    return found


def read_tools(tools: Any) -> dict[str, Any]:
    """Get `tools` for a chat template, parsed if they are JSON text; empty without any."""
    if is_missing(tools) or tools in ("", []):
        return {}
    try:
        found = json.loads(tools) if isinstance(tools, str) else tools
    except ValueError:
        found = None
    if not isinstance(found, list) or not all(isinstance(tool, dict) for tool in found):
        raise DataError(f"tools must be a list of descriptions, not {str(tools)[:40]!r}.")
    return {"tools": found} if found else {}


def _message(message: Any) -> Message:
    if not isinstance(message, Mapping) or not ({"role", "from"} & message.keys()):
        raise DataError("a message needs role and content (or from and value).")
    if "role" in message:
        who, said, role = message["role"], message.get("content"), message["role"]
    else:
        who, said = message["from"], message.get("value")
        role = SPEAKERS.get(str(who).strip().lower())
        if role is None:
            raise DataError(f"the speaker {who!r} is unknown. {nearest(str(who), list(SPEAKERS))}")
    if not isinstance(role, str) or not role:
        raise DataError(f"the role must be a word, not {role!r}.")
    more = {k: v for k, v in message.items() if k not in ("role", "content", "from", "value") and not _is_empty(v)}
    if "tool_calls" in more:
        more["tool_calls"] = _calls(more["tool_calls"])
    said = "" if is_missing(said) and "tool_calls" in more else said
    return {"role": role, "content": _content(said, str(who)), **more}


def _is_empty(value: Any) -> bool:
    return is_missing(value) or value in ("", [], {})


def _content(said: Any, who: str) -> str:
    """Get a message's text; a list of parts is joined if all are texts."""
    if isinstance(said, list):
        kinds = [part.get("type", "?") if isinstance(part, Mapping) else "text" for part in said]
        other = next((kind for kind in kinds if kind != "text"), None)
        if other is not None:
            raise DataError(f"the content of {who} has a part of type {other!r}. Only text can be learned.")
        said = "".join(str(part.get("text", "")) if isinstance(part, Mapping) else str(part) for part in said)
    if is_missing(said):
        raise DataError(f"the content of {who} is null. Fill it in, or remove the row.")
    if not isinstance(said, str):
        raise DataError(f"the content of {who} must be text, not {type(said).__name__}.")
    return said


def _calls(calls: Any) -> list[Any]:
    """Get tool calls for a chat template: arguments that OpenAI writes as JSON text are parsed."""
    if not isinstance(calls, list) or not all(isinstance(call, Mapping) for call in calls):
        raise DataError(f"tool_calls must be a list of calls, not {str(calls)[:40]!r}.")
    return [_call(dict(call)) for call in calls]


def _call(call: dict[str, Any]) -> dict[str, Any]:
    if isinstance(call.get("function"), Mapping):
        return call | {"function": _call(dict(call["function"]))}
    if isinstance(call.get("arguments"), str):
        try:
            return call | {"arguments": json.loads(call["arguments"])}
        except ValueError:
            raise DataError(f"the arguments of a tool call are not JSON: {call['arguments'][:40]!r}.") from None
    return call


def refuse_what_is_lost(
    messages: Sequence[Message], tools: Any, template: str, render: Callable[[Sequence[Message], Any], Any]
) -> None:
    """Raise `DataError` for anything that the chat template leaves out: a tool call, tools, thoughts, a role.

    A key is used if the rendering without it is different.
    """
    for role in dict.fromkeys(str(message["role"]) for message in messages):
        if role not in ROLES and role not in template:
            raise DataError(f"the chat template ignores the role {role!r}. {nearest(role, ROLES)}")
    whole = None
    for key in (key for key in CARRYING if any(_says(message, key) for message in messages)):
        whole = render(messages, tools) if whole is None else whole
        if key == "weight" or _same(whole, [{k: v for k, v in m.items() if k != key} for m in messages], tools, render):
            raise DataError(
                f"the chat template leaves {key} out. Give a data.chat_template that writes it, or drop it."
            )
    if tools and _same(render(messages, tools), messages, None, render):
        raise DataError("the chat template leaves tools out. Give a data.chat_template that writes them, or drop them.")


def _says(message: Message, key: str) -> bool:
    return key in message and not (key == "weight" and message[key] == 1)


def _same(whole: Any, messages: Sequence[Message], tools: Any, render: Callable[[Sequence[Message], Any], Any]) -> bool:
    try:
        return bool(render(messages, tools) == whole)
    except DataError:
        return False  # the template needs it
