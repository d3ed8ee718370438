"""Names, texts and messages out of files: every letter is shown on terminal and page, and none is obeyed."""

from __future__ import annotations

import ast
import json
import warnings
from io import StringIO
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from spectune import cli
from spectune.cli.progress import Bytes, Stages
from spectune.cli.terminal import Console, say
from spectune.errors import AdapterError, one_line, printable
from spectune.pages.run_page import render
from spectune.recipes.recipe import Shown
from spectune.records import Weight
from spectune.runs import Example, Metric
from spectune.spectrum import BasisCache, Key, Request, decompose
from spectune.tuner.progress import ticking

from ..pages.records import bare_record
from .test_foreign_code import command

# Clears the screen, sets the title, an 8-bit CSI, a line drawn over, a direction override, a hidden letter, a half.
STEERING = "\x1b[2J\x1b]0;owned\x07\x9b31m\rover\u202egnp.exe\u200b\ud800"
SHOWN = r"\x1b[2J\x1b]0;owned\x07\x9b31m\rover\u202egnp.exe\u200b\ud800"
MARKUP = "[bold red]x[/] [link=http://x.y]z[/link] [/nothing] :bomb:"


def is_plain(words: str) -> bool:
    return all(letter.isprintable() or letter in "\n\t" for letter in words)


def test_every_letter_is_shown_once() -> None:
    assert printable(STEERING) == SHOWN
    assert printable("a\n\tb\x1b", "\n\t") == "a\n\tb\\x1b"
    assert printable("héllo 世界") == "héllo 世界"
    assert one_line(ValueError("a\nb\x1b[2J")) == r"a b\x1b[2J"
    assert one_line(ValueError()) == "ValueError"
    assert str(AdapterError(STEERING)) == SHOWN


def test_lines_titles_cells_and_rules_are_words() -> None:
    from rich.table import Table

    place = StringIO()
    console = Console(file=place, width=400, force_terminal=False)
    table = Table(STEERING + MARKUP, title=STEERING + MARKUP)
    table.add_row(STEERING + MARKUP)
    console.print(table)
    console.print(STEERING + MARKUP)
    console.rule(STEERING + MARKUP)
    said = place.getvalue()
    assert is_plain(said)
    assert said.count(SHOWN) == said.count(MARKUP) == 5


def test_progress_shows_names_as_they_are() -> None:
    place = StringIO()
    with Bytes(Console(file=place, width=400)) as bars:
        bars.begin(STEERING + MARKUP, 2)
        bars.add_task("more", total=1, said=STEERING + MARKUP)
    with Stages(Console(file=place, width=400)) as stages:
        stages.begin(STEERING + MARKUP, 2)(2, 2, None)
    assert is_plain(place.getvalue())
    assert place.getvalue().count(SHOWN) == place.getvalue().count(MARKUP) == 3
    terminal = StringIO()
    with Stages(Console(file=terminal, width=400, force_terminal=True, color_system=None)) as stages:
        stages.begin(STEERING + MARKUP, 2)
    assert SHOWN in terminal.getvalue() and MARKUP in terminal.getvalue() and "owned\x07" not in terminal.getvalue()


def test_the_bar_of_attaching_shows_layers_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    import rich.console

    place = StringIO()
    terminal = rich.console.Console(file=place, width=200, force_terminal=True, color_system=None)
    monkeypatch.setattr("rich.console.Console", lambda **_: terminal)
    monkeypatch.setattr("spectune.tuner.progress.SILENT_SECONDS", -1.0)
    with ticking("decomposed {} weights") as tick:
        tick(STEERING + "[bold]x[/bold]")
    assert "owned\x07" not in place.getvalue() and "\u202e" not in place.getvalue()
    assert "[bold]x[/bold]" in place.getvalue()


def test_plain_words_go_through_the_same_door(capsys: pytest.CaptureFixture[str]) -> None:
    say(STEERING + "\n" + MARKUP)
    assert capsys.readouterr().out == f"{SHOWN}\n{MARKUP}\n"


