"""The tutorials work as they are told: their files are written, their commands and Python lines run, in order.

Where a page names a model of the hub, a small one made here has its place.
"""

from __future__ import annotations

import re
import shlex
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from spectune.cli.app import app
from spectune.demo import base_folder
from spectune.recipes.conversations import template

from ..recipes import tiny

TUTORIALS = Path(__file__).parents[2] / "docs" / "tutorials"
BLOCK = re.compile(r'^```(\w+)(?: title="([^"]+)")?\n(.*?)^```', re.M | re.S)


def chat_model(folder: Path) -> str:
    words = tiny.tokenizer()
    words.chat_template = template(words, "plain")
    tiny.llama(folder)
    words.save_pretrained(folder)
    return str(folder)


MODELS: dict[str, Callable[[Path], str]] = {
    "sentence-transformers/all-MiniLM-L6-v2": lambda folder: str(base_folder()),
    "HuggingFaceTB/SmolLM2-135M-Instruct": chat_model,
    "google/vit-base-patch16-224-in21k": tiny.vit,
}


def follow(page: Path, models: dict[str, str]) -> list[str]:
    """Do what a page says in the current folder; get its commands."""
    done = []
    for language, title, text in BLOCK.findall(page.read_text(encoding="utf-8")):
        for name, folder in models.items():
            text = text.replace(name, folder)
        if title:
            Path(title).write_text(text, encoding="utf-8")
        elif language == "python":
            exec(compile(text, page.name, "exec"), {"__name__": "__main__"})
        elif language == "console":
            for line in text.splitlines():
                run(line.removeprefix("$ "))
                done.append(line)
    return done


def run(line: str) -> None:
    line, _, file = line.partition(" > ")
    program, *words = shlex.split(line)
    assert program == "spectune"
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, f"{line}: {result.output} {result.exception}"
    if file:
        Path(file).write_text(result.stdout, encoding="utf-8")


JOURNEYS = {
    "a CSV file of one's own, a sweep, all commands": (
        ["first-run", "first-sweep", "tour"],
        ["first/report.html", "first-lora/adapter_model.safetensors", "sweep/comparison.html", "pictures.yaml",
         "lr.html", "first-merged/model.safetensors", "smaller/adapter_model.safetensors", "both/adapter_config.json"],
    ),
    "chats of one's own on a 4-bit base, five readers of the adapter": (
        ["chat-model", "five-readers"],
        ["shop/report.html", "shop-lora/adapter_model.safetensors", "shop-merged/model.safetensors",
         "from-sharegpt/result.json", "from-alpaca/result.json", "from-pairs/result.json",
         "shop-for-all/adapter_model.safetensors", "shop-whole/chat_template.jinja", "shop-gguf/adapter.gguf",
         "shop-ollama/Modelfile"],
    ),
    "pictures of one's own": (
        ["pictures"],
        ["shapes-run/report.html", "shapes-lora/adapter_config.json", "shapes-merged/config.json"],
    ),
    "Python": (["first-adapter"], ["my-adapter-as-lora/adapter_model.safetensors"]),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("journey", JOURNEYS)
def test_the_pages_of_a_journey_can_be_followed(journey: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pages, files = JOURNEYS[journey]
    if "chat-model" in pages:
        pytest.importorskip("bitsandbytes")
        pytest.importorskip("trl")
    models = {name: make(tmp_path / Path(name).name) for name, make in MODELS.items()}
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    with warnings.catch_warnings():
        warnings.simplefilter("default")  # a reader sees them
        for page in pages:
            follow(TUTORIALS / f"{page}.md", models)
    assert [name for name in files if not (here / name).is_file()] == []


def test_every_tutorial_is_in_a_journey() -> None:
    assert {page.stem for page in TUTORIALS.glob("*.md")} == {page for pages, _ in JOURNEYS.values() for page in pages}
