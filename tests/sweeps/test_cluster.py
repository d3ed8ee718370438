"""Sweeps on a cluster, with a double in its place: what is refused, what is started again, what a node says."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from spectune import __version__
from spectune.errors import MissingExtraError, OptionError, OutputError
from spectune.sweeps import Cluster, connect, parse_sweep, run_sweep, worker
from spectune.sweeps import cluster as cluster_file
from spectune.sweeps.cluster import LostError, _told_since
from spectune.sweeps.on_node import Errand, obstacle
from spectune.sweeps.worker import INTERRUPTED, main
from tests.sweeps.sweeps import text_sweep


class Double(Cluster):
    """Does each errand at once, in this process; `first` is what the first ones return in place of that."""

    def __init__(self, first: Sequence[Any] = ()) -> None:
        super().__init__(threads=1)
        self.first, self.errands, self.cancelled = list(first), list[Errand](), list[tuple[Any, bool]]()
        self.over, self.looks = threading.Event(), 0
        self.over.set()

    def prepare(self, folder: Path) -> None:
        assert (folder / "sweep.json").is_file()

    def submit(self, errand: Errand) -> Errand:
        self.errands.append(errand)
        return errand

    def ended(self, task: Errand) -> bool:
        self.looks += 1
        assert self.looks < 1000, "nothing ended it"
        return self.over.is_set()

    def outcome(self, task: Errand) -> tuple[int, Sequence[str]]:
        if not self.first:
            return main(json.loads(Path(task.job).read_text())), task.awaited
        found = self.first.pop(0)
        if isinstance(found, Exception):
            raise found
        return found, ()

    def cancel(self, task: Errand, at_once: bool) -> None:
        self.cancelled.append((task, at_once))
        self.over.set()


@pytest.fixture
def job(tmp_path: Path) -> Path:
    (tmp_path / "a--0.1--0.job").write_text(json.dumps({"answer": str(tmp_path / "a"), "folder": str(tmp_path / "f")}))
    return tmp_path / "a--0.1--0.job"


def test_all_runs_that_do_not_wait_for_each_other_are_submitted_at_once(tmp_path: Path) -> None:
    """Two rates of one method; and the records say where they ran."""
    asked = text_sweep(tmp_path, seeds=[0], keep="nothing")
    del asked["methods"]["full"]
    together, double = threading.Barrier(2, timeout=30), Double([LostError("gone"), LostError("gone")])
    double.ended = lambda task: together.wait() >= 0  # type: ignore[method-assign]
    found = run_sweep(parse_sweep(asked), tmp_path / "out", provenance={}, engine=double)
    assert [r.error for r in found] == ["the process ended with status 1: gone"] * 2 and found[0].jobs == 2
    assert {Path(e.home) for e in double.errands} == {Path.cwd()} and all(
        Path(e.job).is_absolute() for e in double.errands
    )
    asked["methods"]["spectral_a"]["learning_rates"] = [1e-3]
    again = run_sweep(parse_sweep(asked), tmp_path / "out", provenance={"machine": "?", "commit": "c"}, engine=Double())
    assert all(r.ok for r in again) and again[0].provenance["commit"] == "c"
    assert again[0].provenance["machine"]["platform"]
    assert {p.suffix for p in (tmp_path / "out/runs").iterdir() if p.is_file()} == {".log"}  # of the failed run


@pytest.mark.parametrize("taken", [INTERRUPTED, -2, -15])
def test_a_run_that_its_node_stopped_is_started_again_a_failed_one_is_not(job: Path, taken: int) -> None:
    double = Double([taken, taken, 1])
    assert double.run(job, job.with_suffix(".log"), lambda *step: None) == 1 and len(double.errands) == 3


def test_stop_cancels_what_runs_and_starts_nothing_else(job: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster_file, "POLL", 0.01)
    double, log = Double([1]), job.with_suffix(".log")
    double.over.clear()

    def stop(step: int, steps: int, loss: float | None) -> None:
        assert (step, steps, loss) == (3, 9, 0.5)
        double.stop()

    submit = double.submit
    told = b"[2, 9, 0.6]\n[3, 9, 0.5]\n[4, 9"  # the last line is not whole yet
    double.submit = lambda errand: (job.with_suffix(".steps").write_bytes(told), submit(errand))[1]  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        double.run(job, log, stop)
    assert double.cancelled == [(double.errands[0], False)] and not job.with_suffix(".steps").exists()
    with pytest.raises(KeyboardInterrupt):
        double.run(job, log, stop)
    assert len(double.errands) == 1


def test_a_run_waits_for_a_process_that_still_saves_it(job: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of a killed sweep or of a lost node."""
    told, asked = json.loads(job.read_text()), list[tuple[Path, float]]()
    monkeypatch.setattr(worker, "hold_folder", lambda *how: (asked.append(how), nullcontext())[1])
    main(told | {"config": {}})
    assert not asked  # a new folder belongs to nobody
    Path(told["folder"]).mkdir()
    assert main(told | {"config": {}}) == worker.FAILED and asked == [(Path(told["folder"]), worker.LINGER)]


