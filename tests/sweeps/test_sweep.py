"""Sweeps: what is refused, one process a run, crashes that cost one run, going on, rates chosen on validation only."""

from __future__ import annotations

import io
import json
import math
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from spectune.checkpoint import hold_folder
from spectune.errors import DataError, OptionError, OutputError
from spectune.pages.comparison_page import headline, render_comparison
from spectune.recipes.text_classification import TextClassification
from spectune.sweeps import SweepRecord, load_sweep, parse_sweep, run_sweep, summarise, to_markdown
from spectune.sweeps.choice import chosen_rate, rate_beyond
from spectune.sweeps.config import GeneralText, cell
from spectune.sweeps.general_text import general_loss
from spectune.sweeps.method_comparison import as_method_comparison, write_method_comparison
from spectune.sweeps.record import read_record
from spectune.sweeps.worker import _telling
from spectune.sweeps.workers import Workers, last_words, plain_ctrl_c
from spectune.training.checkpoints import stop_on_signal
from spectune.training.loop import Loop
from spectune.training.yaml_file import put
from tests.effort import PATIENCE
from tests.recipes import tiny
from tests.sweeps.sweeps import in_this_process, record, text_sweep
from tests.warm import script

GRID = {"adapter": {"method": "svft", "target_modules": ["q"]}, "learning_rates": [1e-3, 1e-2, 1e-1]}


def test_a_sweep_that_another_process_is_at_is_refused(tmp_path: Path) -> None:
    with hold_folder(tmp_path), pytest.raises(OutputError, match="another process is writing into this folder"):
        run_sweep(parse_sweep(text_sweep(tmp_path)), tmp_path, provenance={})


def test_a_method_may_have_another_grid_for_each_task() -> None:
    rates = {"one": [1e-3], "two": [1e-2, 1e-1]}
    sweep = parse_sweep(plain_sweep(tasks={"one": {}, "two": {}}, methods={"a": GRID | {"learning_rates": rates}}))
    assert {task: sweep.methods["a"].rates(task) for task in sweep.tasks} == rates and sweep.chooses


