"""Sweeps in a store: the same table, what travels, what another machine goes on with, and what is refused."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from spectune.cli.compare import compare
from spectune.errors import MissingExtraError, OptionError, OutputError
from spectune.runs import folder as run_folder
from spectune.runs import result
from spectune.sweeps import SweepRecord, claim, parse_sweep, remote, run_sweep, store, sweep_folder
from spectune.sweeps.on_node import obstacle
from spectune.sweeps.remote import Remote
from spectune.sweeps.store import Store
from spectune.sweeps.workers import Workers
from spectune.training import checkpoints
from tests.effort import PATIENCE
from tests.sweeps.sweeps import in_this_process, text_sweep
from tests.sweeps.test_cluster import Double


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(remote, "WAITS", (0.01,))
    monkeypatch.setattr(claim, "SETTLES", 0.1)
    return tmp_path / "cache"


@pytest.fixture
def memory() -> Any:
    """The file system of memory://, empty."""
    import fsspec

    found = fsspec.filesystem("memory")
    found.store.clear(), found.pseudo_dirs.clear()
    return found


def figures(records: list[SweepRecord]) -> list[Any]:
    return [(r.method, r.rate, r.seed, r.metrics, r.found.losses) for r in records]


def trained(folder: Path, steps: tuple[int, ...] = (), **files: str) -> Path:
    """A run's folder as training leaves it."""
    files = {"run.yaml": "recipe: a\n"} | {name.replace("__", "."): words for name, words in files.items()}
    for step in steps:
        files |= {f"checkpoints/checkpoint-{step}/{name}": str(step) for name in ("trainer_state.json", "weights")}
    for name, words in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(words)
    return folder


def test_names_of_a_run_are_those_of_its_folder() -> None:
    """remote.py imports nothing of spectune, since nodes get its code."""
    assert (remote.RUNS, remote.RUN, remote.RESULT) == (store.RUNS, run_folder.RUN_FILE, result.RESULT_FILE)
    assert (f"{run_folder.ADAPTER}/", f"{run_folder.MODEL}/") == remote.WEIGHTS
    assert (remote.CHECKPOINTS, remote.STATE) == (run_folder.CHECKPOINTS, checkpoints.STATE_FILE)
    assert remote.WHOLE.fullmatch(f"{remote.CHECKPOINTS}/{checkpoints.PREFIX}20/{checkpoints.STATE_FILE}")


def test_a_store_ends_in_the_table_of_a_folder(
    tmp_path: Path, cache: Path, memory: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Workers, "run", in_this_process)
    asked = text_sweep(tmp_path)
    del asked["methods"]["full"]
    sweep, heard = parse_sweep(asked), list[str]()
    here = run_sweep(sweep, tmp_path / "here", provenance={})
    there = run_sweep(sweep, "memory://bucket/out/", provenance={})
    assert figures(there) == figures(here)
    local = [path.relative_to(tmp_path / "here").as_posix() for path in (tmp_path / "here").rglob("*")]
    kept = [name for name in local if (tmp_path / "here" / name).is_file() and "/." not in f"/{name}"]
    assert sorted(Remote("memory://bucket/out").names()) == sorted(kept)
    assert not list(cache.rglob("work-*"))  # nothing is left here
    shutil.rmtree(cache)
    again = run_sweep(sweep, "memory://bucket/out", provenance={}, on_run=lambda *said: heard.append(said[2]))
    assert figures(again) == figures(here) and not heard
    asked["run"]["training"]["steps"] = 3
    with pytest.raises(OutputError, match="memory://bucket/out/records/.*another configuration: training.steps was 2"):
        run_sweep(parse_sweep(asked), "memory://bucket/out", provenance={})
    one = sorted(name for name in memory.find("/bucket/out/records"))[0]
    whole = memory.cat_file(one)
    memory.pipe_file(one, b"{}")
    with pytest.raises(OutputError, match=r"^memory://bucket/out/records/.*: this is not a SweepRecord.* Delete it"):
        run_sweep(sweep, "memory://bucket/out", provenance={})
    memory.pipe_file(one, whole)
    # A rate that wins on another machine is measured on test with the weights that the first one uploaded.
    (chosen,) = {r.rate for r in there if "test" in r.metrics}
    record = f"/bucket/out/records/task--spectral_a--{chosen:g}--0.json"
    older = json.loads(memory.cat_file(record))
    del older["result"]["metrics"]["test"]
    memory.pipe_file(record, json.dumps(older).encode())
    asked["run"]["training"]["steps"] = 2
    monkeypatch.setattr("spectune.sweeps.worker.train_run", lambda *asked, **more: pytest.fail("trained again"))
    assert figures(run_sweep(sweep, "memory://bucket/out", provenance={})) == figures(here)