def test_the_last_whole_step_and_all_validation_losses_are_read(tmp_path: Path) -> None:
    steps, lines = tmp_path / "steps", "".join(f"[{i}, 5000, null]\n" for i in range(5000))
    assert _told_since(steps, 0) == ([], 0)
    steps.write_text("a library\n[7, 5000, null, 0.25]\n[8, 5000, null, NaN]\n" + lines + "[5000, 50")
    (first, diverged, last), read = _told_since(steps, 0)
    assert first == [7, 5000, None, 0.25] and diverged[3] != diverged[3] and last == [4999, 5000, None]
    assert _told_since(steps, read) == ([], read)
    with steps.open("a") as more:
        more.write("00, null]\n")
    told, read = _told_since(steps, read)
    assert told == [[5000, 5000, None]] and read == steps.stat().st_size
    steps.write_text("[1, 5000, null]\n")  # another node began it anew
    assert _told_since(steps, read)[0] == [[1, 5000, None]]


def test_a_node_says_in_one_line_why_it_cannot_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "token").touch()
    asked = (str(tmp_path), "token", str(tmp_path), __version__)
    assert obstacle(*asked) == ""
    assert obstacle(str(tmp_path / "other"), *asked[1:]).startswith(f"cannot see {tmp_path / 'other'}. Choose a folder")
    assert obstacle(*asked[:2], str(tmp_path / "home"), __version__).startswith(
        f"cannot see {tmp_path / 'home'}, where"
    )
    assert obstacle(*asked[:3], "9") == f"has spectune {__version__}, the command has 9. Install the same"
    monkeypatch.setitem(sys.modules, "spectune", None)
    assert obstacle(*asked).startswith("cannot import spectune (")


@pytest.mark.parametrize(
    ("asked", "line"),
    [
        (("raay",), "--on raay: this is unknown. Give ray, ray://HOST:PORT or slurm."),
        (("ray://",), "--on ray://: this is unknown"),
        (("slurm://host",), "--on slurm://host: this is unknown"),
        (("ray", 1, 1.5), "--gpus 1.5: only less than one GPU can be shared"),
        (("ray", 1, None, ["time=3"]), "--slurm: works only with --on slurm"),
        (("slurm", 1, None, ["time"]), "--slurm time: give NAME=VALUE"),
    ],
)
def test_a_wrong_cluster_is_refused(asked: tuple[Any, ...], line: str) -> None:
    with pytest.raises(OptionError) as found:
        connect(*asked)
    assert str(found.value).startswith(line)


@pytest.mark.parametrize(("on", "package"), [("ray", "ray"), ("slurm", "submitit")])
def test_a_missing_package_names_its_extra(on: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtraError, match=rf"--on {on}: .*pip install 'spectune\[{on}\]'"):
        connect(on)


def test_the_address_of_a_store_is_not_taken_for_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OutputError, match="s3:/bucket/out: this is an address, and a path on this machine is needed"):
        run_sweep(parse_sweep(text_sweep(tmp_path)), Path("s3://bucket/out"), provenance={})
    assert not Path("s3:").exists()