def test_single_rates_need_no_validation_examples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A paper that trained at one rate on all of train can be run so."""
    monkeypatch.setattr(Workers, "run", in_this_process)
    asked = text_sweep(tmp_path, seeds=[0])
    del asked["methods"]["full"]
    asked["run"]["data"].pop("validation", None), asked["run"]["data"].pop("validation_share", None)
    with pytest.raises(DataError, match="validation examples"):
        run_sweep(parse_sweep(asked), tmp_path / "out", provenance={})
    asked["methods"]["spectral_a"]["learning_rates"] = [1e-3]
    sweep = parse_sweep(asked)
    records = run_sweep(sweep, tmp_path / "out", provenance={})
    summary = summarise(sweep, records)
    (row,) = summary["rows"]
    assert row["rate"] == 1e-3 and row["validation"] is None and row["test"] is not None and not row["at_edge"]
    assert "ran at the one learning rate" in to_markdown(summary)
    assert "ran at the one learning rate" in render_comparison(summary)
    assert not any("valid" in name for name in as_method_comparison(sweep, records[0])["train_info"]["metrics"][0])


def plain_sweep(**more: Any) -> dict[str, Any]:
    run = {"recipe": "text_classification", "model": "m", "data": {"train": "t"}, "training": {"steps": 1}}
    return {"run": run, "methods": {"a": GRID}, "seeds": [0, 1]} | more


@pytest.mark.parametrize(
    ("wrong", "line"),
    [
        ({"seeds": [1, 1]}, "a seed occurs twice"),
        ({"methods": {"a": GRID | {"learning_rates": [1e-3, 0.001]}}}, "a rate occurs twice"),
        ({"forgetting": {"split": "test"}}, "forgetting: give either file or hub"),
        ({"forgetting": {"file": "a.txt", "hub_config": "b"}}, "forgetting: hub_config needs hub"),
        ({"methodes": {}}, "methodes: unknown key. Did you mean 'methods'?"),
        ({"methods": {"../a": GRID}}, "'../a' names a folder"),
        ({"tasks": {"t": {"training": {"learning_rate": 1e-3}}}}, "t, a: methods set training.learning_rate"),
        ({"tasks": {"t": {"seed": 3}}}, "t, a: methods and seeds set seed"),
        ({"tasks": {"t": {"data": {"gleu": "sst2"}}}}, "data.gleu: unknown key. Did you mean 'glue'?"),
        ({"methods": {"a": GRID | {"learning_rates": []}}}, "learning_rates"),
        (
            {"methods": {"a": GRID | {"learning_rates": {"other": [1e-3]}}}},
            "methods.a.learning_rates has grids for other, but the tasks are task; give one for each",
        ),
    ],
)
def test_a_wrong_sweep_is_refused_before_anything_runs(wrong: dict[str, Any], line: str) -> None:
    with pytest.raises(OptionError) as found:
        parse_sweep(plain_sweep(**wrong))
    assert line in str(found.value)


def test_a_sweep_needs_examples_to_choose_on_and_others_to_report(tmp_path: Path) -> None:
    asked = text_sweep(tmp_path)
    del asked["run"]["data"]["test"]
    with pytest.raises(DataError, match=r"task: test examples are needed to report, but it has only train, validation"):
        run_sweep(parse_sweep(asked), tmp_path / "out", provenance={})
    assert not (tmp_path / "out" / "records").exists()


def test_the_rate_is_the_best_on_validation_whatever_test_says() -> None:
    runs = [record(rate=1e-3, validation=0.6, test=0.9), record(rate=1e-2, validation=0.7, test=0.1)]
    assert chosen_rate(runs, "accuracy") == 1e-2
    assert chosen_rate([record(rate=r, validation=0.6) for r in (1e-2, 1e-3)], None) == 1e-3  # of equals the lowest
    assert chosen_rate([record(error="broke")], None) is None


def test_a_rate_that_crashed_or_diverged_does_not_win() -> None:
    runs = [record(rate=1e-3, seed=s, validation=0.6) for s in (0, 1)] + [record(rate=1e-2, validation=0.99)]
    assert chosen_rate([*runs, record(rate=1e-2, seed=1, error="broke")], None) == 1e-3
    losses = {1e-3: 2.0, 1e-2: 1.5, 1e-1: math.nan}
    with_loss = [record(rate=r, metrics={"validation": {"loss": v}}) for r, v in losses.items()]
    assert chosen_rate(with_loss, "loss") == 1e-2
    fewer = [record(rate=r, metrics={"validation": {"loss": v}}) for r, v in ((1e-3, 2), (1e-3, 2), (1e-2, 3))]
    assert chosen_rate(fewer, "loss") == 1e-3
    with pytest.raises(OptionError, match="metric 'acuracy': is not measured"):
        chosen_rate(runs, "acuracy")


def test_every_run_has_its_json_and_a_failed_one_costs_only_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Workers, "run", in_this_process)
    asked = text_sweep(tmp_path)
    asked["methods"]["bad"] = {
        "adapter": {"peft_type": "LORA", "target_modules": ["nowhere"]},
        "learning_rates": [1e-3],
    }
    sweep, out, heard = parse_sweep(asked), tmp_path / "out", list[Any]()
    origin = {"versions": {"peft": "1"}, "commit": "abc"}
    found = run_sweep(sweep, out, provenance=origin, on_run=lambda *said: heard.append(said[:3]))
    # spectral_a: two rates with the first seed, the chosen one with the second; the others: one rate each.
    assert [(r.method, r.seed, r.ok) for r in found] == [
        ("spectral_a", 0, True), ("spectral_a", 0, True), ("spectral_a", 1, True),
        ("full", 0, True), ("full", 1, True), ("bad", 0, False),
    ]  # fmt: skip
    assert "target" in found[-1].error and "\n" not in found[-1].error
    assert {path.stem for path in (out / "records").iterdir()} == {name for _, _, name in heard}
    # Test is looked at with the chosen rate alone, and only validation while one is chosen.
    chosen = {r.rate for r in found[:3] if r.seed == 1}
    assert {(r.rate in chosen, "test" in r.metrics) for r in found[:3]} == {(True, True), (False, False)}
    assert all("validation" in r.metrics for r in found[:5])
    read = read_record(out / "records" / "task--full--0.001--1.json")
    assert read == found[4] and read.provenance == origin and read.seed == 1 and read.metrics["test"]
    assert (out / "runs" / "task--spectral_a--0.001--0" / "adapter").is_dir()
    assert not (out / "runs" / "task--full--0.001--0" / "model").exists()  # keep: adapters
    assert not list(out.rglob("checkpoints")) and not list(out.rglob("*.job"))

    again = list[str]()
    more = run_sweep(sweep, out, provenance=origin, on_run=lambda *said: again.append(said[2]))
    assert set(again) == {"task--bad--0.001--0"} and more[:5] == found[:5]  # only what failed is tried again
    path = out / "records" / "task--full--0.001--1.json"
    older = json.loads(path.read_text())
    del older["config"]["data"]["max_tokens"], older["config"]["training"]["workers"]
    path.write_text(json.dumps(older))  # as a version without these two options wrote it
    assert len(run_sweep(sweep, out, provenance=origin)) == len(found)
    path.write_text(read.model_dump_json())
    asked["run"]["training"]["steps"] = 3
    with pytest.raises(OutputError, match="another configuration: training.steps was 2, is 3. Give the same"):
        run_sweep(parse_sweep(asked), out, provenance={})
    asked["run"]["training"]["steps"] = 2
    asked["methods"]["bad"]["adapter"]["target_modules"] = ["query"]  # what failed may be put right
    assert all(r.ok for r in run_sweep(parse_sweep(asked), out, provenance=origin))

    summary = summarise(sweep, found)
    assert [row["method"] for row in summary["rows"]] == ["spectral_a", "full", "bad"]
    assert summary["rows"][2]["test"] is None and summary["failed"][0]["run"] == "task--bad--0.001--0"
    words = to_markdown(summary)
    assert "| full |" in words and "Rates were chosen with 1 of 2 seeds." in words and "task--bad" in words


def test_test_is_measured_once_and_what_it_cost_to_choose_is_deleted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, evaluate = list[tuple[str, float]](), TextClassification.evaluate

    def counted(self: Any, model: Any, split: str) -> dict[str, float]:
        seen.append((split, self.config.training.learning_rate))
        return evaluate(self, model, split)

    monkeypatch.setattr(Workers, "run", in_this_process)
    monkeypatch.setattr(TextClassification, "evaluate", counted)
    asked = text_sweep(tmp_path, keep="nothing", tuning_seeds=None)
    del asked["methods"]["full"]
    sweep, out, heard = parse_sweep(asked), tmp_path / "out", list[Any]()
    found = run_sweep(sweep, out, provenance={}, on_record=lambda records, runs: heard.append((len(records), runs)))
    tested = [rate for split, rate in seen if split == "test"]
    assert len(tested) == 2 and len(set(tested)) == 1  # the chosen rate, once for each seed
    assert tested[0] == chosen_rate(found, None)
    assert sum(split == "validation" for split, _ in seen) == 4
    assert heard == [(1, 4), (2, 4), (3, 4), (4, 4), (4, 4), (4, 4)]
    assert not list(out.rglob("adapter")) and all(
        (out / "runs" / p.stem / "result.json").is_file() for p in (out / "records").iterdir()
    )
    seen.clear()
    assert run_sweep(sweep, out, provenance={}) == found and not seen


def test_a_run_that_diverges_costs_itself_alone_and_is_not_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Workers, "run", in_this_process)
    asked, right = text_sweep(tmp_path, seeds=[0]), Loop.compute_loss

    def diverging(self: Any, *args: Any, **more: Any) -> Any:
        rate = self.plan.rates[0][1]
        return right(self, *args, **more) * (math.nan if rate == 1e-2 else 1.0)

    monkeypatch.setattr(Loop, "compute_loss", diverging)
    sweep, out = parse_sweep(asked), tmp_path / "out"
    found = run_sweep(sweep, out, provenance={})
    assert [(r.method, r.rate, r.ok, r.diverged) for r in found] == [
        ("spectral_a", 1e-3, True, False), ("spectral_a", 1e-2, False, True), ("full", 1e-3, True, False),
    ]  # fmt: skip
    assert "the loss is NaN at step 1 of 2" in found[1].error
    summary = summarise(sweep, found)
    assert [row["rate"] for row in summary["rows"]] == [1e-3, 1e-3] and "diverged" in summary["failed"][0]["error"]
    assert "the run diverged" in to_markdown(summary)
    again = list[str]()
    run_sweep(sweep, out, provenance={}, on_run=lambda *said: again.append(said[2]))
    assert not again


def test_a_wrong_test_split_leaves_the_choice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluate, broken = TextClassification.evaluate, [True]

    def fails(self: Any, model: Any, split: str) -> dict[str, float]:
        if split == "test" and broken:
            raise RuntimeError("no room")
        return evaluate(self, model, split)

    monkeypatch.setattr(Workers, "run", in_this_process)
    monkeypatch.setattr(TextClassification, "evaluate", fails)
    asked = text_sweep(tmp_path, seeds=[0])
    del asked["methods"]["full"]
    sweep, out = parse_sweep(asked), tmp_path / "out"
    found = run_sweep(sweep, out, provenance={})
    assert all(r.ok for r in found) and [bool(r.error) for r in found].count(True) == 1
    (row,) = summarise(sweep, found)["rows"]
    assert row["test"] is None and row["rate"] is not None and row["failed"] == 1
    broken.clear()
    assert summarise(sweep, run_sweep(sweep, out, provenance={}))["rows"][0]["test"] is not None


WRONG_TYPES = {
    "methods.a.adapter.r=[1, 2]": "r=",
    "methods.a.adapter={peft_type: LORA, r: [1, 2]}": "LORA: r=[1, 2] is of the type list, but int is needed",
    "methods.a.adapter={peft_type: LORA, r: 8, lora_dropout: x}": "lora_dropout='x' is of the type str",
    "methods.a.adapter={peft_type: LORA, target_modules: [1]}": "target_modules=[1]",
    "methods.a.adapter={method: spectral_a, columns: {a: 1}}": "columns=",
    "methods.a.learning_rates=1e-3": "learning_rates=0.001: input should be a valid list",
    "methods.a.learning_rates=[[1e-3]]": "learning_rates.0",
    "methods.a.learning_rates=[yes]": "learning_rates is [True], and a number is needed",
    "methods.a.learning_rates=[.inf]": "learning_rates.0",
    "methods.a.over={training: {batch_size: [4]}}": "training.batch_size",
    "tasks={t: {training: {warmup: yes}}}": "warmup is True, and a number is needed",
    "run.training.steps=[1, 2]": "training.steps",
    "run.training.batch_size=yes": "batch_size is True, and a number is needed",
    "run.training.weight_decay=.nan": "training.weight_decay",
    "run.data.limit={train: yes}": "limit is",
    "seeds=0": "seeds=0: input should be a valid list",
    "seeds=[no]": "seeds is [False], and a number is needed",
    "tuning_seeds=yes": "tuning_seeds is True",
    "grow=[1]": "grow=[1]",
}


@pytest.mark.parametrize("word", WRONG_TYPES)
def test_a_wrong_type_is_refused_before_the_first_run(word: str) -> None:
    values = plain_sweep(methods={"good": GRID, "a": GRID})
    values = json.loads(json.dumps(values))
    values["methods"]["a"]["adapter"] = {"method": "spectral_a", "target_modules": ["q"]}
    put(values, word)
    with pytest.raises(OptionError) as found:
        parse_sweep(values)
    assert WRONG_TYPES[word] in str(found.value) and "\n" not in str(found.value)


def test_a_summary_before_the_end_says_so() -> None:
    sweep = parse_sweep(plain_sweep(seeds=[0]))
    half = record(rate=1e-3).model_copy(
        update={"result": record().found.model_copy(update={"metrics": {"validation": {"accuracy": 0.5}}})}
    )
    summary = summarise(sweep, [half], planned=3)
    assert summary["says"][0] == "The sweep is not finished: 1 of 3 runs are done."
    assert summary["rows"][0]["test"] is None and headline(summary) == "No run has its test figures yet."
    assert "| – | – |" in to_markdown(summary) and "one seed" in to_markdown(summarise(sweep, [record()]))


def test_two_runs_are_at_work_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    together = threading.Barrier(2, timeout=PATIENCE)  # broken where the second run waits for the first

    def one(self: Workers, job: Path, log: Path, on_step: Any) -> int:
        together.wait()
        log.write_text("ended")
        return 1

    monkeypatch.setattr(Workers, "run", one)
    asked = text_sweep(tmp_path, seeds=[0])
    asked["methods"] |= {"again": asked["methods"]["full"] | {"learning_rates": [1e-3, 1e-2]}}
    del asked["methods"]["full"]
    found = run_sweep(parse_sweep(asked), tmp_path / "out", provenance={}, jobs=2)
    assert [(r.method, r.rate, r.jobs) for r in found] == [
        (method, rate, 2) for method in ("spectral_a", "again") for rate in (1e-3, 1e-2)
    ]


@pytest.mark.slow
def test_ctrl_c_stops_with_a_checkpoint_and_the_same_call_goes_on(tmp_path: Path) -> None:
    """In processes of their own, as users have it."""
    jobs = 2
    asked = text_sweep(tmp_path, seeds=[0])
    asked["run"]["training"] |= {"steps": 400, "save_every": 1000}
    one = asked["methods"]["spectral_a"] | {"learning_rates": [1e-2]}
    asked["methods"] = {name: one for name in "ab"[:jobs]}
    sweep, out = parse_sweep(asked), tmp_path / "out"
    reached = dict[str, int]()

    def stop(done: int, runs: int, name: str, step: int, steps: int, loss: float | None) -> None:
        reached[name] = step
        if len(reached) == jobs and min(reached.values()) >= 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_sweep(sweep, out, provenance={}, on_run=stop, jobs=jobs)
    ended = {path.stem for path in (out / "records").iterdir()}  # one may, before the other has begun
    assert len(reached) == jobs and len(ended) < jobs
    saved = {path.parts[-3]: int(path.name.removeprefix("checkpoint-")) for path in out.rglob("checkpoint-*")}
    assert saved.keys() == reached.keys() - ended and all(3 <= step <= 400 for step in saved.values())
    assert min(saved.values()) < 400
    steps = dict[str, list[int]]()
    found = run_sweep(sweep, out, provenance={}, on_run=lambda *said: steps.setdefault(said[2], []).append(said[3]))
    assert all(r.ok and r.found.steps == 400 and (r.found.peak_bytes or 1) > 0 for r in found)
    assert {n: [s for s in told if s] for n, told in steps.items()} == {n: [*range(saved[n] + 1, 401)] for n in saved}


@pytest.mark.parametrize("when", ["while it loads", "while it trains"])
def test_a_run_ends_with_its_sweep_also_where_ctrl_c_is_ignored(tmp_path: Path, when: str) -> None:
    """A shell lets background jobs ignore Ctrl-C, and their processes inherit that."""
    asked = text_sweep(tmp_path)
    asked["run"]["training"] |= {"steps": 100_000, "save_every": 100_000}
    sweep = parse_sweep(asked)
    told = {"config": cell(sweep, "task", "full", 1e-3, 0).config.plain(), "folder": str(tmp_path / "run")}
    told |= {"answer": str(tmp_path / "answer"), "forgetting": None, "base_loss": None, "measures": None}
    (tmp_path / "job").write_text(json.dumps(told))
    before, mask = signal.signal(signal.SIGINT, signal.SIG_IGN), getattr(signal, "pthread_sigmask", lambda *asked: None)
    try:
        mask(signal.SIG_BLOCK, {signal.SIGINT})  # as Ray does
        process = subprocess.Popen(
            [sys.executable, "-m", "spectune.sweeps.worker", str(tmp_path / "job")],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        )  # fmt: skip
    finally:
        mask(signal.SIG_UNBLOCK, {signal.SIGINT})
        signal.signal(signal.SIGINT, before)
    with process:
        assert process.stdout is not None and process.stdin is not None
        try:
            if when == "while it trains":
                assert process.stdout.readline().startswith("[1,")
            process.stdin.close()
            process.stdout.close()
            assert process.wait(PATIENCE) != 0
        finally:
            process.kill()
    saved = list((tmp_path / "run" / "checkpoints").glob("checkpoint-*"))
    if when == "while it trains":
        assert saved
    else:  # a library may have caught the interrupt; then the first step told sends it again, and the next one saves
        assert all(int(path.name.rpartition("-")[2]) <= 2 for path in saved)


def test_an_interrupt_that_a_library_caught_while_loading_stops_the_first_step() -> None:
    ended, before = threading.Event(), signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        tell, _ = _telling(io.StringIO(), ended, threading.Event())
        with stop_on_signal() as request:
            tell(1, 9, 0.5)
            assert not request.asked
            ended.set()
            tell(2, 9, 0.5)
            assert request.asked
            tell(3, 9, 0.5)  # not twice: a second interrupt ends the process without a checkpoint
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("begun", [False, True])
def test_a_run_without_a_step_ends_even_where_the_interrupt_is_lost(begun: bool) -> None:
    words = f"""