@pytest.mark.parametrize("keep", ["nothing", "everything"])
def test_what_is_not_kept_is_deleted_in_the_store(
    tmp_path: Path, memory: Any, monkeypatch: pytest.MonkeyPatch, keep: str
) -> None:
    monkeypatch.setattr(Workers, "run", in_this_process)
    asked = text_sweep(tmp_path, seeds=[0], keep=keep)
    asked["methods"]["full"]["adapter"] = {"peft_type": "LORA", "target_modules": ["nowhere"]}
    asked["methods"]["spectral_a"]["learning_rates"] = [1e-3]
    found = run_sweep(parse_sweep(asked), "memory://out", provenance={})
    assert [r.ok for r in found] == [True, False]
    names = Remote("memory://out").names()
    assert (
        any("adapter" in name for name in names)
        is any("checkpoint-2/" in name for name in names)
        is (keep == "everything")
    )
    assert "runs/task--spectral_a--0.001--0/result.json" in names
    asked["methods"]["full"]["adapter"]["target_modules"] = ["query"]  # what failed may be put right
    assert all(r.ok for r in run_sweep(parse_sweep(asked), "memory://out", provenance={}))


def test_the_last_words_of_a_run_are_kept_until_it_is_done(memory: Any) -> None:
    for words in ("MemoryError", ""):
        with Store("memory://out") as place, place.at_work("a"):
            log = place.folder / "runs" / "a.log"
            log.parent.mkdir(exist_ok=True)
            log.write_text(words)
            if not words:
                log.unlink()
        assert memory.exists("/out/runs/a.log") is bool(words)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*Watching it for a minute")
