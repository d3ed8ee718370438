"""The command line from outside: the journey in small, one line for each failure, help at once."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ..effort import PATIENCE
from ..warm import spectune


@pytest.fixture(scope="module")
def journey(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, object]]:
    folder = tmp_path_factory.mktemp("journey")
    done = spectune("demo", "--steps", "12", "--sentences", "64", "--output", "out", "--json", cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder / "out", json.loads(done.stdout)


def test_the_demo_reloads_exports_and_reports(journey: tuple[Path, dict[str, object]]) -> None:
    folder, figures = journey
    assert figures["reload_agreement"] == 1.0 and figures["lora_agreement"] == 1.0
    assert 0 < figures["lora_max_relative_error"] < 1e-5
    page = (folder / "run" / "report.html").read_text()
    assert "spectral_a" in page and "<svg" in page
    result = json.loads((folder / "run" / "result.json").read_text())
    assert result["config"]["seed"] == 0 and all(check["ok"] for check in result["checks"])
    assert (folder / "run" / "adapter" / "adapter_config.json").exists()
    assert (folder / "lora" / "adapter_config.json").exists()


def test_export_prints_the_proof(journey: tuple[Path, dict[str, object]], tmp_path: Path) -> None:
    folder, _ = journey
    done = spectune("export", str(folder / "run" / "adapter"), "-o", str(tmp_path / "lora"))
    assert done.returncode == 0, done.stderr
    # vLLM takes no head, so the rank that it would have to be started with is not said.
    assert "classifier was trained in full" in done.stdout and "max |logit difference|" in done.stdout
    as_json = spectune("export", str(folder / "run" / "adapter"), "-o", str(tmp_path / "lora2"), "--json")
    assert json.loads(as_json.stdout)["max_rank"] == 16


def test_export_merges_into_the_base_checkpoint(journey: tuple[Path, dict[str, object]], tmp_path: Path) -> None:
    folder, _ = journey
    done = spectune("export", str(folder / "run" / "adapter"), "-o", str(tmp_path / "merged"), "--to", "merged")
    assert done.returncode == 0 and "36 weights merged" in done.stdout, done.stderr
    assert (tmp_path / "merged" / "model.safetensors").exists() and (tmp_path / "merged" / "config.json").exists()


def test_a_lower_rank_needs_the_word(journey: tuple[Path, dict[str, object]], tmp_path: Path) -> None:
    folder, _ = journey
    command = ["export", str(folder / "run" / "adapter"), "-o", str(tmp_path / "lora"), "--max-rank", "2"]
    refused = spectune(*command)
    assert refused.returncode == 1 and "pass --allow-lossy" in refused.stderr and not (tmp_path / "lora").exists()
    allowed = spectune(*command, "--allow-lossy")
    assert allowed.returncode == 0 and "lossy: --max-rank cut off at most" in allowed.stdout, allowed.stderr


FAILURES = [
    (["demo", "--method", "spectral_b"], 1, "unknown method 'spectral_b'. Did you mean"),
    (["demo", "--method", "svft", "--r", "4"], 1, "method 'svft' has no option 'r'"),
    (["demo", "--steps", "0"], 1, "training.steps=0:"),
    (["demo", "--output", "full"], 1, "full"),
    (["export", "nowhere", "-o", "out"], 1, "nowhere: an adapter folder is needed, but there is nothing"),
    (["export", "full", "-o", "out"], 1, "adapter_config.json"),
    (["export", "full", "-o", "out", "--to", "merged", "--max-rank", "2"], 1, "works only with --to lora or gguf"),
    (["demmo"], 2, "No such command 'demmo'"),
    (["demo", "--stepz", "3"], 2, "No such option"),
]


@pytest.mark.parametrize(("words", "status", "line"), FAILURES, ids=[" ".join(w) for w, _, _ in FAILURES])
def test_failures_are_one_line_and_a_status(words: list[str], status: int, line: str, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious.txt").write_text("mine")
    done = spectune(*words, cwd=tmp_path)
    assert done.returncode == status and line in done.stderr, done.stderr
    assert "Traceback" not in done.stderr and done.stdout == ""
    assert [p.name for p in tmp_path.iterdir()] == ["full"] and len(list((tmp_path / "full").iterdir())) == 1


def test_debugging_shows_where_a_failure_came_from(tmp_path: Path) -> None:
    done = spectune("export", "nowhere", "-o", "out", cwd=tmp_path, SPECTUNE_DEBUG="1")
    assert "Traceback" in done.stderr and "AdapterError" in done.stderr


def test_an_interrupted_demo_goes_on_to_the_same_adapter(
    journey: tuple[Path, dict[str, object]], tmp_path: Path
) -> None:
    words = ["demo", "--steps", "12", "--sentences", "64", "--output", "out", "--json"]
    command = [sys.executable, "-m", "spectune.cli", *words]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as running:
        while not (tmp_path / "out" / "frozen" / "run.yaml").exists():
            time.sleep(0.2)
            assert running.poll() is None, running.stderr
        time.sleep(1)
        running.send_signal(signal.SIGINT)
        try:
            _, said = running.communicate(timeout=PATIENCE)
        finally:
            running.kill()
    assert running.returncode == 130 and "interrupted" in said and "Traceback" not in said, said
    done = spectune(*words, cwd=tmp_path)
    assert done.returncode == 0 and (tmp_path / "out" / "run" / "report.html").exists(), done.stderr
    folder, figures = journey
    assert {**json.loads(done.stdout), "report": ""} == {**figures, "report": ""}
    name = "run/adapter/adapter_model.safetensors"
    assert (tmp_path / "out" / name).read_bytes() == (folder / name).read_bytes()
    again = spectune(*words, cwd=tmp_path)
    assert again.returncode == 1 and "contains a finished demo. Pass --overwrite" in again.stderr


def test_env_lists_the_packages_that_matter() -> None:
    found = json.loads(spectune("env", "--json").stdout)
    assert {"python", "spectune", "torch", "peft", "transformers", "cuda"} <= set(found) | {"spectune"}


SWALLOWED = """
import signal, sys, time
from spectune.cli import app as room
room.AGAIN_SECONDS = 1
@room.app.command(name="swallow")
def swallow():
    try:
        signal.raise_signal(signal.SIGINT)
    except BaseException:
        pass
    time.sleep(3600)
sys.argv = ["spectune", "swallow"]
room.main()
"""


@pytest.mark.skipif(not hasattr(signal, "alarm"), reason="needs SIGALRM")
def test_an_interrupt_that_a_library_swallows_is_raised_again() -> None:
    done = subprocess.run([sys.executable, "-c", SWALLOWED], capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 130 and "interrupted" in done.stderr, done.stderr
