"""benchmarks/gpu.py: every part runs, a killed run keeps what it had, and an error costs one row."""

from __future__ import annotations

import argparse
import ast
import io
import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gpu
import gpu_tables
import pytest
import torch
import torch._dynamo.config as dynamo
from gpu_parts import PARTS, machine, notebook

from .conftest import BENCHMARKS

SCRIPT = BENCHMARKS / "gpu.py"


def started(output: Path, *more: str) -> subprocess.Popen[str]:
    words = [sys.executable, str(SCRIPT), "--device", "cpu", "--tiny", "--output", str(output), *more]
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def states(path: Path) -> dict[str, str]:
    return {name: part["state"] for name, part in notebook.read(path).get("parts", {}).items()}


@pytest.mark.slow
def test_a_killed_run_keeps_its_parts_and_a_later_one_adds_the_others(tmp_path: Path) -> None:
    output = tmp_path / "gpu.json"
    first = started(output, "--seconds", "2000")
    while first.poll() is None and states(output).get("a", "running") == "running":
        time.sleep(0.05)
    first.send_signal(signal.SIGKILL)
    said, _ = first.communicate()
    assert first.returncode == -signal.SIGKILL, said
    parts = notebook.read(output)["parts"]
    assert parts["a"]["state"] == "done" and parts["a"]["planned"] == list(parts["a"]["rows"]), parts["a"]
    second = started(output, "--seconds", "2000", "--parts", "b,f")
    said, _ = second.communicate()
    assert second.returncode == 0, said
    record = notebook.read(output)
    assert record["commit"] and record["versions"]["peft"] and record["device"] == "cpu"
    assert states(output) == {**dict.fromkeys("ab", "done"), "f": "not run"}
    assert record["parts"]["f"]["reason"] == "not run: no weights given"
    assert said.rstrip().endswith(str(output)) and "A training step" in said


