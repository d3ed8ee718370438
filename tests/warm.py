"""A process of its own for a command or a script, forked from one that has imported torch and spectune already.

Importing them takes seconds, and dozens of tests start a process. What a process does when it starts cold is tested
where `subprocess` is used. Where the system cannot fork, each process starts cold.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

from .effort import PATIENCE

Done = subprocess.CompletedProcess[str]
PRELOADED = ["torch", "transformers", "peft", "spectune.cli", "spectune.runs", "spectune.demo", __name__]
WARM = "forkserver" in multiprocessing.get_all_start_methods()


def spectune(*words: str, cwd: Path | None = None, **more: str) -> Done:
    """Run the command line in a process of its own."""
    if WARM:
        return _forked(_command, words, cwd, more)
    return _cold(["-m", "spectune.cli", *words], cwd, more)


def script(code: str, cwd: Path | None = None, **more: str) -> Done:
    """Run lines of Python in a process of its own."""
    return _forked(_lines, (code,), cwd, more) if WARM else _cold(["-c", code], cwd, more)


def _cold(words: list[str], cwd: Path | None, more: Mapping[str, str]) -> Done:
    environment = {**os.environ, **more}
    return subprocess.run(
        [sys.executable, *words], capture_output=True, text=True, cwd=cwd, env=environment, timeout=PATIENCE
    )


def _command(*words: str) -> None:
    sys.argv = ["spectune", *words]
    runpy.run_module("spectune.cli", run_name="__main__", alter_sys=True)


def _lines(code: str) -> None:
    exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})


def _forked(work: Callable[..., None], words: tuple[str, ...], cwd: Path | None, more: Mapping[str, str]) -> Done:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with TemporaryDirectory() as folder:
        said = [Path(folder, name) for name in ("stdout", "stderr")]
        environment = {**os.environ, **more}
        process = context.Process(target=_child, args=(work, words, cwd or Path.cwd(), environment, said))
        process.start()
        process.join(PATIENCE)
        if process.is_alive():
            process.kill()
            raise TimeoutError(f"{words} took more than {PATIENCE} seconds")
        return subprocess.CompletedProcess(list(words), process.exitcode or 0, *(path.read_text() for path in said))


def _child(
    work: Callable[..., None], words: tuple[str, ...], cwd: Path, environment: dict[str, str], said: list[Path]
) -> None:
    for number, path in enumerate(said, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
    sys.stdout, sys.stderr = (open(number, "w", closefd=False, encoding="utf-8") for number in (1, 2))
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    try:
        work(*words)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
