"""The front of the command line: groups, examples, versions, hints, and what a log shows of long work."""

from __future__ import annotations

import io
import re
import shlex
import subprocess
import sys
from typing import Any

import pytest
import typer.main
from typer.testing import CliRunner

from spectune import METHODS
from spectune.cli.app import app
from spectune.cli.progress import Stages, line_every
from spectune.cli.terminal import Console
from spectune.cli.verbs import VERBS
from spectune.errors import nearest
from spectune.other_words import ADVICE, OUR_WORDS


@pytest.mark.parametrize("verb", VERBS)
def test_the_example_of_a_verb_is_in_its_help_and_is_right_usage(verb: str) -> None:
    example = VERBS[verb][1]
    shown = CliRunner().invoke(app, [verb, "-h"], env={"COLUMNS": "200"})
    assert shown.exit_code == 0 and f"Example: {example}" in shown.output
    program, asked, *words = shlex.split(example.partition(" > ")[0])
    assert (program, asked) == ("spectune", verb)
    group: Any = typer.main.get_command(app)
    group.commands[verb].make_context(verb, words)  # raises for an option or an argument that it does not have


def test_every_verb_stands_in_a_group() -> None:
    shown = CliRunner().invoke(app, ["--help"]).output
    assert "Commands" not in shown
    for group in {group for group, _ in VERBS.values()}:
        assert f"─ {group} ─" in shown


def test_the_version_needs_no_torch() -> None:
    words = "import sys; from spectune.cli.app import main; sys.argv = ['spectune', '--version']\n"
    words += "try: main()\nexcept SystemExit as end: assert not end.code\nassert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", words], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("spectune 0.")
    again = subprocess.run([sys.executable, "-m", "spectune", "--version"], capture_output=True, text=True, check=True)
    assert again.stdout == done.stdout


@pytest.mark.parametrize(
    ("asked", "known", "proposed"),
    [
        ("q_proj", ["dense", "key", "query", "value"], "'query'"),
        ("query", ["k_proj", "o_proj", "q_proj", "v_proj"], "'q_proj'"),
        ("v_proj", ["c_attn", "c_proj", "c_fc"], "'c_attn'"),
        ("rank", ["basis_rank", "r", "rank_pattern"], "'r'"),
        ("rank", ["ranks"], "'ranks'"),
        ("sft", ["causal_lm", "text_classification"], "'causal_lm'"),
    ],
)
def test_a_word_of_another_tool_is_known(asked: str, known: list[str], proposed: str) -> None:
    assert nearest(asked, known) == f"Did you mean {proposed}?"


def test_no_word_of_ours_is_taken_for_another_tools() -> None:
    ours = {word for words in OUR_WORDS.values() for word in words}
    assert not ours & set(OUR_WORDS)


def test_what_is_advised_for_a_dropout_exists() -> None:
    assert [name for name, method in METHODS.items() if "weight_dropout" in method.options()] == ["specadapt"]
    assert re.findall(r"\w+_\w+|specadapt|svft", ADVICE["lora_dropout"]) == ["specadapt", "weight_dropout"]


def test_a_log_gets_a_line_every_twentieth_of_the_work() -> None:
    written = io.StringIO()
    with Stages(Console(file=written, width=40)) as stages:
        step = stages.begin("spectral_a", 100)
        for done in range(1, 101):
            step(done, 100, 1 / done)
    lines = written.getvalue().splitlines()
    assert len(lines) == 20
    assert lines[0].startswith("spectral_a: 5 of 100, loss 0.200") and lines[-1].startswith("spectral_a: 100 of 100")
    assert "left" not in lines[-1]


def test_a_bar_that_starts_with_its_first_step_starts_once() -> None:
    written = io.StringIO()
    with Stages(Console(file=written, width=40)) as stages:
        step = stages.lazily("layers")
        assert stages.tasks == []
        step(1, 2, "model.layers.0"), step(2, 2, "model.layers.1")
        assert [task.description for task in stages.tasks] == ["layers"]
    assert [line.split(",")[0] for line in written.getvalue().splitlines()] == ["layers: 1 of 2", "layers: 2 of 2"]


def test_lines_come_at_least_every_500_steps() -> None:
    assert [line_every(steps) for steps in (1, 19, 40, 10_000, 10**6)] == [1, 1, 2, 500, 500]


def test_a_terminal_gets_a_bar_and_no_lines() -> None:
    written = io.StringIO()
    with Stages(Console(file=written, force_terminal=True, width=120)) as stages:
        step = stages.begin("spectral_a", 2)
        step(2, 2, 0.5)
    assert "2/2" in written.getvalue() and "2 of 2" not in written.getvalue()
