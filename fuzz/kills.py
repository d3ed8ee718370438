"""Kill -9 in every place: `python fuzz/kills.py [--actions ...] [--out fuzz/kills.json]`.

A child forked from one process that has imported everything does an action and dies by SIGKILL: before each change
that it makes to the disk, in the middle of each file that it writes, and at random moments. Then everything under a
final name is opened and compared by its hash with what stood there before and with what an undisturbed child writes.
At the end two processes at a time write into one folder (`races.py`).
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import single_thread
from actions import ACTIONS, FOREIGN, Action, Tree, World, broken, hidden, make_world, readable, told, tree
from places import OnPlace, kill_at, watching
from races import VERBS, Race, run_races

from spectune.recipes import parse_config
from spectune.runs import run

MINE = Path(__file__).parent
WRITERS = ("kills.opened", "kills.tensors", "kills.torch")


@dataclass
class Tally:
    """What came of the kills of one action."""

    action: str
    places: int
    """Changes to the disk that an undisturbed run makes."""
    seconds: float
    kills_at_places: int = 0
    kills_in_files: int = 0
    kills_at_random_moments: int = 0
    finished_before_the_kill: int = 0
    left_something_hidden: int = 0
    lost: int = 0
    """Kills after which something under a final name was neither the old nor the new one, or unreadable."""
    input_changed: int = 0
    reruns: int = 0
    reruns_to_the_same: int = 0
    hidden_after_rerun: int = 0
    findings: list[str] = field(default_factory=list)

    @property
    def kills(self) -> int:
        return self.kills_at_places + self.kills_in_files + self.kills_at_random_moments


def child(work: Callable[[], Any]) -> int:
    """Fork, and have the child do this and end; get its id."""
    pid = os.fork()
    if pid:
        return pid
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    if not os.environ.get("KILLS_DEBUG"):
        os.dup2(quiet, 2)
    status = 1
    try:
        work()
        status = 0
    except BaseException:
        (Path(tempfile.gettempdir()) / f"kills-{os.getpid()}.txt").write_text(traceback.format_exc())
    os._exit(status)


def finish(work: Callable[[], Any]) -> None:
    """Have a child do this to its end."""
    pid = child(work)
    if status := os.waitpid(pid, 0)[1]:
        told_file = Path(tempfile.gettempdir()) / f"kills-{pid}.txt"
        words = told_file.read_text() if told_file.exists() else ""
        told_file.unlink(missing_ok=True)
        raise RuntimeError(f"the child ended with {status}: {words[-3000:]}")


def import_all(names: list[str]) -> None:
    """Import what a child needed first, so that the next need not spend its life on it."""
    for name in names:
        with suppress(Exception):  # a child's module may be made and no file
            importlib.import_module(name)
    single_thread.ready_to_fork()


class Campaign:
    """One action, killed again and again."""

    def __init__(self, world: World, action: Action, folder: Path) -> None:
        self.world, self.action, self.folder = world, action, folder
        self.inputs = tree(world.path)
        self.new, self.old = self._references()
        self.events, seconds = self._undisturbed()
        self.tally = Tally(action.name, len(self.events), round(seconds, 3))

    def fresh(self) -> None:
        """Put the folder back to where the action starts."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir()
        (self.folder / "kept.txt").write_text("kept")
        self.action.before(self.world, self.folder)

    def act(self, on_place: OnPlace | None = None) -> None:
        if on_place is None:
            self.action.act(self.world, self.folder)
            return
        with watching(self.folder, on_place):
            self.action.act(self.world, self.folder)

    def _references(self) -> tuple[Tree, Tree]:
        self.fresh()
        old = tree(self.folder / "out") if (self.folder / "out").exists() else {}
        finish(self.act)
        new = tree(self.folder / "out")
        self.end = {name: digest for name, digest in new.items() if name != "result.json"}
        self.told = told(self.folder / "out") if "result.json" in new else None
        if not self.action.whole and self.action.name != "decompose":  # and every checkpoint that there was on the way
            new |= {n: d for n, d in tree(self.world.path / "kept").items() if n.startswith("checkpoints/")}
        return new, old

    def _undisturbed(self) -> tuple[list[str], float]:
        """Get the changes that the action makes, in order, and how long it takes."""
        log = self.folder.with_name("events.txt")
        events: list[str] = []
        known = set(sys.modules)

        def work() -> None:
            started = time.perf_counter()
            self.act(lambda number, event, path: events.append(event))
            new = " ".join(name for name in sys.modules if name not in known)
            log.write_text("\n".join([str(time.perf_counter() - started), new, *events]))

        for _ in range(2):  # the second one without the time of importing
            self.fresh()
            finish(work)
            seconds, imported, *found = log.read_text().split("\n")
            import_all(imported.split())
        return found, float(seconds)

    def sweep(self, every: int, torn_every: int, rerun_every: int) -> None:
        """Kill at every n-th place, and in the middle of every n-th file."""
        places = range(1, len(self.events) + 1)
        files = [place for place in places if self.events[place - 1] in WRITERS]
        for count, place in enumerate(places[::every]):
            self._kill_at(kill_at(place), f"place {place}", count % rerun_every == 0)
            self.tally.kills_at_places += 1
        for count, place in enumerate(files[::torn_every]):
            self._kill_at(kill_at(place, torn=True), f"file at place {place}", count % rerun_every == 0)
            self.tally.kills_in_files += 1

    def _kill_at(self, on_place: OnPlace, name: str, rerun: bool) -> None:
        self.fresh()
        pid = child(lambda: self.act(on_place))
        status = os.waitpid(pid, 0)[1]
        if not os.WIFSIGNALED(status):
            raise RuntimeError(f"{self.action.name}, {name}: the child ended with {status} before it was killed")
        self.judge(name, rerun)

    def at_random(self, count: int, rerun_every: int, draw: random.Random) -> None:
        """Kill at moments drawn uniformly over the time that the action takes."""
        while self.tally.kills_at_random_moments < count:
            self.fresh()
            delay = draw.uniform(0, self.tally.seconds)
            pid = child(self.act)
            time.sleep(delay)
            os.kill(pid, signal.SIGKILL)
            if os.WIFSIGNALED(os.waitpid(pid, 0)[1]):
                self.tally.kills_at_random_moments += 1
                self.judge(f"after {delay:.3f} s", self.tally.kills_at_random_moments % rerun_every == 0)
            else:
                self.tally.finished_before_the_kill += 1

    def judge(self, name: str, rerun: bool) -> None:
        """Look at what a killed child left."""
        out, tally = self.folder / "out", self.tally
        tally.left_something_hidden += hidden(self.folder) > 0
        try:
            wrong = broken(self.action, out, self.old, self.new) if out.exists() or self.old else None
            readable(out)
        except Exception as error:  # whatever a reader raises: the file is the reason
            wrong = f"{type(error).__name__}: {error}"
        if wrong or (self.folder / "kept.txt").read_text() != "kept":
            tally.lost += 1
            tally.findings.append(f"{name}: {wrong}")
        if rerun:
            self._rerun(name)

    def _rerun(self, name: str) -> None:
        tally, out = self.tally, self.folder / "out"
        if self.action.name == "extract" and out.exists():
            return  # it was done, and is not done twice
        tally.reruns += 1
        try:
            finish(self.act)
            found = {file: digest for file, digest in tree(out).items() if file != "result.json"}
            same = found == self.end and (self.told is None or told(out) == self.told)
        except RuntimeError as error:
            same, found = False, {}
            tally.findings.append(f"{name}, rerun: {error}"[:1500])
        else:
            different = sorted(n for n in found.keys() | self.end.keys() if found.get(n) != self.end.get(n))
            tally.findings += [] if same else [f"{name}, rerun: other {different[:4]}"]
        tally.reruns_to_the_same += same
        tally.hidden_after_rerun += hidden(self.folder) > 0

    def close(self) -> Tally:
        self.tally.input_changed += tree(self.world.path) != self.inputs
        shutil.rmtree(self.folder, ignore_errors=True)
        return self.tally