def test_no_command_prints_past_the_door() -> None:
    """`print` is for JSON, which escapes by itself, and for our own words."""
    found = []
    for path in sorted(Path(cli.__file__).parent.glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module == "rich.console":
                found.append(f"{path.name}: rich's own console")
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "print" and path.name != "terminal.py":
                words = ast.unparse(node.args[0])
                own = path.name == "init.py" or words.startswith(("json.dumps(", "f'spectune: {printable("))
                if not own:
                    found.append(f"{path.name}: print({words})")
            if isinstance(node, ast.keyword) and node.arg == "ensure_ascii":
                found.append(f"{path.name}: letters of JSON as they are")
            if isinstance(node, ast.keyword) and node.arg == "markup" and ast.unparse(node.value) != "False":
                found.append(f"{path.name}: markup")
    assert found == []


def test_an_unexpected_error_is_one_visible_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError(STEERING + "\nsecond line")

    monkeypatch.setattr("spectune.spectrum.default_folder", fail)
    assert command("cache", "ls") == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and is_plain(said) and r"\x1b[2J" in said


def test_a_warning_is_shown_plainly_by_a_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)

    def warn() -> Path:
        print(warnings.formatwarning(STEERING, UserWarning, "a.py", 1), end="")
        return Path("nowhere")

    monkeypatch.setattr("spectune.spectrum.default_folder", warn)
    assert command("cache", "ls") == 0
    assert is_plain(capsys.readouterr().out)


def test_a_list_of_the_cache_shows_names_as_they_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    W_OI = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
    name = (STEERING + MARKUP).replace("\ud800", "")  # which safetensors does not write
    weight = Weight(name, W_OI)
    BasisCache(tmp_path).store(Key.of(weight), decompose(weight, 2), Request(2))
    assert command("cache", "ls", "--cache", str(tmp_path)) == 0
    said = capsys.readouterr().out
    assert is_plain(said) and r"\x1b[2J" in said and "[bold" in said


def test_an_adapter_with_names_of_markup_is_inspected(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stem = "base_model.model.[link=http:x]q[/nothing]"
    tensors = {f"{stem}.lora_A.weight": torch.ones(2, 8), f"{stem}.lora_B.weight": torch.ones(8, 2)}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "base_model_name_or_path": STEERING}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    page = tmp_path / "page.html"
    assert command("inspect", str(tmp_path), "--quick", "--html", str(page)) == 0
    said = capsys.readouterr()
    assert is_plain(said.out) and is_plain(said.err)
    assert "[link=http:x]q[/nothing]" in said.out
    assert is_plain(page.read_text("utf-8"))


def test_a_page_shows_the_letters_that_steer(tmp_path: Path) -> None:
    record = bare_record(
        title=STEERING,
        task=STEERING,
        method=STEERING,
        config={"name": STEERING},
        compared=[Metric(name=STEERING, value=0.5)],
        examples=[Example(text=STEERING, expected=STEERING, predicted=STEERING)],
        looked_at=True,
    )
    page = render(record)
    page.encode()
    assert is_plain(page) and page.count(r"\x1b[2J") >= 7
    record.write(tmp_path / "result.json")
    (tmp_path / "run.yaml").write_text("")
    assert command("report", str(tmp_path)) == 0
    assert is_plain((tmp_path / "report.html").read_text("utf-8"))


def test_what_scripts_need_stays_on_a_page() -> None:
    assert "می\u200cخواهم" in render(bare_record(title="می\u200cخواهم"))


def test_an_example_of_check_is_shown_with_its_letters() -> None:
    from types import SimpleNamespace

    from spectune.cli.check import _example

    text = _example(SimpleNamespace(shown=Shown([(STEERING, True), ("\n", False)], STEERING)))  # type: ignore[arg-type]
    assert is_plain(text.plain) and text.plain.count(SHOWN) == 2
