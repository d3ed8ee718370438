"""Folders for Ollama: the Modelfile, and a chat template as the texts around messages or not at all."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from spectune.cli.app import app
from spectune.export.chat_turns import NoTurnsError, turns_of

from ..abilities import needs_gguf
from ..models import MODELS
from .test_gguf import saved
from .words import tokenizer

pytest.importorskip("gguf")
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
QWEN = "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are Q.<|im_end|>\n{% endif %}" + CHATML
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}]\n\n{{ m.content | trim }}</s>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]\n\n{% endif %}"
)
COUNTS = "{% for m in messages %}{{ loop.index }}: {{ m.content }}\n{% endfor %}"
SHOUTS = "{% for m in messages %}{{ m.content | upper }}\n{% endfor %}"
LONG = CHATML + "{% if messages | length > 4 %}This is long.{% endif %}"
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}" + CHATML


def with_template(text: str) -> Any:
    words = tokenizer("gpt-2")
    words.chat_template = text
    return words


@pytest.mark.parametrize("text", [CHATML, QWEN, LLAMA3, NO_SYSTEM])
def test_turns_render_as_the_template_does(text: str) -> None:
    words = with_template(text)
    turns = turns_of(words)
    roles = ("user", "assistant", "user", "assistant", "user")
    talk = [{"role": role, "content": f"c{place}"} for place, role in enumerate(roles)]
    wanted = words.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
    assert turns.render(talk) == wanted
    assert (turns.default_system == "You are Q.") == (text == QWEN) and turns.trims == (text == LLAMA3)
    assert ("system" in turns.around) == (text != NO_SYSTEM)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (COUNTS, "differently by their place"),
        (SHOUTS, "leaves a message out"),
        (LONG, "does more than put fixed texts"),
    ],
)
def test_a_template_that_does_more_is_not_written(text: str, why: str) -> None:
    with pytest.raises(NoTurnsError, match=why):
        turns_of(with_template(text))


def go(template: str, messages: list[dict[str, str]]) -> str:
    """Render the few words of Go's template language that a Modelfile of ours has."""
    opening, rest = template.split("{{ range .Messages }}{{ ")
    loop, asks = rest.split("{{ end }}{{ end }}")
    cases = dict(re.findall(r'if eq \.Role "(\w+)" \}\}(.*?)(?=\{\{ else |\Z)', loop, re.S))
    return opening + "".join(cases[m["role"]].replace("{{ .Content }}", m["content"]) for m in messages) + asks


@needs_gguf
def test_the_modelfile_says_what_the_run_was_trained_with(tmp_path: Path) -> None:
    saved(MODELS["llama"].fresh(), tmp_path)
    words = with_template(CHATML)
    words.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    words.save_pretrained(tmp_path / "adapter")
    command = ["export", str(tmp_path / "adapter"), "--to", "ollama", "--ollama-base", "llama3.2:1b"]
    done = CliRunner().invoke(app, [*command, "-o", str(tmp_path / "out")])
    assert done.exit_code == 0 and "ollama create NAME -f Modelfile" in done.stdout, done.output
    assert {path.name for path in (tmp_path / "out").iterdir()} >= {"adapter.gguf", "Modelfile"}
    written = (tmp_path / "out" / "Modelfile").read_text()
    assert "FROM llama3.2:1b\nADAPTER ./adapter.gguf\n" in written
    assert 'PARAMETER stop "</s>"\nPARAMETER stop "<|im_end|>"\n' in written
    template = written.split('TEMPLATE """')[1].split('"""')[0]
    talk = [{"role": role, "content": role} for role in ("system", "user", "assistant", "user")]
    assert go(template, talk) == words.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)


@needs_gguf
@pytest.mark.parametrize("mark", ["{{ .System }}", "end }}", 'x"""\nSYSTEM """y', "\x1b[2J"])
def test_a_strangers_template_writes_no_line_of_a_modelfile(mark: str, tmp_path: Path) -> None:
    saved(MODELS["llama"].fresh(), tmp_path)
    words = with_template(CHATML.replace("<|im_end|>", "{{ " + repr(mark) + " }}"))
    words.add_special_tokens({"eos_token": '</s>"\nSYSTEM "y'})
    words.save_pretrained(tmp_path / "adapter")
    command = ["export", str(tmp_path / "adapter"), "--to", "ollama", "--ollama-base", "llama3.2:1b"]
    done = CliRunner().invoke(app, [*command, "-o", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    written = (tmp_path / "out" / "Modelfile").read_text()
    assert "# No TEMPLATE: its chat template has letters that a Modelfile cannot hold." in written
    ends = [line for line in written.splitlines() if line.startswith("PARAMETER")]
    assert 'TEMPLATE "' not in written and "SYSTEM" not in written
    assert ends == ['PARAMETER stop "</s>"']  # of the base; the tokenizer's would end the line


@needs_gguf
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_a_folder_holds_all_that_its_modelfile_names(tmp_path: Path) -> None:
    saved(MODELS["llama"].fresh(), tmp_path)
    command = ["export", str(tmp_path / "adapter"), "--to", "ollama", "-o", str(tmp_path / "out"), "--overwrite"]
    for more, files in ([], {"adapter.gguf", "base.gguf"}), (["--merged"], {"model.gguf"}):
        done = CliRunner().invoke(app, [*command, *more])
        assert done.exit_code == 0, done.output
        written = (tmp_path / "out" / "Modelfile").read_text()
        assert set(re.findall(r"^(?:FROM|ADAPTER) \./(.*)$", written, re.M)) == files
        assert {path.name for path in (tmp_path / "out").glob("*.gguf")} == files
        assert "# No TEMPLATE: neither the adapter nor the base has a tokenizer." in written
    done = CliRunner().invoke(app, [*command, "--merged", "--ollama-base", "x"])
    assert "a merged model needs no base" in str(done.exception)
