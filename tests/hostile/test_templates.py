"""Chat templates of strangers: what they may try, and that each ends in one line."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest
import yaml

from spectune.checkpoint import chat_rendering
from spectune.checkpoint.chat_rendering import rendered
from spectune.errors import OptionError
from tests.recipes import tiny

from .test_foreign_code import command

TALK = [{"role": "user", "content": "w1 w2"}, {"role": "assistant", "content": "w3"}]
LOOP = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
BAD: dict[str, tuple[str, str]] = {
    "a loop in a loop": (LOOP, "takes more than"),
    "a macro that loops": ("{% macro m() %}" + LOOP + "{% endmacro %}{{ m() }}", "takes more than"),
    "a huge range": ("{% for i in range(10**9) %}{% endfor %}", "Range too big"),
    "Python behind a class": ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "cannot use"),
    "Python behind a function": ("{{ raise_exception.__globals__['os'].system('x') }}", "cannot use"),
    "changing what it is given": ("{{ messages.append(1) }}", "cannot use"),
    "its own message": ("{{ raise_exception('\\x1b[2J\\u202e') }}", r"\\x1b\[2J\\u202e"),
    "no syntax": ("{% for %}", "cannot use"),
    "an unknown name": ("{{ nothing.of.this }}", "cannot use"),
    "a division by zero": ("{{ 1 / 0 }}", "division by zero"),
    "endless macros": ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "cannot use"),
    "an include": ("{% include '/etc/passwd' %}", "cannot use"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_template_is_one_line(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    template, words = BAD[case]
    if "loop" in case or "range" in case:  # whatever else ends by itself should not race against a short time
        monkeypatch.setattr(chat_rendering, "SECONDS", 0.2)
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(OptionError, match=words) as refused:
        rendered(tokenizer, TALK)
    assert str(refused.value).isprintable()


def test_an_honest_template_is_rendered_as_by_transformers() -> None:
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }} : {{ m['content'] }} {% endfor %}"
    assert rendered(tokenizer, TALK) == tokenizer.apply_chat_template(TALK, tokenize=True, return_dict=True)


def test_a_template_is_stopped_in_any_thread_and_nothing_arrives_later(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_rendering, "SECONDS", 0.1)
    tokenizer, found = tiny.tokenizer(), []

    def work() -> None:
        tokenizer.chat_template = LOOP
        try:
            rendered(tokenizer, TALK)
        except OptionError as error:
            found.append(str(error))
        tokenizer.chat_template = "{{ messages[0]['content'] }}"
        found.extend(rendered(tokenizer, TALK)["input_ids"] for _ in range(20))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert "takes more than" in str(found[0]) and len(found) == 21


@pytest.mark.parametrize("door", ["check", "train"])
def test_a_command_ends_in_one_line(
    door: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chat_rendering, "SECONDS", 0.2)
    run = tiny.lm_run(tmp_path)
    (tmp_path / "talk.jsonl").write_text("".join(json.dumps({"messages": TALK}) + "\n" for _ in range(4)))
    run["data"] = {"format": "messages", "train": str(tmp_path / "talk.jsonl"), "max_tokens": 32}
    (Path(run["model"]) / "chat_template.jinja").write_text(LOOP)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run))
    assert command(door, str(tmp_path / "run.yaml"), *(["-o", str(tmp_path / "out")] if door == "train" else [])) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("spectune:")]
    assert "cannot use the chat template of this tokenizer" in line