import os, signal, sys, threading, time
os.dup2(os.open(os.devnull, os.O_RDONLY), 0)  # the sweep is gone
from spectune.sweeps import worker
worker.GRACE = 0.1
signal.signal(signal.SIGINT, lambda *_: None)  # lost, as where a library catches it while it is imported
ended, begun, returned = threading.Event(), threading.Event(), []
if {begun}:
    begun.set()

def watch():
    worker._end_with_the_sweep(ended, begun)
    returned.append(True)

threading.Thread(target=watch, daemon=True).start()
while not returned:
    time.sleep(0.01)
sys.exit(7)  # it has steps to save, and time for that
"""
    done = script(words)
    assert done.returncode == (7 if begun else 130)


@pytest.mark.slow
@pytest.mark.parametrize("when", ["while its run loads", "while its run trains"])
def test_a_sweep_in_the_background_stops_when_it_is_told_to(tmp_path: Path, when: str) -> None:
    asked = text_sweep(tmp_path, seeds=[0])
    asked["run"]["training"] |= {"steps": 100_000, "save_every": 100_000}
    del asked["methods"]["full"]
    (tmp_path / "sweep.yaml").write_text(json.dumps(asked))
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as a shell does for its background jobs
    try:
        process = subprocess.Popen(
            [sys.executable, "-m", "spectune.cli", "compare", "sweep.yaml", "-o", "out"],
            cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
    finally:
        signal.signal(signal.SIGINT, before)
    run = tmp_path / "out" / "runs" / "task--spectral_a--0.001--0"
    log = run.with_name(f"{run.name}.log")  # there when the run's process is
    seen = log if when == "while its run loads" else run / "checkpoints"  # there when its loop begins
    with process:
        try:
            while not seen.exists():
                assert process.poll() is None
                time.sleep(0.05)
            process.terminate()
            assert process.wait(PATIENCE) == 130
            assert "repeat the command" in (process.stderr.read() if process.stderr else "")
        finally:
            process.kill()
    # Its process has ended with it, for it holds the lock of the run as long as it trains.
    run.mkdir(exist_ok=True)
    with hold_folder(run):
        assert not (run / "adapter").exists()


def test_a_grid_goes_on_by_its_own_last_step_and_no_further_than_asked() -> None:
    assert rate_beyond([1e-3, 3e-3, 9e-3], 9e-3) == 2.7e-2 and rate_beyond([9e-3, 3e-3, 1e-3], 1e-3) == 3.3e-4
    assert rate_beyond([1e-3, 3e-3, 9e-3], 3e-3) is None and rate_beyond([1e-3], 1e-3) is None
    assert rate_beyond([1e-3, 3e-3], None) is None


def test_a_process_that_dies_leaves_one_line(tmp_path: Path) -> None:
    (tmp_path / "log").write_text("Traceback\n\nMemoryError: no room\n")
    assert last_words(1, tmp_path / "log") == "the process ended with status 1: MemoryError: no room"
    assert last_words(-9, tmp_path / "log") == "the process was killed by signal 9 (out of memory?)."


def test_forgetting_is_the_rise_of_the_loss_on_general_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("trl")
    monkeypatch.setattr(Workers, "run", in_this_process)
    (tmp_path / "general.txt").write_text("w1 w2 w3 w4 " * 30)
    run = tiny.lm_run(tmp_path, training={"steps": 2, "batch_size": 4}, data={"validation_share": 0.3})
    del run["adapter"], run["training"]["learning_rate"]
    adapter = {"method": "spectral_a", "r": 2, "target_modules": ["q_proj"]}
    asked = {
        "run": run,
        "methods": {"a": {"adapter": adapter, "learning_rates": [1e-2, 2e-2]}},
        "seeds": [0],
        "forgetting": {"file": str(tmp_path / "general.txt")},
    }
    found = run_sweep(parse_sweep(asked), tmp_path / "out", provenance={})
    assert all(r.ok for r in found), found
    bases = {r.general_loss_base for r in found}
    assert len(bases) == 1 and found[0].general_loss != found[1].general_loss
    assert found[0].forgetting == pytest.approx(found[0].general_loss - bases.pop())  # type: ignore[operator]
    summary = summarise(parse_sweep(asked), found)
    assert (
        summary["metric"] == "loss"
        and summary["smaller_is_better"] == {"task": True}
        and "forgetting" in to_markdown(summary)
    )


def test_general_loss_of_a_model_that_knows_nothing_is_the_log_of_its_words(tmp_path: Path) -> None:
    import torch
    import transformers as tf

    model = tf.LlamaForCausalLM(
        tf.LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=64)
    )
    torch.nn.init.zeros_(model.lm_head.weight)
    (tmp_path / "general.txt").write_text("w1 w2 w3 " * 20)
    asked = GeneralText(file=str(tmp_path / "general.txt"), hub=None, hub_config=None, split="test", tokens=50)
    assert general_loss(model, tiny.tokenizer(), asked) == pytest.approx(math.log(64))
    (tmp_path / "general.txt").write_text("")
    with pytest.raises(DataError, match="has only 0 tokens"):
        general_loss(model, tiny.tokenizer(), asked)


def test_every_rate_that_was_tried_stays_in_the_curve() -> None:
    sweep = parse_sweep(plain_sweep() | {"tuning_seeds": 1})
    tried = [record(rate=rate, validation=v) for rate, v in ((1e-3, 0.5), (1e-2, 0.6), (1e-1, 0.4))]
    (row,) = summarise(sweep, [*tried, record(rate=1e-2, seed=1, validation=0.1)])["rows"]
    assert row["validation_by_rate"] == [[1e-3, 0.5], [1e-2, 0.6], [1e-1, 0.4]]
    assert row["rate"] == 1e-2 and row["seeds"] == 2 and not row["at_edge"]


def test_losses_and_accuracies_have_no_mean_and_each_its_own_order() -> None:
    sweep = parse_sweep(plain_sweep() | {"tasks": {"words": {}, "labels": {}}})
    loss = {split: {"wikitext/word_perplexity,none": 9.0} for split in ("validation", "test")}
    summary = summarise(sweep, [record(task="words", metrics=loss), record(task="labels")])
    assert summary["smaller_is_better"] == {"words": True, "labels": False} and summary["averages"] == []


def test_forgetting_is_refused_before_anything_runs_where_it_cannot_be_measured(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("words")
    for file, line in (("a.txt", "works only for language models, not for text_classification"),):
        asked = text_sweep(tmp_path, forgetting={"file": str(tmp_path / file)})
        with pytest.raises(OptionError, match=line):
            run_sweep(parse_sweep(asked), tmp_path / "out", provenance={})
    asked = text_sweep(tmp_path, forgetting={"file": str(tmp_path / "b.txt")})
    run = tiny.lm_run(tmp_path, data={"validation": tiny.sums(tmp_path / "v.jsonl", 4)})
    del run["adapter"], run["training"]["learning_rate"]
    with pytest.raises(DataError, match="the file .*b.txt does not exist"):
        run_sweep(parse_sweep(asked | {"run": run}), tmp_path / "out", provenance={})
    assert not (tmp_path / "out").exists()


def test_what_libraries_print_is_no_step() -> None:
    words = """
