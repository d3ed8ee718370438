"""`spectune compare` and `spectune reproduce` from outside."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from spectune.cli.comparison_files import commit
from spectune.papers import small_models
from spectune.sweeps.workers import Workers
from tests.cli.test_runs import spectune
from tests.sweeps.sweeps import in_this_process, text_sweep


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(Workers, "run", in_this_process)


def test_compare_leaves_page_tables_and_pefts_form(tmp_path: Path) -> None:
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(text_sweep(tmp_path)))
    done = spectune("compare", "sweep.yaml", "seeds=[0]", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    out = tmp_path / "comparisons" / "sweep"
    assert {p.name for p in out.iterdir()} - {".lock"} == {
        "sweep.json", "records", "runs", "method_comparison", "comparison.json", "comparison.md", "comparison.html",
    }  # fmt: skip
    assert "spectral_a" in done.stderr and "note: One seed" in done.stderr and "comparison.html" in done.stderr
    assert "| spectral_a |" in (out / "comparison.md").read_text()
    assert len(list((out / "method_comparison" / "task").iterdir())) == 2
    again = spectune("compare", "sweep.yaml", "seeds=[0]", "--json", cwd=tmp_path)
    summary = json.loads(again.stdout)
    assert summary["runs"] == 3 and summary == json.loads((out / "comparison.json").read_text())
    assert summary["provenance"]["versions"]["peft"] and summary["provenance"]["machine"]["cpu_count"]


def test_a_sweep_of_failures_is_reported_and_fails(tmp_path: Path) -> None:
    bad = {"bad": {"adapter": {"method": "spectral_a", "target_modules": ["nowhere"]}, "learning_rates": [1e-3]}}
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(text_sweep(tmp_path, methods=bad)))
    done = spectune("compare", "sweep.yaml", "-o", "out", cwd=tmp_path)
    assert done.returncode == 1 and "failed: task--bad--0.001--0" in done.stderr and "Traceback" not in done.stderr
    assert "No run was finished." in (tmp_path / "out" / "comparison.html").read_text()


def test_options_of_a_cluster_need_one(tmp_path: Path) -> None:
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(text_sweep(tmp_path)))
    for words in (["--gpus", "0"], ["--cpus", "2"], ["--slurm", "partition=a"]):
        done = spectune("compare", "sweep.yaml", *words, cwd=tmp_path)
        assert done.returncode == 1 and f"{words[0]} works only with --on" in done.stderr
    done = spectune("compare", "sweep.yaml", "--on", "rey", cwd=tmp_path)
    assert done.returncode == 1 and "--on rey: this is unknown. Give ray, ray://HOST:PORT or slurm." in done.stderr
    assert not (tmp_path / "comparisons").exists()


def test_reproduce_lists_and_refuses(tmp_path: Path) -> None:
    done = spectune("reproduce", cwd=tmp_path)
    assert done.returncode == 0 and "glue-deberta" in done.stdout and "svd-cost" in done.stdout, done.stderr
    assert "few-shot-vision" in json.loads(spectune("reproduce", "--json", cwd=tmp_path).stdout)
    wrong = spectune("reproduce", "lemma", cwd=tmp_path)
    assert wrong.returncode == 1 and "Did you mean 'lemmas'" in wrong.stderr
    needs = spectune("reproduce", "few-shot-vision", cwd=tmp_path)
    assert needs.returncode == 1 and "Give --data DIR" in needs.stderr and not list(tmp_path.iterdir())


def test_reproduce_takes_no_options_where_nothing_is_trained(tmp_path: Path) -> None:
    done = spectune("reproduce", "lemmas", "seeds=[0]", cwd=tmp_path)
    assert done.returncode == 1 and "lemmas is computed without training" in done.stderr


def test_reproduce_computes_the_lemmas(tmp_path: Path) -> None:
    done = spectune("reproduce", "lemmas", "--json", "-o", "out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert all(row["agrees"] is not False for row in json.loads(done.stdout)["rows"])
    assert (tmp_path / "out" / "computed.html").is_file() and (tmp_path / "out" / "computed.json").is_file()


def test_reproduce_puts_the_printed_figure_beside_the_measured_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep = text_sweep(tmp_path)
    data = {f"languages_{split}": sweep["run"]["data"][split] for split in ("train", "validation", "test")}
    made = data | {"minilm": sweep["run"]["model"]}
    monkeypatch.setitem(small_models.MAKERS, "languages", lambda folder: made)
    method = "{lora: {adapter: {peft_type: LORA, r: 2, target_modules: [query]}, learning_rates: [1e-3]}}"
    words = [f"methods={method}", "seeds=[0]", "run.training.steps=1", "run.data.limit={}"]
    done = spectune("reproduce", "glue-deberta", *words, "--small", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "published lora: mnli 88.87" in done.stderr and "deviation: Another model" in done.stderr
    page = (tmp_path / "reproductions" / "glue-deberta-small" / "comparison.html").read_text()
    assert "88.87" in page and "Changed by the user: seeds=[0]" in page


def test_the_commit_is_none_or_a_commit() -> None:
    found = commit()
    assert found is None or found.replace("-dirty", "").isalnum() or "-g" in found
