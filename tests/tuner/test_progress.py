"""Progress of a long decomposition: on a terminal only, and only when it takes a while."""

from __future__ import annotations

import os
import pty

import pytest

from spectune.tuner.progress import ticking

from ..warm import script

CODE = """
import sys
from spectune.tuner import progress
progress.SILENT_SECONDS = {silent}
with progress.ticking('decomposed {{}} weights') as tick:
    for layer in ("layers.0.q", "layers.0.v"):
        tick(layer)
print("the end", file=sys.stderr, flush=True)
"""


def on_a_terminal(silent: float) -> str:
    leader, follower = pty.openpty()
    name = os.ttyname(follower)
    done = script(f"import os\nos.dup2(os.open({name!r}, os.O_RDWR | os.O_NOCTTY), 2)\n" + CODE.format(silent=silent))
    os.set_blocking(leader, False)
    said = os.read(leader, 65536).decode()
    os.close(follower), os.close(leader)
    assert done.returncode == 0 and said.rstrip().endswith("the end"), said
    return said


def test_long_work_is_shown_on_a_terminal_with_the_layers_name() -> None:
    said = on_a_terminal(-1.0)
    assert "decomposed" in said and "layers.0.v" in said


def test_short_work_is_silent() -> None:
    assert "decomposed" not in on_a_terminal(1e9)


def test_nothing_is_written_where_there_is_no_terminal(capfd: pytest.CaptureFixture[str]) -> None:
    with ticking("decomposed {} weights") as tick:
        tick("layers.0.q")
    assert capfd.readouterr() == ("", "")
