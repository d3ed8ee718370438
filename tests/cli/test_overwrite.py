"""`--overwrite` of every verb that writes an adapter or a model: the same option, and it deletes nothing else."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

from spectune.checkpoint import open_checkpoint
from spectune.cli.app import app
from spectune.errors import SpectuneError

from ..fusion.parts import base_folder, load_base, lora, save_adapter, spectral
from .test_options_in_messages import options

# Verb -> how it is called on a folder with a base, a tuned model, two adapters and a LoRA.
CALLS: dict[str, Callable[[Path], list[object]]] = {
    "export": lambda at: ["export", at / "dog", "--base", base_folder(at)],
    "export to merged": lambda at: ["export", at / "dog", "--base", base_folder(at), "--to", "merged"],
    "fuse": lambda at: ["fuse", at / "dog", at / "cat", "--weights", "1"],
    "extract": lambda at: ["extract", base_folder(at), at / "tuned", "--rank", "2"],
    "resize": lambda at: ["resize", at / "lora", "--rank", "1"],
}
# Those that have an output of their own kind: a run's folder, the demo's, a sweep that goes on.
OTHERS = {"train", "demo", "compare", "reproduce", "report", "lr", "check", "decompose", "generate", "inspect"}


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shelf")
    model = load_base(base_folder(folder))
    for parameter in model.parameters():
        parameter.data += 0.01 * torch.ones_like(parameter)
    model.save_pretrained(folder / "tuned")
    for seed, (name, config) in enumerate(
        {"dog": spectral("top"), "cat": spectral([3, 4, 5]), "lora": lora(2)}.items()
    ):
        save_adapter(folder, name, config, seed)
    return folder


def run(*words: object) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words])


def refusal(result: Result) -> str:
    assert isinstance(result.exception, SpectuneError), result.output
    return str(result.exception)


def old_output(shelf: Path, goal: Path) -> Path:
    shutil.copytree(shelf / "cat", goal)
    (goal / "adapter_config.json").write_text('{"peft_type": "OLD"}')
    return goal


@pytest.mark.parametrize("call", list(CALLS))
def test_a_full_folder_is_replaced_only_when_asked_and_only_if_it_is_an_adapter(
    call: str, shelf: Path, tmp_path: Path
) -> None:
    words, goal = CALLS[call](shelf), old_output(shelf, tmp_path / "out")
    before = sorted(path.name for path in goal.iterdir())
    assert "must be empty" in (said := refusal(run(*words, "-o", goal))) and "--overwrite" in said
    (goal / "thesis.docx").write_text("years")
    assert "thesis.docx in it is not part of" in refusal(run(*words, "-o", goal, "--overwrite"))
    (goal / "thesis.docx").unlink()
    (tmp_path / "link").symlink_to(goal)
    assert "this is a link" in refusal(run(*words, "-o", tmp_path / "link", "--overwrite"))
    assert (
        sorted(path.name for path in goal.iterdir()) == before and "OLD" in (goal / "adapter_config.json").read_text()
    )
    done = run(*words, "-o", goal, "--overwrite")
    assert done.exit_code == 0, done.output
    assert not (goal / "adapter_config.json").exists() or "OLD" not in (goal / "adapter_config.json").read_text()
    assert (goal / "adapter_model.safetensors").exists() or open_checkpoint(goal).names


@pytest.mark.parametrize("call", list(CALLS))
def test_what_is_read_is_never_replaced(call: str, shelf: Path) -> None:
    words = CALLS[call](shelf)
    for source in (word for word in words if isinstance(word, Path)):
        names = sorted(path.name for path in source.iterdir())
        assert "would replace" in refusal(run(*words, "-o", source, "--overwrite"))
        assert sorted(path.name for path in source.iterdir()) == names


def test_a_folder_that_is_not_an_adapter_is_kept(shelf: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    assert "so --overwrite keeps it" in refusal(run(*CALLS["export"](shelf), "-o", tmp_path, "--overwrite"))
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_one_file_is_replaced_by_one_file(shelf: Path, tmp_path: Path) -> None:
    kohya = {"lora_unet_q.lora_down.weight": torch.randn(2, 4), "lora_unet_q.lora_up.weight": torch.randn(4, 2)}
    from safetensors.torch import save_file

    save_file(kohya | {"lora_unet_q.alpha": torch.tensor(2.0)}, tmp_path / "old.safetensors")
    shutil.copy(tmp_path / "old.safetensors", tmp_path / "new.safetensors")
    words = ["resize", tmp_path / "old.safetensors", "--rank", "1", "-o"]
    assert "--overwrite" in refusal(run(*words, tmp_path / "new.safetensors"))
    assert "would replace" in refusal(run(*words, tmp_path / "old.safetensors", "--overwrite"))
    assert run(*words, tmp_path / "new.safetensors", "--overwrite").exit_code == 0
    assert open_checkpoint(tmp_path / "new.safetensors").shapes["lora_unet_q.lora_down.weight"] == (1, 4)


def test_every_verb_that_writes_a_folder_has_the_option_or_another_way() -> None:
    writing = {verb for verb, words in options().items() if "--output" in words}
    having = {verb for verb, words in options().items() if "--overwrite" in words}
    assert having == {"train", "demo", *(call.split()[0] for call in CALLS)}
    assert writing - having <= OTHERS
