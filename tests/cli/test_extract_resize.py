"""`spectune extract` and `spectune resize`, as the command line runs them, in this process."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel

from spectune.cli import main

from ..models import MODELS, output

TINY = MODELS["bert"]


def spectune(*words: str) -> int:
    """Run one command in the current folder; get its exit status."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["spectune", *words])
        with pytest.raises(SystemExit) as stopped:
            main()
    return int(stopped.value.code or 0)


@pytest.fixture(scope="module")
def trio(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base and a tuned model, and a LoRA of rank 8 out of them."""
    folder = tmp_path_factory.mktemp("extract")
    TINY.fresh().save_pretrained(folder / "base")
    tuned = TINY.fresh()
    generator = torch.Generator().manual_seed(1)
    for parameter in tuned.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    tuned.save_pretrained(folder / "tuned")
    return folder


@pytest.fixture
def models(trio: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(trio)
    if not (trio / "lora").exists():
        assert spectune("extract", "base", "tuned", "-o", "lora", "--json") == 0
    return trio


def test_extracting_says_what_is_kept_and_what_is_left_out(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert spectune("extract", "base", "tuned", "-o", "again", "--rank", "8") == 0
    said = capsys.readouterr().out
    assert "the written file keeps" in said and "of |dW|² of the 13 adapted layers" in said
    assert "left out: 28 changed tensors" in said and "classifier.weight" in said and "head" in said
    assert "kinds of layers: from BertForSequenceClassification" in said
    assert (models / "again" / "adapter_model.safetensors").exists()


def test_a_spectral_adapter_with_the_rest_is_the_tuned_model(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert (
        spectune(
            *["extract", "base", "tuned", "-o", "spectral", "--to", "spectral_a", "-r", "32", "--save-rest", "--json"]
        )
        == 0
    )
    found = json.loads(capsys.readouterr().out)
    assert found["form"] == "spectral_a" and found["kept"] > 1 - 1e-6 and all(t["saved"] for t in found["rest"])
    reached = output(PeftModel.from_pretrained(TINY.fresh(), models / "spectral").eval(), TINY.inputs())
    tuned = type(TINY.fresh()).from_pretrained(models / "tuned").eval()
    torch.testing.assert_close(reached, output(tuned, TINY.inputs()), rtol=0, atol=1e-5)


def test_columns_are_words_numbers_or_lists(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words, columns, r in (("bottom", "bottom", 2), ("3", 3, 2), ("0,2,5", [0, 2, 5], 3)):
        rank = ["--rank", "2"] if r == 2 else []
        target = f"columns-{words}"
        command = ["extract", "base", "tuned", "-o", target, "--to", "spectral_a", "--columns", words, *rank]
        assert spectune(*command, "--exclude", "encoder.layer.1", "--json") == 0
        config = json.loads((models / target / "adapter_config.json").read_text())
        assert (config["columns"], config["r"]) == (columns, r)


def test_resizing_prints_ranks_losses_and_sizes(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert spectune("resize", "lora", "-o", "smaller", "--rank", "4", "--dtype", "bfloat16") == 0
    said = capsys.readouterr().out
    assert "largest loss in a layer:" in said and "bytes; LoRA written to smaller" in said
    assert spectune("resize", "lora", "-o", "same", "--energy", "1", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert {layer["rank"] for layer in found["layers"]} == {8} and found["worst_loss"] < 1e-9
    assert spectune("resize", "lora", "-o", "kept", "--rank", "99") == 0
    assert "13 of 13 layers keep their rank" in capsys.readouterr().out


FAILURES = [
    (["extract", "base", "base", "-o", "out"], 1, "are equal to those of base"),
    (["extract", "base", "nowhere", "-o", "out"], 1, "nowhere: a model is needed, but there is no folder"),
    (["extract", "base", "tuned", "-o", "lora"], 1, "contains 2 entries"),
    (["extract", "base", "tuned", "-o", "out", "--columns", "1,x"], 1, "--columns 1,x: must be top"),
    (["extract", "base", "tuned", "-o", "out", "--to", "spectral_a", "--columns", "tpo"], 1, "Did you mean 'top'"),
    (["resize", "lora", "-o", "out"], 1, "nothing says how much to keep"),
    (["resize", "base", "-o", "out", "--rank", "2"], 1, "contains no pair of factors"),
    (["resize", "lora", "-o", "out", "--rank", "2", "--share", "0.5"], 1, "cut each layer on its own"),
    (["resize", "lora", "-o", "out", "--rank", "2", "--calibrate", "run"], 1, "Give --share, such as --share 0.25"),
    (["resize", "lora", "-o", "out", "--share", "0.0001"], 1, "less than one direction"),
    (["resize", "lora", "-o", "out", "--rank", "two"], 2, "valid integer"),
]


@pytest.mark.parametrize(("words", "status", "line"), FAILURES, ids=[" ".join(words) for words, _, _ in FAILURES])
def test_failures_are_one_line_and_a_status(
    words: list[str], status: int, line: str, models: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    capfd.readouterr()
    assert spectune(*words) == status
    said = capfd.readouterr()
    assert line in said.err and "Traceback" not in said.err and said.out == ""
    assert not (models / "out").exists()