def test_a_killed_sweep_goes_on_from_another_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The second machine has the store alone; a run that was finished is not trained again."""
    asked = text_sweep(tmp_path, seeds=[0])
    spectral = asked["methods"].pop("spectral_a") | {"learning_rates": [1e-2]}
    asked["methods"]["late"] = spectral | {"over": {"training": {"steps": 200, "save_every": 25}}}
    (tmp_path / "sweep.yaml").write_text(json.dumps(asked))
    url, there = (tmp_path / "store").as_uri(), tmp_path / "store"
    words = "from spectune.sweeps import store; store.EVERY = 0.1; from spectune.cli import main; main()"
    command = [sys.executable, "-c", words, "compare", "sweep.yaml", "-o", url]
    with subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True) as process:
        try:
            while not list(there.glob("runs/task--late*/checkpoints/*/trainer_state.json")):
                assert process.poll() is None, process.stderr and process.stderr.read()
                time.sleep(0.05)
        finally:
            process.kill()
    saved = [path.parent.name for path in there.glob("runs/task--late*/checkpoints/*/trainer_state.json")]
    finished = {path.name: path.stat().st_mtime_ns for path in there.glob("records/*")}
    assert list(finished) == ["task--full--0.001--0.json"] and (there / "comparison.html").is_file()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "another"))
    monkeypatch.setattr(claim, "BEAT", 0.1)
    sweep, steps = parse_sweep(asked), list[tuple[str, int]]()
    found = run_sweep(sweep, url, provenance={}, on_run=lambda *said: steps.append((said[2], said[3])))
    assert {name for name, _ in steps} == {"task--late--0.01--0"}
    assert steps[1][1] > min(int(name.removeprefix("checkpoint-")) for name in saved)
    assert {path.name: path.stat().st_mtime_ns for path in there.glob("records/*")}.items() >= finished.items()
    monkeypatch.setattr(Workers, "run", in_this_process)
    assert figures(found) == figures(run_sweep(sweep, tmp_path / "here", provenance={}))
    compare(tmp_path / "sweep.yaml", output=url)  # reads them all
    assert f"open {url}/comparison.html" in capsys.readouterr().err
    assert "late" in (there / "comparison.md").read_text()
    assert not [path for path in there.rglob("*") if path.name.startswith(".") or "checkpoint" in path.name]


@pytest.mark.slow
def test_ctrl_c_leaves_the_checkpoint_in_the_store_for_another_machine(
    tmp_path: Path, memory: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "EVERY", PATIENCE)  # nothing is uploaded but when the run stops
    asked = text_sweep(tmp_path, seeds=[0])
    asked["run"]["training"] |= {"steps": 400, "save_every": 1000}
    asked["methods"] = {"a": asked["methods"]["spectral_a"] | {"learning_rates": [1e-2]}}
    told: list[int] = []

    def stopped_after(count: int) -> list[int]:
        told.clear()

        def stop(done: int, runs: int, name: str, step: int, steps: int, loss: float | None) -> None:
            told.extend([step] if step else [])
            if len(told) >= count:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            run_sweep(parse_sweep(asked), "memory://out", provenance={}, on_run=stop)
        return told

    stopped_after(3)
    (state,) = (name for name in Remote("memory://out").names() if name.endswith("trainer_state.json"))
    step = int(re.findall(r"checkpoint-(\d+)/", state)[0])
    assert 3 <= step < 400
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "another"))
    assert stopped_after(1)[0] == step + 1


def test_a_checkpoint_is_whole_or_absent_and_one_is_kept(tmp_path: Path, memory: Any) -> None:
    one, run = Remote("memory://out"), trained(tmp_path / "a", (2,))
    order, put = list[str](), one._put
    one._put = lambda path, name: (order.append(name.rpartition("/")[2]), put(path, name))[1]  # type: ignore
    one.push("a", run)
    assert order == ["run.yaml", "weights", "trainer_state.json"]  # the last says that it is whole
    one.push("a", run)
    assert len(order) == 3  # nothing new
    trained(run, (4,)), (run / ".partial").mkdir(), (run / ".partial" / "x").write_text("half")
    one._put = lambda path, name: (_ for _ in ()).throw(PermissionError()) if "state" in name else put(path, name)  # type: ignore
    with pytest.raises(OutputError, match="cannot write runs/a/checkpoints/checkpoint-4/trainer_state.json: Perm"):
        one.push("a", run)
    one.pull("a", tmp_path / "b")
    assert [path.name for path in checkpoints.checkpoints(tmp_path / "b/checkpoints")] == ["checkpoint-2"]
    Remote("memory://out").push("a", run)
    assert {name.split("/")[3] for name in one.names("runs/a") if "checkpoint" in name} == {"checkpoint-4"}
    assert not [name for name in memory.find("/out") if "/." in name]
    one.pull("c", tmp_path / "c")
    assert not (tmp_path / "c").exists()  # a new run


def test_a_result_goes_with_its_weights(tmp_path: Path, memory: Any) -> None:
    """Where they were deleted, the run is trained again, and no older result may say that it is finished."""
    one, run = Remote("memory://out"), trained(tmp_path / "a", (2,), result__json="{}")
    (run / "adapter").mkdir(), (run / "adapter" / "weights").write_text("w")
    one.push("a", run, ended=True)
    assert sorted(one.names("runs/a")) == [f"runs/a/{name}" for name in ("adapter/weights", "result.json", "run.yaml")]
    one.remove("runs/a/adapter/weights")
    one.pull("a", tmp_path / "b")
    assert [path.name for path in (tmp_path / "b").iterdir()] == ["run.yaml"]
    one.push("a", tmp_path / "b", ended=True)
    assert one.names("runs/a") == ["runs/a/run.yaml"]


def test_a_disk_never_shows_half_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("new")
    one = Remote((tmp_path / "store").as_uri())
    fs, seen = one.opened[0], list[str]()
    put = fs.put_file
    monkeypatch.setattr(fs, "put_file", lambda path, goal: (seen.append(Path(goal).name), put(path, goal)))
    one.put(tmp_path / "file", "records/a.json")
    assert (tmp_path / "store/records/a.json").read_text() == "new" and re.match(r"\.a\.json\.partial-", seen[0])
    monkeypatch.setattr(fs, "mv", lambda *names: (_ for _ in ()).throw(OSError("gone")))
    (tmp_path / "file").write_text("newer")
    with pytest.raises(OutputError, match=r"cannot write records/a\.json: gone\. Repeat the command"):
        one.put(tmp_path / "file", "records/a.json")
    assert [path.read_text() for path in (tmp_path / "store/records").iterdir()] == ["new"]


@pytest.mark.parametrize(
    "name", ["runs/../../x", "runs/a/../../../x", "/etc/x", "runs//x", "runs/./x", "records/..", "C:/x", "a\\..\\x"]
)
def test_a_name_that_leads_out_of_the_store_is_refused(
    tmp_path: Path, cache: Path, memory: Any, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    memory.pipe_file("/out/records/a.json", b"{}")
    # As a hostile store would list it; versions of memory:// differ in which of these names they show.
    monkeypatch.setattr(type(memory), "find", lambda *asked: ["/out/records/a.json", f"/out/{name}"])
    with pytest.raises(OutputError, match=r"memory://out: contains .*, a name that leads out of it. Delete that file"):
        run_sweep(parse_sweep(text_sweep(tmp_path)), "memory://out", provenance={})
    assert not [path for path in cache.rglob("*") if path.is_file() and path.name not in (".lock", "machine")]


def test_a_store_that_cannot_be_written_is_refused_before_the_first_run(
    tmp_path: Path, memory: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Workers, "run", lambda *asked: pytest.fail("a run began"))
    sweep = parse_sweep(text_sweep(tmp_path))
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"file/out: cannot write a file and read it back: .*Check the address and"):
        run_sweep(sweep, f"{(tmp_path / 'file').as_uri()}/out", provenance={})
    monkeypatch.setattr(type(memory), "cat_file", lambda *asked: b"other")
    with pytest.raises(OutputError, match=r"memory://out: cannot read what was written: 5 other bytes"):
        run_sweep(sweep, "memory://out", provenance={})
    with pytest.raises(OptionError, match=r"sss://out: this address is unknown: Protocol not known: sss"):
        run_sweep(sweep, "sss://out", provenance={})
    for package, url in (("s3fs", "s3://bucket/out"), ("gcsfs", "gs://bucket/out"), ("adlfs", "az://bucket/out")):
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(MissingExtraError, match=rf"{url}: cannot import {package}. Run: pip install {package}"):
            run_sweep(sweep, url, provenance={})


def test_two_commands_of_one_machine_are_refused(tmp_path: Path, memory: Any) -> None:
    with Store("memory://out"), pytest.raises(OutputError, match="memory://out: .*another process is writing"):
        run_sweep(parse_sweep(text_sweep(tmp_path)), "memory://out", provenance={})


def another(folder: Path, url: str = "memory://out") -> claim.Claim:
    """The claim of a command on another machine."""
    folder.mkdir()
    return claim.Claim(Remote(url), folder)


@pytest.mark.filterwarnings("ignore:.*Watching it for a minute")
def test_a_command_of_another_machine_is_refused_while_it_lives(
    memory: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    theirs, alive = another(tmp_path / "far"), True
    (tmp_path / "far" / "machine").write_text("far\x1b[31m" + "r" * 99)
    monkeypatch.setattr(claim.time, "sleep", lambda seconds: theirs.beat() if alive else None)
    theirs.beat()
    refused = r"memory://out: another command, on far\?\?31mr{52}, is working on this sweep\. Wait until"
    with pytest.warns(match="a command on far.* Watching it"), pytest.raises(OutputError, match=refused):
        Store("memory://out").__enter__()
    assert not theirs.remote.blocked and memory.exists("/out/.claim")
    alive = False  # it was killed, and left its claim
    with Store("memory://out") as mine:
        assert mine.claim._read()["token"] == mine.claim.token
        theirs.beat()  # it was only paused: it sees that the sweep is another's, and writes nothing any more
        for forbidden in (partial(theirs.remote.put, tmp_path / "far" / "machine"), theirs.remote.remove):
            with pytest.raises(OutputError, match="is working on this sweep"):
                forbidden("a")
        theirs.leave()
        assert memory.exists("/out/.claim")
    assert not memory.exists("/out/.claim")


def test_two_commands_that_begin_at_once_do_not_both_go_on(
    memory: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The second has seen no claim, and writes its own while the first waits for that."""
    one, other = another(tmp_path / "one"), another(tmp_path / "other")
    monkeypatch.setattr(claim.time, "sleep", lambda seconds: other.beat() if seconds == claim.SETTLES else None)
    with pytest.raises(OutputError, match="is working on this sweep"):
        one.take()
    assert one._read()["token"] == other.token


