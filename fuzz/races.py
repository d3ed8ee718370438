"""Two processes and one output folder: one stands there whole, the other is refused in one line. Used by `kills.py`."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from actions import ACTIONS, Tree, World, readable, told, tree

import spectune
from spectune.errors import OutputError
from spectune.extraction import extract_adapter

DONE, REFUSED, FAILED = 0, 3, 1
Work = Callable[[], object]


@dataclass
class Race:
    """What came of two processes that write one folder at once."""

    name: str
    rounds: int = 0
    one_refused: int = 0
    both_done: int = 0
    mixtures: int = 0
    """Rounds after which the folder held neither process's work whole, or that ended in another way."""
    findings: list[str] = field(default_factory=list)


def _export(world: World, out: Path, name: str, overwrite: bool) -> object:
    return spectune.export_lora(
        world.adapter(name), out, base_model=str(world.base), check_logits=False, overwrite=overwrite
    )


def _fuse(world: World, out: Path, name: str, overwrite: bool) -> object:
    return spectune.fuse([world.adapter(name)], base=world.base).save(out, overwrite=overwrite)


def _merge(world: World, out: Path, name: str, overwrite: bool) -> object:
    return spectune.merge_checkpoint(world.base, world.adapter(name), out, overwrite=overwrite)


def _extract(world: World, out: Path, name: str, overwrite: bool) -> object:
    return extract_adapter(world.base, world.tuned, out, rank=1 if name == "new" else 2)


VERBS = {"export_lora": _export, "fuse": _fuse, "merge": _merge, "extract": _extract}


def run_races(world: World, folder: Path, rounds: int, verbs: list[str]) -> list[Race]:
    """Get the outcome of every race; `verbs` are those of `VERBS`, "train" and "decompose"."""
    found = []
    for verb in verbs:
        for overwrite in (False, True) if verb in ("export_lora", "fuse", "merge") else (False,):
            race = Race(f"{verb}, overwriting" if overwrite else verb)
            for _ in range(rounds):
                _one_round(race, world, folder, verb, overwrite)
            found.append(race)
    return found


def _one_round(race: Race, world: World, folder: Path, verb: str, overwrite: bool) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    out, works, whole = folder / "out", [], []
    if verb in VERBS:
        for name in ("new", "other"):
            alone = folder / f"alone-{name}"
            _together([lambda alone=alone, name=name: VERBS[verb](world, alone, name, False)])
            whole.append(tree(alone))
            works.append(lambda name=name: VERBS[verb](world, out, name, overwrite))
        if overwrite:
            shutil.copytree(folder / "alone-new", out)
    else:
        works = [lambda: ACTIONS[verb].act(world, folder)] * 2
    ended = _together(works)
    race.rounds += 1
    race.one_refused += sorted(ended) == [DONE, REFUSED]
    race.both_done += ended == [DONE, DONE]
    may_both = overwrite or verb in ("decompose", "train")
    fine = sorted(ended) == [DONE, REFUSED] or (may_both and ended == [DONE, DONE])
    if not fine or not _is_whole(world, verb, out, whole):
        race.mixtures += 1
        race.findings.append(f"ended with {ended}, found {sorted(tree(out)) if out.exists() else 'nothing'}"[:600])


def _is_whole(world: World, verb: str, out: Path, whole: list[Tree]) -> bool:
    readable(out)
    if verb in VERBS:
        return tree(out) in whole
    if verb == "train":
        kept, found = tree(world.path / "kept"), tree(out)
        same = all(
            kept[name] == digest for name, digest in found.items() if name.startswith(("checkpoints", "adapter"))
        )
        return same and told(out) == told(world.path / "kept")
    _together([lambda: ACTIONS[verb].act(world, out.with_name("alone"))])
    return tree(out) == tree(out.with_name("alone") / "out")


def _together(works: list[Work]) -> list[int]:
    """Fork a child for each work, let all of them start at once, and get how they ended."""
    waiting, go = os.pipe()
    children = []
    for work in works:
        pid = os.fork()
        if not pid:
            os.close(go)
            quiet = os.open(os.devnull, os.O_WRONLY)
            os.dup2(quiet, 1)
            os.dup2(quiet, 2)
            os._exit(_end_of(work, waiting))
        children.append(pid)
    os.close(waiting)
    os.close(go)
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]


def _end_of(work: Work, waiting: int) -> int:
    os.read(waiting, 1)  # until the parent has closed the other end
    try:
        work()
    except OutputError as error:
        return REFUSED if str(error).isprintable() else FAILED
    except BaseException:
        return FAILED
    return DONE
