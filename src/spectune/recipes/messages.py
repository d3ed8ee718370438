"""The messages of a conversation: OpenAI's role, content and tool calls, or ShareGPT's from and value."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..errors import DataError, nearest
from .data import is_missing

Message = dict[str, Any]
# ShareGPT's words for who speaks, as its descendants write them.
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
# Keys of a message that say something, besides role and content: a template that leaves them out would lose it.
CARRYING = ("tool_calls", "function_call", "reasoning_content", "reasoning", "thinking", "weight")


def conversation(messages: Any, tools: Any = None, system: Any = None) -> dict[str, Any]:
    """Get prompt (everything before the last answer), completion (the last answer) and, where there are any, tools.

    `system` is the column of that name, which becomes the first message.
    """
    turns = read_messages(messages)
    if not _is_empty(system):
        if any(turn["role"] == "system" for turn in turns):
            raise DataError("there is a system message and a column system. Leave one out.")
        turns = [*read_messages([{"role": "system", "content": system}]), *turns]
    if len(turns) < 2 or turns[-1]["role"] != "assistant":
        raise DataError("a conversation must end with the assistant's answer to something.")
    return {"prompt": turns[:-1], "completion": turns[-1:]} | read_tools(tools)


def read_messages(messages: Any) -> list[Message]:
    """Get the messages with role and content; `DataError` counts to the one that is not in order."""
    if not isinstance(messages, (list, tuple)):
        raise DataError(f"messages must be a list, found {type(messages).__name__}.")
    found = []
    for number, message in enumerate(messages, 1):
        try:
            found.append(_message(message))
        except DataError as error:
            raise DataError(f"message {number}: {error}") from None
    return found


def read_tools(tools: Any) -> dict[str, Any]:
    """Get `tools` as a chat template takes them, nothing where there are none; JSON in a text is read."""
    if is_missing(tools) or tools in ("", []):
        return {}
    try:
        found = json.loads(tools) if isinstance(tools, str) else tools
    except ValueError:
        found = None
    if not isinstance(found, list) or not all(isinstance(tool, dict) for tool in found):
        raise DataError(f"tools must be a list of descriptions, found {str(tools)[:40]!r}.")
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
            raise DataError(f"the speaker {who!r} is not known. {nearest(str(who), list(SPEAKERS))}")
    if not isinstance(role, str) or not role:
        raise DataError(f"the role is {role!r}, not a word.")
    more = {k: v for k, v in message.items() if k not in ("role", "content", "from", "value") and not _is_empty(v)}
    if "tool_calls" in more:
        more["tool_calls"] = _calls(more["tool_calls"])
    said = "" if is_missing(said) and "tool_calls" in more else said
    return {"role": role, "content": _content(said, str(who)), **more}


def _is_empty(value: Any) -> bool:
    return is_missing(value) or value in ("", [], {})


def _content(said: Any, who: str) -> str:
    """Get a message's text; a list of parts is joined where all are texts."""
    if isinstance(said, list):
        kinds = [part.get("type", "?") if isinstance(part, Mapping) else "text" for part in said]
        other = next((kind for kind in kinds if kind != "text"), None)
        if other is not None:
            raise DataError(f"what {who} says has a part of type {other!r}. Only texts are learned.")
        said = "".join(str(part.get("text", "")) if isinstance(part, Mapping) else str(part) for part in said)
    if is_missing(said):
        raise DataError(f"what {who} says is null. Fill it in, or take the row out.")
    if not isinstance(said, str):
        raise DataError(f"what {who} says is of type {type(said).__name__}, not a text.")
    return said


def _calls(calls: Any) -> list[Any]:
    """Get tool calls with their arguments as templates take them: read, where OpenAI writes JSON in a text."""
    if not isinstance(calls, list) or not all(isinstance(call, Mapping) for call in calls):
        raise DataError(f"tool_calls must be a list of calls, found {str(calls)[:40]!r}.")
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
    """Raise `DataError` for what the chat template leaves out: a tool call, tools, thoughts, a role without a word.

    A key is used where the rendering without it is another one.
    """
    for role in dict.fromkeys(str(message["role"]) for message in messages):
        if role not in ROLES and role not in template:
            raise DataError(f"the chat template knows no role {role!r}. {nearest(role, ROLES)}")
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
        return False  # the template insists on it