def prepare(folder: Path, resume: bool) -> World:
    """Make the world in a child: nothing may have run in the process that forks."""
    world = World(folder / "world")

    def work() -> None:
        make_world(world.path)
        values = world.training()
        values["training"]["keep_checkpoints"] = 100
        run(parse_config(values), world.path / "kept")

    def stop() -> None:
        def on_step(step: int, steps: int, loss: float) -> None:
            if step == 1:  # the step under way is still done, and saved
                os.kill(os.getpid(), signal.SIGINT)

        try:
            run(parse_config(world.training()), world.path / "stopped", on_step=on_step)
        except KeyboardInterrupt:
            return
        raise RuntimeError("the run was not stopped")

    finish(work)
    if resume:
        finish(stop)
    return world


def campaigns(args: argparse.Namespace) -> Iterator[Tally | list[Race]]:
    """Get what came of each action's kills, and of the races at the end."""
    folder = Path(tempfile.mkdtemp(prefix="kills-", dir=args.folder))
    try:
        world, draw = prepare(folder, "resume" in args.actions), random.Random(args.seed)
        for name in args.actions:
            campaign = Campaign(world, ACTIONS[name], folder / "work")
            campaign.sweep(args.every, args.torn_every, args.rerun_every)
            campaign.at_random(args.random, args.rerun_every, draw)
            yield campaign.close()
        if args.races:
            verbs = args.race_verbs or [*VERBS, "train", "decompose"]
            yield run_races(world, folder / "work", args.races, verbs)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--actions", nargs="*", default=list(ACTIONS), choices=list(ACTIONS))
    parser.add_argument("--every", type=int, default=1, help="kill at every n-th place")
    parser.add_argument("--torn-every", type=int, default=1, help="kill in the middle of every n-th file")
    parser.add_argument("--random", type=int, default=30, help="kills at random moments, per action")
    parser.add_argument("--rerun-every", type=int, default=5, help="run again after every n-th kill")
    parser.add_argument("--races", type=int, default=5, help="rounds of two processes on one output, per action")
    parser.add_argument("--race-verbs", nargs="+", help="actions of the races; default: all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", help="where to work; default: the system's temporary folder")
    parser.add_argument("--out", type=Path, help="file for the result; default: stdout")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    single_thread.ready_to_fork()
    done: list[Tally] = []
    races: list[Race] = []
    for found in campaigns(args):
        if isinstance(found, list):
            races = found
            continue
        done.append(found)
        print(f"{found.action}: {found.kills} kills, {found.lost} lost, {found.reruns_to_the_same}/{found.reruns} "
              f"reruns the same", file=sys.stderr)  # fmt: skip
    sys.path.insert(0, str(MINE.parent / "benchmarks"))
    from provenance import provenance

    ours = [tally for tally in done if tally.action not in FOREIGN]
    result = {
        "command": "python fuzz/kills.py " + " ".join(sys.argv[1:]),
        **provenance(),
        "seed": args.seed,
        "kills": sum(tally.kills for tally in done),
        "lost": sum(tally.lost for tally in ours),
        "actions": [asdict(tally) | {"kills": tally.kills} for tally in done],
        "mixtures": sum(race.mixtures for race in races),
        "races": [asdict(race) for race in races],
    }
    text = json.dumps(result, indent=1) + "\n"
    args.out.write_text(text) if args.out else print(text)


if __name__ == "__main__":
    main()
