"""`spectune fuse` on the folders of runs: their examples, what their tasks keep, and the rules compared."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

import spectune
from spectune.cli.app import app
from spectune.errors import OptionError
from spectune.recipes import parse_config
from spectune.runs import Kept, tuned_weights
from spectune.runs import run as train

from ..recipes.tiny import bert

LORA = {"peft_type": "LORA", "r": 2, "target_modules": ["query", "value"]}
SPECTRAL = {"method": "spectral_a", "r": 2, "target_modules": ["query", "value"]}


def finished(folder: Path, name: str, adapter: dict[str, Any], model: str, words: tuple[str, str], **more: Any) -> Path:
    rows = [{"text": f"w{i % 7} {words[i % 2]} w{i % 5}", "label": words[i % 2]} for i in range(24)]
    file = folder / f"{name}.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = {
        "recipe": "text_classification",
        "model": model,
        "adapter": adapter,
        "data": {"train": str(file), "test": str(file), **more},
        "training": {"steps": 12, "batch_size": 8, "learning_rate": 0.05, "head_learning_rate": 0.05},
    }
    train(parse_config(values), folder / name)
    return folder / name


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("runs")
    model = bert(folder / "base")
    return [
        finished(folder, "one", LORA, model, ("good", "bad")),
        finished(folder, "other", SPECTRAL, model, ("w30", "w31")),
    ]


@pytest.fixture(scope="module")
def validated(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two runs with validation examples."""
    folder = tmp_path_factory.mktemp("validated")
    model = bert(folder / "base")
    return [
        finished(folder, name, LORA, model, words, validation_share=0.5)
        for name, words in (("one", ("good", "bad")), ("other", ("w30", "w31")))
    ]


def fuse(*words: str | Path) -> Result:
    return CliRunner().invoke(app, ["fuse", *map(str, words)])


def looking(runs: list[Path]) -> list[str | Path]:
    return [*runs, "--heads-apart", *(word for run in runs for word in ("--examples", run, "--evaluate", run))]


def test_auto_matches_where_there_are_examples_and_every_task_is_measured(runs: list[Path], tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    done = fuse(*looking(runs), "--rule", "auto", "-o", tmp_path / "both", "--report", page, "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["rule"] == "match" and "examples" in found["why"]
    for run, task in zip(runs, found["tasks"], strict=True):
        assert task["run"] == str(run) and set(task["after"]) == {"untouched body", "match"}
        assert task["own"] > task["after"]["untouched body"] and task["kept"]["match"] > 0.9
    assert "What each task keeps" in page.read_text() and "because there are examples" in page.read_text()


def test_a_runs_own_adapter_alone_keeps_everything(runs: list[Path]) -> None:
    for run in runs:
        assert Kept.of(run).measure("itself", run / "adapter") == 1.0


def test_all_compares_the_rules_and_says_which_do_not_fit(runs: list[Path]) -> None:
    done = fuse(*looking(runs), "--rule", "all", "--rank", "3", "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    without_data = {"average", "task_singular", "isotropic", "core", "aligned_ties", "calibrated"}
    fitting = without_data | {"gradient", "sequential", "match"}
    assert {report["rule"] for report in found["rules"]} == fitting
    assert set(found["tasks"][0]["after"]) == {"untouched body", *fitting}
    assert {layer["rank"] for report in found["rules"] if report["rule"] == "match" for layer in report["layers"]} == {
        3
    }
    assert "orthogonal: left out, because" in done.stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--rule", "all", "-o", "there"], "--rule all compares and writes nothing"),
        (["--rule", "auto", "--keep", "base.txt"], "--keep needs --examples"),
        (["--rule", "average", "--examples", "one", "--examples", "other"], "rule 'average' does not use them"),
    ],
)
def test_what_would_not_be_used_is_refused(runs: list[Path], tmp_path: Path, words: list[str], said: str) -> None:
    (runs[0].parent / "base.txt").write_text("w1 w2\n")
    placed = [str(runs[0].parent / word) if word in ("base.txt", "one", "other") else word for word in words]
    done = fuse(*runs, *placed)
    assert isinstance(done.exception, OptionError) and said in str(done.exception)


def test_what_is_kept_of_a_loss_is_own_by_merged() -> None:
    assert Kept(Path("run"), "accuracy", "test", 0.8, {"match": 0.6}).share("match") == pytest.approx(0.75)
    assert Kept(Path("run"), "loss", "test", 1.5, {"match": 2.0}).share("match") == pytest.approx(0.75)


def test_weights_are_tuned_on_validation_examples(validated: list[Path], tmp_path: Path) -> None:
    done = fuse(*looking(validated), "--rule", "match", "--tune", "3", "-o", tmp_path / "both")
    assert done.exit_code == 0, done.output
    said = " ".join(done.output.split())
    assert said.count("of their validation scores") == 3 and "of round" in said
    assert (tmp_path / "both" / "adapter_model.safetensors").is_file()


def test_a_task_that_keeps_less_counts_more_and_the_best_merge_is_kept(
    validated: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The shares are told here, so that the rounds can be followed by hand."""
    shares = iter([1.0, 0.5, 1.0, 0.9, 1.4, 0.7])
    monkeypatch.setattr(Kept, "measure", lambda self, merge, adapter: 1.0 if adapter is None else next(shares))
    asked: list[list[float] | None] = []

    def merge(weights: list[float] | None) -> Any:
        asked.append(weights)
        return spectune.fuse(validated, rule="average", weights=weights, heads_apart=True)

    best, tried = tuned_weights(validated, merge, 3)
    assert asked[0] is None and tried[0].weights == (0.5, 0.5)
    raised = [(0.75 / 1.0) ** 10, (0.75 / 0.5) ** 10]
    assert asked[1] == pytest.approx([weight / sum(raised) for weight in raised])
    assert asked[1] is not None and asked[2] is not None and asked[2][1] > asked[1][1]
    # More than its own score does not make up for what another task loses, so the second merge stays the best.
    assert [one.mean for one in tried] == pytest.approx([0.75, 0.95, 0.85])
    assert best.report.weights == pytest.approx(asked[1])


def test_tuning_that_cannot_work_is_refused_before_the_work(runs: list[Path]) -> None:
    asked: list[tuple[list[str], str]] = [
        (["--tune", "3"], "0 runs in --evaluate for 2 adapters"),
        (["--tune", "3", "--rule", "all", "--evaluate", str(runs[0])], "Leave --rule all out"),
        (["--tune", "3", "--weights", "1", "--evaluate", str(runs[0])], "Leave --weights out"),
        (["--tune", "1", *(w for run in runs for w in ("--evaluate", str(run)))], "at least 2 are needed"),
        (["--tune", "2", *(w for run in runs for w in ("--evaluate", str(run)))], "no validation examples"),
    ]
    for words, line in asked:
        rule = [] if "--rule" in words else ["--rule", "average"]
        done = fuse(*runs, "--heads-apart", *rule, *words)
        assert done.exit_code == 1 and line in str(done.exception), done.output
