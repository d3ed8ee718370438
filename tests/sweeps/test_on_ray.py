"""Sweeps on a Ray cluster of two nodes on this machine: the same figures, and what a lost node or driver costs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import pytest

from spectune.errors import OptionError, OutputError
from spectune.sweeps import SweepRecord, connect, on_ray, parse_sweep, run_sweep
from spectune.sweeps.remote import Remote
from tests.effort import PATIENCE
from tests.sweeps.sweeps import text_sweep

pytest.importorskip("ray")
STEPS = 1200
SMALL = 100 * 2**20
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # ray's own


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A head without CPUs, and two nodes with one each."""
    import ray
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    found = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "object_store_memory": SMALL})
    found.two = [found.add_node(num_cpus=1, object_store_memory=SMALL) for _ in range(2)]
    monkeypatch.setenv("RAY_ADDRESS", found.address)
    yield found
    ray.shutdown()
    found.shutdown()


def figures(records: list[SweepRecord]) -> dict[tuple[str, float, int], Any]:
    return {(r.method, r.rate, r.seed): (r.metrics, r.found.losses) for r in records}


def long_sweep(folder: Path, steps: int = STEPS, save_every: int = STEPS // 8) -> dict[str, Any]:
    asked = text_sweep(folder, seeds=[0])
    asked["run"]["training"] |= {"steps": steps, "save_every": save_every}
    return asked


def kill_node(cluster: Any, node: Any, reached: dict[str, int]) -> list[str]:
    """Kill a node with all its processes, as a machine that goes off, and get the names of the runs that were there.

    Nothing is done while none of them has trained for some steps.
    """
    raylet, parents = node.all_processes["raylet"][0].process.pid, dict[int, int]()
    for status in Path("/proc").glob("[0-9]*/status"):
        with suppress(OSError):
            lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
            parents[int(lines["Pid"])] = int(lines["PPid"])
    there = dict[str, int]()
    for pid, parent in parents.items():
        if parents.get(parent) == raylet:
            words = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
            if "spectune.sweeps.worker" in words:
                there[Path(words[-2]).stem] = pid
    if not any(reached.get(name, 0) >= STEPS // 4 for name in there):
        return []
    for pid in there.values():
        os.kill(parents[pid], signal.SIGKILL)  # first, or it would tell that the run was killed
        os.kill(pid, signal.SIGKILL)
    cluster.remove_node(node, allow_graceful=False)
    return list(there)


def test_figures_are_those_of_this_machine(cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sweep = parse_sweep(text_sweep(tmp_path))
    here = run_sweep(sweep, tmp_path / "here", provenance={}, jobs=2)
    there = run_sweep(sweep, tmp_path / "there", provenance={"machine": "?"}, engine=connect("ray", gpus=0))
    assert all(r.ok for r in here) and figures(there) == figures(here)
    assert there[0].provenance["machine"]["cpu_count"] == os.cpu_count()
    left = {path.suffix for path in (tmp_path / "there" / "runs").iterdir() if path.is_file()}
    assert not left and not list((tmp_path / "there").glob(".seen-*"))
    with pytest.raises(
        OptionError, match=r"needs 1 CPU and 0.5 GPU, and no node has as much: 0 CPU and 0 GPU; 1 CPU and"
    ):
        connect("ray", gpus=0.5)
    monkeypatch.setattr(on_ray, "token_in", lambda folder: nullcontext("no-such-file"))
    with pytest.raises(OutputError, match=r"--on ray: the node [\d.]+ cannot see .*/other\. Choose a folder"):
        run_sweep(sweep, tmp_path / "other", provenance={}, engine=connect("ray", gpus=0))
    assert not list((tmp_path / "other" / "runs").iterdir())


def test_a_node_that_is_killed_costs_only_what_ran_there_since_its_checkpoint(cluster: Any, tmp_path: Path) -> None:
    sweep, killed, turn = parse_sweep(long_sweep(tmp_path)), list[str](), threading.Lock()
    reached, back = dict[str, int](), dict[str, tuple[int, int]]()

    def kill(done: int, runs: int, name: str, step: int, steps: int, loss: float | None) -> None:
        with turn:
            if step and step < reached.get(name, 0):
                back[name] = (reached[name], step)
            reached[name] = step
            if not killed:
                killed.extend(kill_node(cluster, cluster.two[0], reached))

    there = run_sweep(sweep, tmp_path / "there", provenance={}, engine=connect("ray", gpus=0), on_run=kill)
    here = run_sweep(sweep, tmp_path / "here", provenance={}, jobs=2)
    assert len(killed) == 1 and all(r.ok for r in there) and figures(there) == figures(here)
    assert set(back) <= set(killed)  # no other one began again


def test_ctrl_c_saves_checkpoints_on_the_nodes(cluster: Any, tmp_path: Path) -> None:
    sweep, out = parse_sweep(long_sweep(tmp_path, 100_000, 100_000)), tmp_path / "out"
    reached = dict[str, int]()

    def stop(done: int, runs: int, name: str, step: int, steps: int, loss: float | None) -> None:
        reached[name] = step
        if sum(step >= 3 for step in reached.values()) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_sweep(sweep, out, provenance={}, engine=connect("ray", gpus=0), on_run=stop)
    saved = {path.parts[-3]: int(path.name.rpartition("-")[2]) for path in out.rglob("checkpoint-*")}
    assert saved.keys() == {name for name, step in reached.items() if step}
    assert all(reached[name] <= step < 100_000 for name, step in saved.items())
    assert not list((out / "records").iterdir())


def test_a_sweep_whose_driver_is_killed_ends_in_the_same_table(cluster: Any, tmp_path: Path) -> None:
    asked = long_sweep(tmp_path)
    (tmp_path / "sweep.yaml").write_text(json.dumps(asked))
    command = [sys.executable, "-m", "spectune.cli", "compare", "sweep.yaml", "-o", "there", "--on", "ray"]
    for kill in (True, False):
        with subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True) as process:
            runs = tmp_path / "there" / "runs"
            while kill and not list(runs.rglob("checkpoint-*")):
                assert process.poll() is None, process.stderr and process.stderr.read()
                time.sleep(0.1)
            if kill:
                process.send_signal(signal.SIGKILL)
            _, said = process.communicate(timeout=10 * PATIENCE)
    assert process.returncode == 0, said
    sweep = parse_sweep(asked)
    there = run_sweep(sweep, tmp_path / "there", provenance={}, on_run=lambda *run: pytest.fail(f"repeated {run}"))
    here = run_sweep(sweep, tmp_path / "here", provenance={}, jobs=2)
    assert figures(there) == figures(here)


def test_a_store_takes_the_place_of_a_shared_disk(
    cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    sweep, url, heard = parse_sweep(text_sweep(tmp_path)), (tmp_path / "store").as_uri(), list[Any]()
    here = run_sweep(sweep, tmp_path / "here", provenance={}, jobs=2)
    there = run_sweep(sweep, url, provenance={"machine": "?"}, engine=connect("ray", gpus=0))
    assert all(r.ok for r in here) and figures(there) == figures(here)
    assert there[0].provenance["machine"]["cpu_count"] == os.cpu_count()
    names = Remote(url).names()
    assert not [name for name in names if name.endswith((".steps", ".answer", ".log", ".job")) or "checkpoint" in name]
    assert {name.split("/")[1] for name in names if "/adapter/" in name} == {
        f"{r.task}--{r.method}--{r.rate:g}--{r.seed}" for r in here if r.method == "spectral_a"
    }
    again = run_sweep(sweep, url, provenance={}, on_run=lambda *said: heard.append(said))
    assert figures(again) == figures(here) and not heard
    with pytest.raises(OutputError, match=r"--on ray: the node [\d.]+ does not reach the store: memory://"):
        run_sweep(sweep, "memory://other", provenance={}, engine=connect("ray", gpus=0))


def test_a_killed_node_and_a_killed_driver_cost_a_store_only_the_steps_since_a_checkpoint(
    cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, url = long_sweep(tmp_path), (tmp_path / "store").as_uri()
    (tmp_path / "sweep.yaml").write_text(json.dumps(asked))
    command = [sys.executable, "-m", "spectune.cli", "compare", "sweep.yaml", "-o", url, "--on", "ray"]
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path / "first")}
    with subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True) as process:
        while not list((tmp_path / "store").rglob("trainer_state.json")):
            assert process.poll() is None, process.stderr and process.stderr.read()
            time.sleep(0.1)
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=10 * PATIENCE)
    saved = {path.parts[-4]: int(path.parent.name[11:]) for path in (tmp_path / "store").rglob("trainer_state.json")}
    first, reached, killed = dict[str, int](), dict[str, int](), list[str]()

    def kill(done: int, runs: int, name: str, step: int, steps: int, loss: float | None) -> None:
        reached[name] = step
        if step:
            first.setdefault(name, step)
        if not killed:
            killed.extend(kill_node(cluster, cluster.two[0], reached))

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "second"))
    sweep = parse_sweep(asked)
    there = run_sweep(sweep, url, provenance={}, engine=connect("ray", gpus=0), on_run=kill)
    here = run_sweep(sweep, tmp_path / "here", provenance={}, jobs=2)
    assert killed and all(r.ok for r in there) and figures(there) == figures(here)
    assert all(first[name] > step for name, step in saved.items() if name in first)
