"""`spectune fuse` and `spectune schedule`, from words to folders."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from peft import PeftModel
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner, Result

from spectune.cli.app import app
from spectune.errors import AdapterError, DataError, OptionError

from ..fusion.parts import base_folder, load_base, lora, save_adapter, spectral
from .test_commands import spectune


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapters")
    words = {word: place for place, word in enumerate(["[UNK]", "a", "dog", "cat", "runs", "sleeps"])}
    split = Tokenizer(WordLevel(words, unk_token="[UNK]"))
    split.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=split, unk_token="[UNK]").save_pretrained(base_folder(folder))
    for seed, (name, config) in enumerate(
        {"dog": spectral("top"), "cat": spectral([3, 4, 5]), "clash": spectral([2, 6, 7]), "lora": lora(2)}.items()
    ):
        save_adapter(folder, name, config, seed)
    (folder / "dog.txt").write_text("a dog runs\n\na dog\n")
    (folder / "cat.jsonl").write_text('{"text": "a cat sleeps"}\n{"text": "cat"}\n')
    return folder


def run(*words: str | Path) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words])


def test_fuse_writes_the_adapter_and_prints_what_is_left(shelf: Path, tmp_path: Path) -> None:
    goal, page = tmp_path / "both", tmp_path / "report.html"
    done = run("fuse", shelf / "dog", shelf / "cat", "--weights", "1", "-o", goal, "--report", page)
    assert done.exit_code == 0, done.output
    assert "strength kept" in done.output and "spectral_a written to" in done.output
    assert "exports to a LoRA of rank 12" in done.output and "<svg" in page.read_text()
    assert json.loads((goal / "adapter_config.json").read_text())["columns"] == [0, 1, 2, 3, 4, 5]
    PeftModel.from_pretrained(load_base(base_folder(shelf)), goal)


def test_json_says_it_all_and_without_output_nothing_is_written(shelf: Path) -> None:
    before = sorted(shelf.iterdir())
    done = run("fuse", shelf / "dog", shelf / "clash", "--allow-overlap", "--weights", "0.75,0.5", "--json")
    found = json.loads(done.stdout)
    assert found["weights"] == [0.75, 0.5] and found["pairs"][0]["shared_columns"] == [2]
    assert 0.5 < found["kept"]["dog"] < 1 and "path" not in found
    assert sorted(shelf.iterdir()) == before


def test_average_writes_a_lora_of_stated_rank(shelf: Path, tmp_path: Path) -> None:
    words = ["fuse", shelf / "dog", shelf / "lora", "--rule", "average", "-o", tmp_path / "out"]
    done = run(*words, "--json", "--max-rank", "4", "--allow-lossy")
    found = json.loads(done.stdout)
    assert found["kind"] == "lora" and found["max_rank"] == 4 and max(found["lost"].values()) > 0


@pytest.mark.parametrize("second", ["cat", "lora"])
def test_gradient_reads_the_examples_of_each_adapter(shelf: Path, tmp_path: Path, second: str) -> None:
    words = ["fuse", shelf / "dog", shelf / second, "--rule", "gradient", "-o", tmp_path / "out", "--json"]
    done = run(*words, "--examples", shelf / "dog.txt", "--examples", shelf / "cat.jsonl")
    assert done.exit_code == 0, done.output
    gradient = json.loads(done.stdout)
    assert gradient["rule"] == "gradient" and gradient["kind"] == "lora" and 0 < gradient["kept"]["dog"] < 1


def test_match_runs_the_base_on_the_examples_and_keeps_what_it_should(shelf: Path, tmp_path: Path) -> None:
    words = ["fuse", shelf / "dog", shelf / "lora", "--rule", "match", "--rank", "2", "-o", tmp_path / "out"]
    looks = ["--examples", shelf / "dog.txt", "--examples", shelf / "cat.jsonl"]
    done = run(*words, *looks, "--keep", shelf / "cat.jsonl", "--heads-apart")
    assert done.exit_code == 0 and "lora written to" in done.output and "of rank 2" in done.output, done.output
    PeftModel.from_pretrained(load_base(base_folder(shelf)), tmp_path / "out")


def test_schedule_hands_out_blocks() -> None:
    done = run("schedule", "--concepts", "2", "--r", "3")
    assert "columns: [3, 4, 5]" in done.output and "weights need at least 6 directions" in done.output
    assert "SpectralConfig(method='spectral_a', r=3, columns=[0, 1, 2])" in done.output
    assert "spectune train RUN.yaml 'adapter.method=spectral_a' 'adapter.r=3' 'adapter.columns=[3,4,5]'" in done.output
    rows = run("schedule", "--concepts", "2", "--r", "3", "--method", "orthogonal_adaptation").output
    assert "SpectralConfig(method='orthogonal_adaptation', r=3, concept=1, basis_seed=0)" in rows


def test_a_private_schedule_states_the_chance_of_a_clash() -> None:
    done = run("schedule", "--concepts", "3", "--r", "8", "--private", "--top", "64", "--seed", "5")
    assert "chance that two adapters share no column: 32.1%" in done.output and "adapter 1, seed 6" in done.output
    found = json.loads(run("schedule", "--concepts", "3", "--private", "--top", "768", "--json").stdout)
    assert len(found["columns"]) == 3 and found["clear_pair"] == pytest.approx(0.92, abs=0.005)


WRONG = [
    (["fuse", "dog", "clash"], AdapterError, "both tuned the singular columns 2"),
    (["fuse", "dog", "cat", "--weights", "one"], OptionError, "--weights 'one': must be numbers"),
    (["fuse", "dog", "cat", "--max-rank", "2"], OptionError, "Pass -o FOLDER"),
    (["fuse", "dog", "cat", "--rule", "gradient", "--examples", "dog.txt"], OptionError, "1 files for 2 adapters"),
    (["fuse", "dog", "cat", "--rule", "average", "--keep", "dog.txt"], OptionError, "--keep: rule 'average'"),
    (["fuse", "dog", "cat", "--rule", "match"], OptionError, "Pass model=the base and examples"),
    (
        ["fuse", "dog", "--rule", "gradient", "--examples", "none.txt"],
        DataError,
        "none.txt: cannot read the examples",
    ),
    (["fuse", "dog", "--rule", "gradient", "--examples", "bad.jsonl"], DataError, "bad.jsonl: line 1 is not"),
    (["schedule", "--concepts", "2", "--private"], OptionError, "pass --top K"),
    (["schedule", "--concepts", "2", "--top", "9"], OptionError, "work only with --private"),
    (["schedule", "--concepts", "2", "--method", "svft"], OptionError, "-method svft: must be"),
]


@pytest.mark.parametrize(("words", "error", "line"), WRONG)
def test_wrong_requests_are_refused(
    words: list[str], error: type[Exception], line: str, shelf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (shelf / "bad.jsonl").write_text('{"words": 1}\n')
    monkeypatch.chdir(shelf)
    done = run(*words)
    assert isinstance(done.exception, error) and line in str(done.exception), done.output


def test_a_refusal_is_one_line_and_a_status(shelf: Path, tmp_path: Path) -> None:
    done = spectune("fuse", str(shelf / "dog"), str(shelf / "clash"), "-o", str(tmp_path / "out"))
    assert done.returncode == 1 and "down_proj: dog and clash both tuned" in done.stderr, done.stderr
    assert "Traceback" not in done.stderr and not (tmp_path / "out").exists()
