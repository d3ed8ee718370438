"""`spectune chat`: turns, commands and the untouched model, on stand-ins and on a tiny run."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from spectune.cli.app import app
from spectune.cli.chat import Talk
from spectune.errors import OptionError
from spectune.recipes import parse_config
from spectune.runs import train_run

from ..recipes import tiny


class Echo:
    """A recipe and a model that answer with what they were asked."""

    processing = None

    def __init__(self, talks: bool) -> None:
        self.talks, self.asked, self.on, self.by = talks, list[Any](), True, list[str]()

    def as_prompt(self, text: str) -> Any:
        return [{"role": "user", "content": text}] if self.talks else f"Q: {text}"

    def generate(self, model: Any, prompts: list[Any], streamer: Any, **options: Any) -> list[str]:
        self.asked.append(prompts[0])
        self.by.append("the adapter" if model.on else "the base")
        return [f" answer {len(self.asked)}"]

    @contextmanager
    def disable_adapter(self) -> Any:
        self.on = False
        yield
        self.on = True


@pytest.fixture(autouse=True)
def silent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spectune.cli.chat._streamer", lambda recipe: None)


def talk(talks: bool) -> tuple[Talk, Echo]:
    echo: Any = Echo(talks)
    return Talk(echo, echo, {}), echo


def test_earlier_turns_are_part_of_what_is_asked() -> None:
    talking, echo = talk(True)
    talking.hear("one"), talking.hear("two")
    assert [turn["content"] for turn in echo.asked[1]] == ["one", "answer 1", "two"]
    talking.hear("/reset"), talking.hear("three")
    assert [turn["content"] for turn in echo.asked[2]] == ["three"]


def test_where_a_run_knows_no_turns_every_line_is_a_prompt_of_its_own() -> None:
    talking, echo = talk(False)
    talking.hear("one"), talking.hear("two")
    assert echo.asked == ["Q: one", "Q: two"]


def test_the_base_answers_the_same_and_is_not_part_of_the_conversation() -> None:
    talking, echo = talk(True)
    talking.hear("one"), talking.hear("/base"), talking.hear("two")
    assert echo.asked[1] == echo.asked[0] and echo.by == ["the adapter", "the base", "the adapter"]
    assert [turn["content"] for turn in echo.asked[2]] == ["one", "answer 1", "two"]


def test_what_cannot_be_done_is_said() -> None:
    talking, _ = talk(True)
    with pytest.raises(OptionError, match="Ask something first"):
        talking.hear("/base")
    with pytest.raises(OptionError, match="/bsae is not a command. /base"):
        talking.hear("/bsae")
    talking.hear("one")
    talking.model = object()
    with pytest.raises(OptionError, match="trained all weights"):
        talking.hear("/base")


def test_a_run_is_talked_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("trl")
    monkeypatch.undo()
    train_run(parse_config(tiny.lm_run(tmp_path, training={"steps": 1})), tmp_path / "run")
    lines = "w1 w2\n\n/base\n/nonsense\n/quit\nw3\n"
    done = CliRunner().invoke(app, ["chat", str(tmp_path / "run"), "--max-new-tokens", "3"], input=lines)
    assert done.exit_code == 0, done.output
    answers = done.stdout.splitlines()[1:]
    assert answers[0] == answers[1] and len(answers) == 3  # one step changes no answer of the base
    assert answers[2].startswith("spectune: /nonsense is not a command")


def test_a_classifier_is_not_talked_to(tmp_path: Path) -> None:
    train_run(parse_config(tiny.text_run(tmp_path, training={"steps": 1})), tmp_path / "run")
    done = CliRunner().invoke(app, ["chat", str(tmp_path / "run")], input="w1\n")
    assert isinstance(done.exception, OptionError) and "does not write text" in str(done.exception)
