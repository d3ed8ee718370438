"""Conversations in the forms that data sets have them: what is said is rendered, or refused with its row."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from spectune.errors import DataError
from spectune.recipes import parse_config
from spectune.recipes.conversations import prepared
from spectune.recipes.data import Row
from spectune.recipes.messages import SPEAKERS, read_messages
from spectune.recipes.table import recipe_class
from spectune.runs import dry_run

from . import tiny

ASKED = {"role": "user", "content": "w1"}
CALL = {"type": "function", "function": {"name": "w7", "arguments": '{"w8": "w9"}'}}
CALLING: dict[str, Any] = {"role": "assistant", "content": None, "tool_calls": [CALL]}
TOOLS = [{"type": "function", "function": {"name": "w7", "parameters": {}}}]
WRITES_ALL = (
    "{% for t in tools or [] %}{{ t['function']['name'] }} {% endfor %}"
    "{% for m in messages %}{{ m['role'] }} : {{ m['content'] }} "
    "{% for c in m['tool_calls'] or [] %}{{ c['function']['name'] }} "
    "{% for k, v in c['function']['arguments'].items() %}{{ k }} {{ v }} {% endfor %}{% endfor %}"
    "{{ eos_token if m['role'] == 'assistant' else '' }} {% endfor %}"
    "{% if add_generation_prompt %}assistant :{% endif %}"
)


def talk(folder: Path, row: dict[str, Any], template: str = "plain") -> dict[str, Any]:
    (folder / "talk.jsonl").write_text(json.dumps({"messages": [ASKED, {"role": "assistant", "content": "w2"}]}) + "\n")
    with (folder / "talk.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")
    if template != "plain":
        (folder / "t.jinja").write_text(template)
        template = str(folder / "t.jinja")
    data = {"train": str(folder / "talk.jsonl"), "test": None, "prompt": None, "completion": None, "format": "messages"}
    return tiny.lm_run(folder, data=data | {"chat_template": template, "max_tokens": 64})


def shown(values: dict[str, Any]) -> str:
    config = parse_config(values)
    recipe: Any = recipe_class(config.recipe)(config)
    return " ".join(recipe.processing.convert_ids_to_tokens(recipe.rows("train")[1]["input_ids"]))


@pytest.mark.parametrize(
    ("row", "line"),
    [
        ({"messages": [ASKED, CALLING]}, "the chat template leaves tool_calls out"),
        ({"messages": [ASKED, ASKED | {"role": "assistant"}], "tools": TOOLS}, "the chat template leaves tools out"),
        ({"messages": [ASKED, ASKED | {"role": "assistant", "reasoning_content": "w3"}]}, "leaves reasoning_content"),
        ({"messages": [ASKED, ASKED | {"role": "assistant", "weight": 0}]}, "leaves weight out"),
        ({"messages": [ASKED, {"role": "assistant", "content": None}]}, "message 2: the content of assistant is null"),
        ({"messages": [{"role": "user"}, ASKED | {"role": "assistant"}]}, "message 1: the content of user is null"),
        (
            {"messages": [ASKED, {"role": "assistant", "content": 7}]},
            "message 2: the content of assistant must be text, not int",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}, ASKED | {"role": "assistant"}]},
            "message 1: the content of user has a part of type 'image_url'",
        ),
        (
            {"messages": [ASKED | {"role": "usser"}, ASKED | {"role": "assistant"}]},
            "ignores the role 'usser'. Did you mean",
        ),
        ({"messages": [ASKED]}, "must end with an answer of the assistant"),
        ({"messages": "w1"}, "messages must be a list, not str"),
        (
            {"conversations": [{"from": "humann", "value": "w1"}]},
            "message 1: the speaker 'humann' is unknown. Did you",
        ),
    ],
)
def test_what_cannot_be_learned_is_refused_with_its_row(row: dict[str, Any], line: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=rf"talk.jsonl, row 2: .*{line}"):
        dry_run(parse_config(talk(tmp_path, row)))


def test_tool_calls_and_tools_go_through_a_template_that_writes_them(tmp_path: Path) -> None:
    found = shown(talk(tmp_path, {"messages": [ASKED, CALLING], "tools": json.dumps(TOOLS)}, WRITES_ALL))
    assert found == "w7 user : w1 [UNK] : w7 w8 w9 [SEP]"


def test_empty_keys_of_a_parquet_file_are_nothing(tmp_path: Path) -> None:
    empty = {"tool_calls": None, "reasoning_content": "", "weight": 1}
    row = {"messages": [ASKED | empty, {"role": "assistant", "content": "w2", **empty}], "tools": None}
    assert shown(talk(tmp_path, row)) == "User : w1 Assistant : w2 [SEP]"


def test_texts_in_parts_are_joined(tmp_path: Path) -> None:
    parts = [{"type": "text", "text": "w1 "}, {"type": "text", "text": "w3"}]
    row = {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": "w2"}]}
    assert shown(talk(tmp_path, row)) == "User : w1 w3 Assistant : w2 [SEP]"


def test_a_template_that_refuses_a_conversation_names_its_row(tmp_path: Path) -> None:
    fussy = "{% if messages[0]['content'] == 'w5' %}{{ raise_exception('no w5') }}{% endif %}" + WRITES_ALL
    row = {"messages": [{"role": "user", "content": "w5"}, {"role": "assistant", "content": "w2"}]}
    with pytest.raises(DataError, match=r"talk.jsonl, row 2: the chat template refuses it: no w5"):
        dry_run(parse_config(talk(tmp_path, row, fussy)))


@pytest.mark.parametrize(("word", "role"), SPEAKERS.items())
def test_sharegpt_speakers_have_roles(word: str, role: str) -> None:
    assert read_messages([{"from": word.capitalize(), "value": "a"}]) == [{"role": role, "content": "a"}]


def test_a_sharegpt_file_is_read_with_its_column_of_the_system(tmp_path: Path) -> None:
    said = [{"from": "human", "value": "w1"}, {"from": "gpt", "value": "w2"}]
    row = {"id": 1, "system": "w9", "conversations": said}
    assert shown(talk(tmp_path, row)) == "[UNK] : w9 User : w1 Assistant : w2 [SEP]"
    row["conversations"] = [{"from": "system", "value": "w8"}, *said]
    with pytest.raises(DataError, match="row 2: there are both a system message and a column system"):
        shown(talk(tmp_path, row))


def test_a_row_without_messages_is_named() -> None:
    with pytest.raises(DataError, match="^a.json, row 3: format messages needs the column 'messages'. Did you mean"):
        prepared([Row({"mesages": []}, "a.json, row 3")], "messages", None, None, False)


@pytest.mark.parametrize("name", ["history", "system"])
def test_columns_that_alpaca_has_no_place_for_are_refused(name: str) -> None:
    row = {"instruction": "a", "output": "b", name: ""}
    assert prepared([row], "alpaca", None, None, False)
    with pytest.raises(DataError, match=f"data.train, row 1: alpaca's prompt does not use the column '{name}'"):
        prepared([row | {name: "c"}], "alpaca", None, None, False)


def test_prompt_and_completion_may_be_messages() -> None:
    row = {"prompt": [ASKED], "completion": [{"role": "assistant", "content": "b"}]}
    assert prepared([row], "prompt_completion", None, None, False) == [row]
    with pytest.raises(DataError, match="column 'prompt' is a list, not a text"):
        prepared([Row(row | {"completion": "b"})], "prompt_completion", None, None, False)
