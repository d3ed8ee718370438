"""The verbs of a run from outside: init, check, train, Ctrl-C, resume, evaluate, generate, report, lr."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from spectune.adapter import spectral_modules
from spectune.cli import main
from spectune.runs import RunResult, load_base, measure
from tests.concepts.concepts import concept_home, run_values
from tests.effort import PATIENCE
from tests.recipes import tiny


@dataclass
class Done:
    returncode: int
    stdout: str
    stderr: str


def spectune(*words: str, cwd: Path) -> Done:
    """Run the command line in this process: starting Python and importing torch would be most of the time."""
    out, err, argv, place = io.StringIO(), io.StringIO(), sys.argv, Path.cwd()
    sys.argv = ["spectune", *words]
    os.chdir(cwd)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), warnings.catch_warnings():
            main()
            status = 0
    except SystemExit as stop:
        status = int(stop.code or 0)
    finally:
        sys.argv = argv
        os.chdir(place)
    return Done(status, out.getvalue(), err.getvalue())


@pytest.fixture(autouse=True, scope="module")
def wide() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", "200")
        yield


def write(folder: Path, values: dict[str, Any]) -> str:
    (folder / "run.yaml").write_text(yaml.safe_dump(values))
    return str(folder / "run.yaml")


@pytest.fixture(scope="module")
def journey(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("runs")
    path = write(folder, tiny.text_run(folder))
    done = spectune("train", path, "training.steps=4", "-o", "run", "--json", cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder, json.loads(done.stdout)


def test_training_leaves_a_whole_folder(journey: tuple[Path, dict[str, Any]]) -> None:
    folder, figures = journey
    names = {path.name for path in (folder / "run").iterdir()}
    assert names - {".lock"} == {"run.yaml", "result.json", "report.html", "adapter", "checkpoints"}
    assert figures["metrics"]["validation"]["accuracy"] >= 0 and figures["trainable"] == 512
    assert yaml.safe_load((folder / "run" / "run.yaml").read_text())["training"]["steps"] == 4
    record = json.loads((folder / "run" / "result.json").read_text())
    assert len(record["losses"]) == 4 and record["method"] == "spectral_a" and record["spectra"]
    page = (folder / "run" / "report.html").read_text()
    assert "validation accuracy" in page and "<svg" in page
    assert (folder / "run" / "adapter" / "tokenizer.json").exists()


def test_a_run_is_evaluated_and_reported_from_its_folder(journey: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    folder, figures = journey
    done = spectune("evaluate", str(folder / "run"), "--json", cwd=tmp_path)
    assert json.loads(done.stdout) == figures["metrics"], done.stderr
    before = spectune("evaluate", str(folder / "run"), "--base", "--json", cwd=tmp_path)
    recipe, model = load_base(folder / "run")
    assert json.loads(before.stdout) == measure(recipe, model) != figures["metrics"], before.stderr
    assert not list(spectral_modules(model))
    (folder / "run" / "report.html").unlink()
    result = RunResult.read(folder / "run")
    blind = result.model_copy(update={"looked_at": False, "spectra": [], "updates": [], "examples": [], "sizes": []})
    blind.write(folder / "run" / "result.json")
    done = spectune("report", str(folder / "run"), cwd=tmp_path)
    assert done.returncode == 0 and "validation accuracy" in (folder / "run" / "report.html").read_text(), done.stderr
    assert RunResult.read(folder / "run") == result
    (folder / "mine").write_text("mine")
    (folder / "run" / "report.html").unlink()
    (folder / "run" / "report.html").symlink_to(folder / "mine")
    refused = spectune("report", str(folder / "run"), cwd=tmp_path)
    assert refused.returncode == 1 and "report.html is a link" in refused.stderr
    assert (folder / "mine").read_text() == "mine"
    (folder / "run" / "report.html").unlink()
    refused = spectune("generate", str(folder / "run"), "-p", "w1", cwd=tmp_path)
    assert refused.returncode == 1 and "does not write text" in refused.stderr


def test_a_folder_with_a_run_is_refused_and_the_named_option_replaces_it(tmp_path: Path) -> None:
    path = write(tmp_path, tiny.text_run(tmp_path, training={"steps": 1}))
    assert spectune("train", path, "-o", "run", "--json", cwd=tmp_path).returncode == 0
    refused = spectune("train", path, "seed=1", "-o", "run", cwd=tmp_path)
    assert refused.returncode == 1 and "replace it with --overwrite" in refused.stderr
    done = spectune("train", path, "seed=1", "-o", "run", "--overwrite", "--json", cwd=tmp_path)
    assert done.returncode == 0 and RunResult.read(tmp_path / "run").seed == 1, done.stderr


def test_check_shows_the_example_the_layers_and_the_rates(tmp_path: Path) -> None:
    pytest.importorskip("trl")
    path = write(tmp_path, tiny.lm_run(tmp_path, training={"learning_rate": 10.0}))
    done = spectune("check", path, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for words in (
        "model.layers.0.self_attn.q_proj  32 x 32",
        "Question",
        "numbers trained",
        "memory: about",
        "times above",
    ):
        assert words in done.stdout, words
    found = json.loads(spectune("check", path, "--json", cwd=tmp_path).stdout)
    assert "".join(text for text, carries in found["shown"]["pieces"] if carries) == "w0####1[SEP]"
    assert found["rates"]["learning_rate"] == 10.0 and found["memory"]["total"] > 0
    assert {p.name for p in tmp_path.iterdir()} == {"run.yaml", "llama", "train.jsonl", "test.jsonl"}


def test_ctrl_c_saves_and_resume_goes_on(tmp_path: Path) -> None:
    path = write(tmp_path, tiny.text_run(tmp_path, training={"steps": 100_000, "save_every": 100_000}))
    command = [sys.executable, "-m", "spectune.cli", "train", path, "-o", "run"]
    running = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "run" / "checkpoints").exists():  # the Trainer makes it when the loop begins
        time.sleep(0.1)
        assert running.poll() is None, running.communicate()
    time.sleep(2)
    running.send_signal(signal.SIGINT)
    _, said = running.communicate(timeout=PATIENCE)
    assert running.returncode == 130 and "Continue with --resume" in said and "Traceback" not in said, said
    (saved,) = (tmp_path / "run" / "checkpoints").iterdir()
    step = int(saved.name.removeprefix("checkpoint-"))
    assert 0 < step < 100_000 and not (tmp_path / "run" / "adapter").exists()
    unfinished = spectune("evaluate", "run", cwd=tmp_path)
    assert unfinished.returncode == 1 and "the run is not finished" in unfinished.stderr
    other = spectune("train", path, f"training.steps={step + 2}", "-o", "run", "--resume", cwd=tmp_path)
    assert other.returncode == 1 and "training.steps was 100000" in other.stderr


def test_a_language_model_writes(tmp_path: Path) -> None:
    pytest.importorskip("trl")
    path = write(tmp_path, tiny.lm_run(tmp_path, training={"steps": 1}))
    assert spectune("train", path, "-o", "run", "--json", cwd=tmp_path).returncode == 0
    done = spectune("generate", "run", "-p", "w1 w2", "-p", "w3", "--max-new-tokens", "3", "--json", cwd=tmp_path)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["prompt"] for line in lines] == ["w1 w2", "w3"] and all("text" in line for line in lines), done.stderr


def test_a_reward_of_ones_own_is_given_on_the_command_line_only(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def score(completions, **more):\n    return [len(t) for t in completions]\n")
    values = tiny.reward_run(tmp_path, training={"steps": 1}, rewards=[])
    path = write(tmp_path, values)
    given = ("--reward", "mine.py:score")
    done = spectune("train", path, "-o", "run", "--json", *given, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    again = spectune("train", path, "-o", "run", "--json", "--resume", *given, cwd=tmp_path)
    assert json.loads(again.stdout)["metrics"] == json.loads(done.stdout)["metrics"], again.stderr
    found = spectune("evaluate", "run", "--json", *given, cwd=tmp_path)
    assert json.loads(found.stdout) == json.loads(done.stdout)["metrics"], found.stderr
    assert spectune("check", path, *given, cwd=tmp_path).returncode == 0
    (tmp_path / "mine.py").write_text("def score(completions, **more):\n    return [0.0] * len(completions)\n")
    changed = spectune("evaluate", "run", *given, cwd=tmp_path)
    assert changed.returncode == 1 and "is not a reward of this run, or its file has changed" in changed.stderr
    without = spectune("train", path, "-o", "other", cwd=tmp_path)
    assert without.returncode == 1 and "rewards: none is given" in without.stderr
    path = write(tmp_path, values | {"rewards": [{"reward": "mine.py:score"}]})
    refused = spectune("check", path, cwd=tmp_path)
    assert refused.returncode == 1 and "no YAML file may start code" in refused.stderr
    path = write(tmp_path, tiny.text_run(tmp_path))
    refused = spectune("check", path, *given, cwd=tmp_path)
    assert refused.returncode == 1 and "is for recipe reward" in refused.stderr


def test_lr_draws_its_curve(tmp_path: Path) -> None:
    path = write(tmp_path, tiny.text_run(tmp_path))
    done = spectune("lr", path, "--steps", "12", "--low", "1e-4", "--high", "1e-1", "-o", "lr.html", cwd=tmp_path)
    assert done.returncode == 0 and "curve: file:" in done.stdout, done.stderr
    page = (tmp_path / "lr.html").read_text()
    assert (
        "<svg" in page
        and "learning rate" in page
        and "src=" not in page
        and "<script" not in page
        and "://" not in page
    )


def test_a_concept_goes_through_the_same_verbs(tmp_path: Path) -> None:
    pytest.importorskip("diffusers")
    home = concept_home(tmp_path)
    told = {"data": {"validation": str(home / "dax")}, "training": {"steps": 1}, "drawings": {"every": 1}}
    path = write(tmp_path, run_values(home, **told))
    shown = spectune("check", path, cwd=tmp_path)
    assert "(underlined: is trained)" in shown.stdout and "a <dax>" in shown.stdout, shown.stderr
    done = spectune("train", path, "-o", "run", "--json", cwd=tmp_path)
    figures = json.loads(done.stdout)
    assert figures["head"] == 64 and "drawings" not in figures, done.stderr
    assert (tmp_path / "run" / "adapter" / "unet" / "adapter_config.json").exists()
    page = (tmp_path / "run" / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 2, "before and after"
    assert "step 0: a &lt;dax&gt; on the left" in page
    again = json.loads(spectune("evaluate", "run", "--json", cwd=tmp_path).stdout)
    assert again["validation"]["loss"] == pytest.approx(figures["metrics"]["validation"]["loss"], rel=1e-5)


def test_init_prints_what_check_reads(tmp_path: Path) -> None:
    done = spectune("init", "image_classification", cwd=tmp_path)
    assert done.returncode == 0 and yaml.safe_load(done.stdout)["recipe"] == "image_classification"
    wrong = spectune("init", "image_clasification", cwd=tmp_path)
    assert wrong.returncode == 1 and "Did you mean 'image_classification'" in wrong.stderr


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["train", "nowhere.yaml"], "nowhere.yaml: a YAML file is needed, but there is no such file"),
        (["check", "bad.yaml"], "seeed: unknown key. Did you mean 'seed'?"),
        (["evaluate", "."], "it has no run.yaml"),
        (["report", "."], "it has no run.yaml"),
        (["evaluate", ".", "training.steps=3"], "it has no run.yaml"),
    ],
)
def test_failures_are_one_line(words: list[str], line: str, tmp_path: Path) -> None:
    bad = {
        "recipe": "text_classification",
        "model": "m",
        "adapter": "none",
        "data": {},
        "training": {"steps": 1},
        "seeed": 1,
    }
    (tmp_path / "bad.yaml").write_text(yaml.safe_dump(bad))
    done = spectune(*words, cwd=tmp_path)
    assert done.returncode == 1 and line in done.stderr and "Traceback" not in done.stderr and done.stdout == "", (
        done.stderr
    )