def in_this_process(part: str, path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Run a part as its own process does, and get what it wrote."""
    monkeypatch.setattr(sys, "stdin", io.StringIO("1000\n"))
    # This process is not to die with another.
    monkeypatch.setattr(gpu, "ctypes", SimpleNamespace(CDLL=lambda name: raises(OSError())))
    # Parts set both for their own process.
    with dynamo.patch(recompile_limit=dynamo.recompile_limit), torch.random.fork_rng(devices=[]):
        gpu.child(argparse.Namespace(child=part, output=path, device="cpu", tiny=True, smollm=None, gsm8k=None))
    return notebook.read(path)["parts"][part]


@pytest.mark.filterwarnings("ignore")  # nothing turns them into errors in a process of its own
@pytest.mark.parametrize("part", ["c", "d", "e", "g", "h", "i", pytest.param("j", marks=pytest.mark.slow)])
def test_every_other_part_runs_to_its_end(part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = in_this_process(part, tmp_path / "gpu.json", monkeypatch)
    assert found["state"] == "done" and not found.get("not_reached") and not found.get("errors"), found
    assert found["rows"] and set(found["planned"]) == {*found["rows"], *found["left_out"]}
    assert all(reason.startswith("needs CUDA") for reason in found["left_out"].values()), found["left_out"]
    if part == "e":
        assert "spectral_r: profile" in found["rows"] and len(found["left_out"]) == 4


def test_every_part_is_run() -> None:
    assert set(PARTS) == set("abcdefghij")


def test_the_parts_import_what_they_use_in_a_new_process() -> None:
    """pytest has imported everything; the parts that are run in its process would find what they forgot to import."""
    words = f"import sys; sys.path.insert(0, {str(BENCHMARKS)!r}); from gpu_parts import PARTS\n"
    words += "for part in PARTS.values(): part.runner()"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def book(path: Path, seconds: float = 1000) -> notebook.Notebook:
    return notebook.Notebook(path, "c", "A part", seconds)


def raises(error: Exception) -> Any:
    raise error


def test_an_error_is_kept_and_the_next_row_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "gpu.json"
    mine = book(path)
    mine.plan(["one", "two", "three"])
    mine.row("one", lambda: raises(ValueError("a reason")))
    mine.row("two", lambda: {"milliseconds": 1.0})
    mine.row("three", lambda: raises(notebook.NotHere("needs CUDA")))
    mine.close()
    part = notebook.read(path)["parts"]["c"]
    assert part["state"] == "failed" and part["rows"] == {"two": {"milliseconds": 1.0}}
    assert part["errors"]["one"]["type"] == "ValueError" and part["errors"]["one"]["message"] == "a reason"
    assert "in raises" in part["errors"]["one"]["traceback"]
    assert part["left_out"] == {"three": "needs CUDA"} and part["not_reached"] == []


def test_a_row_beyond_the_time_is_named_as_not_reached(tmp_path: Path) -> None:
    mine = book(tmp_path / "gpu.json", seconds=-1)
    mine.plan(["late"])
    mine.row("late", lambda: {"milliseconds": 1.0})
    mine.close()
    assert states(tmp_path / "gpu.json") == {"c": "out of time"} and mine.found["not_reached"] == ["late"]


@pytest.mark.parametrize(("code", "state"), [("sys.exit(5)", "failed"), ("time.sleep(1000)", "out of time")])
def test_a_process_that_crashes_or_hangs_keeps_its_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, state: str
) -> None:
    path = tmp_path / "gpu.json"
    book(path).row("one", lambda: {"milliseconds": 1.0})
    program = f"import sys, time; sys.stdin.readline(); {code}"
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, text=True, start_new_session=True
    )
    monkeypatch.setattr(gpu, "GRACE", 0.0)
    # A hanging process is stopped at once; a crashing one has all the time to crash.
    gpu.wait(process, "c", 0.1 if state == "out of time" else 500, path)
    part = notebook.read(path)["parts"]["c"]
    assert part["state"] == state and part["rows"] == {"one": {"milliseconds": 1.0}} and process.poll() is not None
    assert ("the process" in part["errors"]) == (state == "failed")


def test_a_part_that_raises_is_told_in_the_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        title = "A part"

        def runner(self) -> Any:
            return lambda setting, mine: raises(RuntimeError("no kernel image"))

    monkeypatch.setitem(gpu.PARTS, "c", Broken())
    part = in_this_process("c", tmp_path / "gpu.json", monkeypatch)
    assert part["state"] == "failed" and part["errors"]["the part itself"]["message"] == "no kernel image"


def test_figures_of_two_machines_do_not_share_a_record(tmp_path: Path) -> None:
    path = tmp_path / "gpu.json"
    machine.agree(path, "cpu", True)
    machine.agree(path, "cpu", True)
    path.write_text(json.dumps({**notebook.read(path), "commit": "another"}))
    with pytest.raises(machine.OtherMachineError, match=r"commit .* was begun with 'another'\. Name another --output"):
        machine.agree(path, "cpu", True)


def test_a_device_that_is_not_there_leaves_the_record_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "gpu.json"
    given = argparse.Namespace(output=path, device="cuda:99", tiny=True)
    with pytest.raises(SystemExit) as stopped:
        gpu.write_head(given)
    assert stopped.value.code == gpu.OTHER_MACHINE and not path.exists()
    assert capsys.readouterr().err.startswith("--device cuda:99: ")


def test_the_parts_share_the_time_and_leave_what_they_did_not_use() -> None:
    order = list(PARTS)
    assert gpu.allowance(100, order[-1], order[-1:]) == 100
    spent = 0.0
    for place, part in enumerate(order):
        spent += gpu.allowance(100 - spent, part, order[place:])
    assert spent == pytest.approx(100)
    assert gpu.allowance(50, "b", ["b", "c"]) > gpu.allowance(50, "b", ["b", "c", "f"])


def test_while_no_gpu_has_run_every_table_is_one_line_that_says_so() -> None:
    page = gpu_tables.gpu_table({})
    assert "|" not in page and page.count(": not measured.") == 10, page


def test_a_row_of_the_page_says_what_the_record_says() -> None:
    name = "8B, 2,048 tokens, eager: spectral_a"
    row = {"milliseconds": 123.4, "to_frozen": [1.1, 1.2, 1.3], "to_lora": [0.8, 0.9, 1.0], "peak_mib": 2048.0}
    part = {"rows": {name: row}, "left_out": {name.replace("_a", "_r"): "out of memory: 2 GiB"}, "errors": {}}
    page = gpu_tables.gpu_table({"card": "A card", "parts": {"b": part}})
    assert "| 8B, 2,048 tokens, eager | spectral_a | 123.4 | 1.20 | 0.90 | 2,048 |" in page
    assert "| 8B, 2,048 tokens, eager | spectral_r | out of memory |" in page
    assert "spectral_r | not measured" not in page and "(2 of 61 rows; not measured: the others):" in page


def test_the_page_asks_for_rows_that_the_parts_plan() -> None:
    """A name that the page spells otherwise would be "not measured" for ever."""
    from gpu_parts import (
        data_directions,
        decomposition,
        four_bit,
        graphs,
        merging,
        mixed_batches,
        real_run,
        several_devices,
        training_step,
    )

    cells = {f"{cell.name}: {name}" for cell in training_step.CELLS for name in training_step.compared(cell)}
    asked: set[str] = set()

    class Asking(gpu_tables.Rows):
        def cell(self, name: str, figure: str, form: str = "") -> str:
            asked.add(name)
            return ""

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu_tables, "Rows", Asking)
        gpu_tables.gpu_table({})
    known = cells | {f"{name}: profile" for name in graphs.METHODS}
    known |= {f"{name}: CUDA graph of a step" for name in graphs.METHODS}
    known |= {"before", *(f"{method}, seed {seed}" for seed in real_run.SEEDS for method in real_run.METHODS)}
    kinds = ["base", "LoRA of PEFT", *(f"{name} bank" for name in mixed_batches.METHODS)]
    known |= {f"{count:,} adapters: {kind}" for count in mixed_batches.COUNTS for kind in kinds}
    known |= {f"8B, {count} tokens, eager: {name}" for count in ("2,048", "8,192") for name in four_bit.adapters()}
    known |= {f"1B: pass for {kind}" for kind in data_directions.KINDS}
    known |= {f"1B: {rule}" for rule in merging.RULES}
    known |= {f"8B, {engine}: {name}" for engine in several_devices.ENGINES for name in several_devices.METHODS}
    small = decomposition.Known(8, 8, "cpu")
    places = ("4096 x 4096", "4096 x 14336")
    known |= {f"{p}, r = {r}: {m}" for p in places for r in (16, 64) for m in decomposition.methods(small, r)}
    known |= {f"all linear weights of 8B, r = {r}: {m}" for r in (16, 64) for m in ("spectune", "svd_lowrank, 4 steps")}
    assert asked <= known
    assert cells <= asked


def test_the_folder_holds_every_script_that_is_imported() -> None:
    copied = re.search(r"benchmarks/\{([\w,]+)\}\.py", (BENCHMARKS / "gpu_folder.sh").read_text())
    assert copied is not None
    here = {path.stem for path in BENCHMARKS.glob("*.py")}
    for path in (
        SCRIPT,
        *(BENCHMARKS / f"{name}.py" for name in copied[1].split(",")),
        *BENCHMARKS.glob("gpu_parts/*"),
    ):
        if path.suffix == ".py":
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module in here:
                    assert node.module in copied[1].split(","), f"{path.name} imports {node.module}"