import os, threading
from spectune.sweeps.worker import _own_stdout, _telling
tell, validated = _telling(_own_stdout(), threading.Event(), threading.Event())
os.system("echo '[1/2] nvcc kernel.cu'")
print("[a library]", flush=True)
tell(1, 2, 0.5), validated(1, 2, 0.75), tell(2, 2, float("nan"))
"""
    done = script(words)
    assert done.returncode == 0, done.stderr
    assert [json.loads(line) for line in done.stdout.splitlines()] == [[1, 2, 0.5], [1, 2, None, 0.75], [2, 2, None]]
    assert "[1/2] nvcc" in done.stderr and "[a library]" in done.stderr


def test_ctrl_c_comes_once_while_a_sweep_runs() -> None:
    """The command line raises a second one after some seconds, which here would end the runs without a checkpoint."""

    def again(number: int, frame: object) -> None:
        raise AssertionError

    before = signal.signal(signal.SIGINT, again)
    try:
        with plain_ctrl_c():
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGTERM)
        assert signal.getsignal(signal.SIGINT) is again
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        with plain_ctrl_c():
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_the_summary_is_of_the_chosen_rate_alone() -> None:
    sweep = parse_sweep(plain_sweep())
    runs = [
        record(rate=rate, seed=seed, validation=v + seed / 100, test=t + seed / 10)
        for rate, v, t in ((1e-3, 0.5, 0.9), (1e-2, 0.6, 0.4), (1e-1, 0.4, 0.9))
        for seed in (0, 1)
    ]
    (row,) = summarise(sweep, runs)["rows"]
    assert (row["rate"], row["at_edge"], row["seeds"]) == (1e-2, False, 2)
    assert row["test"] == pytest.approx(0.45) and row["low"] == pytest.approx(0.4) and row["high"] == pytest.approx(0.5)
    assert row["validation"] == pytest.approx(0.605) and row["spread"] == pytest.approx(0.1 / math.sqrt(2))
    at_end = [
        r.model_copy(
            update={
                "result": r.found.model_copy(
                    update={"metrics": {k: {"accuracy": r.rate} for k in ("validation", "test")}}
                )
            }
        )
        for r in runs
    ]
    said = summarise(sweep, at_end)["says"]
    assert any("a (task)" in sentence and "end of its grid" in sentence for sentence in said)


def test_each_task_is_told_in_its_own_metric() -> None:
    sweep = parse_sweep(plain_sweep() | {"tasks": {"sst2": {}, "stsb": {}}})
    pearson = {split: {"pearson": 0.8, "spearman": 0.7} for split in ("validation", "test")}
    runs = [record(task="sst2"), record(task="stsb", metrics=pearson)]
    summary = summarise(sweep, runs)
    assert summary["task_metrics"] == {"sst2": "accuracy", "stsb": "pearson"}
    assert summary["metric"] == "accuracy or pearson" and not any(summary["smaller_is_better"].values())
    told = to_markdown(summary)
    assert "test accuracy" in told.split("## stsb")[0] and "test pearson" in told.split("## stsb")[1]


def test_results_stand_in_the_form_of_pefts_method_comparison(tmp_path: Path) -> None:
    sweep = parse_sweep(plain_sweep())
    runs = [record(rate=1e-2, seed=s, validation=0.7, test=0.6 + s / 10) for s in (0, 1)] + [record(rate=1e-3)]
    written = write_method_comparison(sweep, runs, tmp_path)
    assert [p.name for p in written] == ["a--base-seed0.json", "a--base-seed1.json"]
    row = json.loads(written[1].read_text())
    # What processing.py of method_comparison reads.
    last = row["train_info"]["metrics"][-1]
    assert last["test accuracy"] == 0.7 and last["train samples"] == 40
    assert row["run_info"]["peft_config"]["peft_type"] == "SPECTUNE" and row["train_info"]["status"] == "success"
    for name in ("reserved_avg", "max", "reserved_99th"):
        assert isinstance(row["train_info"][f"accelerator_memory_{name}"], int)
    for package in ("peft", "transformers", "datasets", "torch", "bitsandbytes"):
        assert f"{package}-version" in row["meta_info"]["package_info"]
    full = runs[0].model_copy(update={"config": runs[0].config | {"adapter": "none"}})
    assert as_method_comparison(sweep, full)["run_info"]["peft_config"] is None


def test_a_record_survives_its_file(tmp_path: Path) -> None:
    written: SweepRecord = record(losses=[math.inf], test=math.nan)
    written.write(tmp_path / "r.json")
    read = read_record(tmp_path / "r.json")
    assert math.isnan(read.metrics["test"]["accuracy"]) and read.final_loss == math.inf
    (tmp_path / "r.json").write_text("{}")
    with pytest.raises(OutputError, match="this is not a SweepRecord"):
        read_record(tmp_path / "r.json")


def test_the_example_sweep_is_read() -> None:
    sweep = load_sweep(Path(__file__).parents[2] / "examples" / "sweep.yaml", ["seeds=[0]"])
    assert sweep.seeds == [0] and {"spectral_a", "lora", "full"} <= set(sweep.methods)
