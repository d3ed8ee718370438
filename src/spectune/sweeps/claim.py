"""`Claim`: a small file in a store that says which command works on a sweep there, and that it still does."""

from __future__ import annotations

import json
import platform
import re
import secrets
import threading
import time
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..checkpoint import write_atomically
from ..errors import OutputError
from .remote import Remote

NAME = ".claim"  # hidden, so that no listing of the sweep's files has it
BEAT = 10.0
"""Seconds between two signs of life; chosen, not measured."""
BEATS = 6
"""After so many without a sign of life, a command counts as killed; chosen, not measured."""
SETTLES = 3.0
"""Seconds in which another command, which saw no claim either, writes its own; chosen, not measured."""
COMMITS = "hf://"
"""Where each file that is written is a commit, nothing is claimed."""
UNREADABLE = {"machine": "unknown"}


class Claim:
    """The claim of this command on a sweep in a store; `home` is this machine's folder for it, which a lock covers.

    The clocks of two machines differ, so none is used: a command is alive if its file changes while one watches it.
    """

    def __init__(self, remote: Remote, home: Path) -> None:
        self.remote, self.home = remote, home
        self.token, self.beats = secrets.token_hex(8), 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._go_on, daemon=True)

    @property
    def machine(self) -> str:
        """This machine's name, with a random number that is kept beside the lock: names repeat in containers."""
        file = self.home / "machine"
        with suppress(OSError):
            return file.read_text("utf-8")
        name = f"{platform.node()}-{secrets.token_hex(4)}"
        write_atomically(file, name)
        return name

    def take(self) -> None:
        """Claim the sweep; `OutputError` if a command on another machine works on it.

        On this machine the lock says that none does. It takes a minute to see that one elsewhere was killed.
        """
        if any(part.startswith(COMMITS) for part in self.remote.url.split("::")):
            return
        found = self._read()
        is_left_here = found.get("machine") == self.machine
        if found and not is_left_here:
            said = f"{self.remote.url}: a command on {_plain(found)} works or worked here. Watching it for a minute."
            warnings.warn(said, stacklevel=2)
        for _ in range(BEATS if found and not is_left_here else 0):
            time.sleep(BEAT)
            if (now := self._read()) and now != found:
                raise self._refusal(now)
        self.beat()
        time.sleep(0 if is_left_here else SETTLES)
        if (now := self._read()) and now.get("token") != self.token:
            raise self._refusal(now)
        self._thread.start()

    def beat(self) -> None:
        """Show that this command works; once another one has taken the sweep over, nothing is written any more."""
        found = self._read() if self.beats else {}
        if found.get("token", self.token) != self.token:
            self.remote.blocked = str(self._refusal(found))
            return
        self.beats += 1
        said = self.home / "claim"
        write_atomically(said, json.dumps({"machine": self.machine, "token": self.token, "beats": self.beats}))
        self.remote.overwrite(said, NAME)
        said.unlink()

    def _go_on(self) -> None:
        while not self._ended.wait(BEAT):
            with suppress(Exception):
                self.beat()

    def leave(self) -> None:
        """Delete the claim file, unless another command has written it since."""
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join()
        with suppress(Exception):
            if self._read().get("token") == self.token:
                self.remote.remove(NAME)

    def _read(self) -> dict[str, Any]:
        """Get what the claim file says: {} without a file, `UNREADABLE` if the file says something else."""
        try:
            found = json.loads(self.remote.read(NAME))
        except FileNotFoundError:
            return {}
        except (ValueError, RecursionError):
            return UNREADABLE
        return found if isinstance(found, dict) and found else UNREADABLE

    def _refusal(self, found: dict[str, Any]) -> OutputError:
        return OutputError(
            f"{self.remote.url}: another command, on {_plain(found)}, is working on this sweep. Wait until it is done, "
            f"stop it, or choose another address."
        )


def _plain(found: dict[str, Any]) -> str:
    """Get the name of a claim's machine in letters that steer no terminal."""
    return re.sub(r"[^\w.-]", "?", str(found.get("machine", "")), flags=re.ASCII)[:60] or "another machine"