def test_a_command_shows_itself_while_it_works(memory: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(claim, "BEAT", 0.01)
    monkeypatch.setattr(claim, "SETTLES", 0.0)
    one, shown = another(tmp_path / "one"), threading.Event()
    beat = one.beat
    monkeypatch.setattr(one, "beat", lambda: (beat(), shown.set() if one.beats == 3 else None))
    one.take()
    assert shown.wait(PATIENCE) and one._read()["beats"] >= 3
    one.leave()
    assert not memory.exists("/out/.claim") and not one._thread.is_alive()


def test_a_claim_of_this_machine_is_taken_at_once(memory: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    Store("memory://out").home.mkdir(parents=True)
    Store("memory://out").claim.beat()  # killed afterwards; the lock says that it does not live
    monkeypatch.setattr(claim.time, "sleep", lambda seconds: pytest.fail("it waits") if seconds else None)
    with Store("memory://out") as mine:
        assert mine.claim._read()["token"] == mine.claim.token


def test_what_is_no_claim_is_watched_and_then_overwritten(memory: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for content in (b"", b"[1]", b"{oh", b"\xff" * 99, b"[" * 200_000, b'{"token": "a"}' + b" " * 2**20):
        waited: list[float] = []
        monkeypatch.setattr(claim.time, "sleep", waited.append)
        memory.pipe_file("/out/.claim", content)
        with pytest.warns(match="a command on unknown works or worked here"), Store("memory://out") as mine:
            assert json.loads(memory.cat_file("/out/.claim"))["token"] == mine.claim.token
        assert sum(waited) == claim.BEATS * claim.BEAT + claim.SETTLES


@pytest.mark.parametrize("url", ["hf://datasets/a/b", "simplecache::hf://datasets/a/b"])
def test_each_file_in_a_repository_is_a_commit_so_nothing_is_claimed(url: str, tmp_path: Path) -> None:
    one = another(tmp_path / "one", url)
    one.take()  # nothing is asked of the hub
    assert one.beats == 0 and not one._thread.is_alive()


def test_a_cluster_with_a_shared_disk_refuses_a_store(tmp_path: Path, memory: Any) -> None:
    with pytest.raises(
        OptionError, match=r"memory://out: this cluster works in a folder on a disk that its nodes share"
    ):
        run_sweep(parse_sweep(text_sweep(tmp_path)), "memory://out", provenance={}, engine=Double())


def test_a_node_says_whether_it_reaches_the_store(tmp_path: Path, memory: Any) -> None:
    from spectune import __version__

    one = Remote("memory://out")
    token = one.check(keep=True)
    assert obstacle("", token, "", __version__, one.afar()) == "" and len(memory.find("/out")) == 1
    assert obstacle("", "other", "", __version__, one.afar()).startswith(
        "does not reach the store: memory://out: cannot write a file and read it back: "
    )
    assert "has spectune" in obstacle("", token, "", "9", one.afar())


def test_pages_are_uploaded_while_runs_work_and_at_the_end(
    tmp_path: Path, memory: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "EVERY", 0.01)
    with sweep_folder("memory://out") as place:
        (place.folder / "comparison.md").write_text("half")
        place.show()
        deadline = time.monotonic() + PATIENCE
        while not memory.exists("/out/comparison.md"):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        (place.folder / "comparison.md").write_text("whole")
    assert memory.cat_file("/out/comparison.md") == b"whole" and place.page == ""
