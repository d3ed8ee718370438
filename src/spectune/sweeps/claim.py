"""`Claim`: a small file in a store that says which command works on a sweep there, and that it still does."""

from __future__ import annotations

import json
import platform
import re
import secrets
import time
import uuid
from contextlib import suppress
from typing import Any

from ..errors import OutputError
from .remote import Remote

NAME = ".claim"  # hidden, so that no listing of the sweep's files has it
BEAT = 15.0
"""Seconds within which a living command shows itself: it does so every ten (store.EVERY), but for a slow upload."""
BEATS = 4
"""After so many of them without a sign of life, a command counts as killed; chosen, not measured."""
COMMITS = "hf"
"""Where each file that is written is a commit, nothing is claimed."""


class Claim:
    """The claim of this command on a sweep in a store.

    No clock is asked, since those of two machines differ: a claim that changes while one looks is alive.
    """

    def __init__(self, remote: Remote) -> None:
        self.remote = remote
        self.token, self.beats = secrets.token_hex(8), 0
        self.machine = f"{platform.node()}-{uuid.getnode():x}"
        self.lost = ""
        """Who has taken the sweep over, if another command has."""

    @property
    def _is_kept(self) -> bool:
        return self.remote.url.partition("://")[0] != COMMITS

    def take(self) -> None:
        """Claim the sweep; `OutputError` if a command on another machine works on it.

        On this machine a lock says that none does. The claim of a command that was killed elsewhere takes a
        minute to tell from a living one.
        """
        if not self._is_kept:
            return
        found = self._read()
        for _ in range(BEATS if found and found.get("machine") != self.machine else 0):
            time.sleep(BEAT)
            if (now := self._read()) and now != found:
                raise self._refusal(now)
        self.beat()
        if (now := self._read()) and now.get("token") != self.token:
            raise self._refusal(now)

    def beat(self) -> None:
        """Show that this command works, unless another one has taken the sweep over."""
        if not self._is_kept:
            return
        found = self._read() if self.beats else None
        if found and found.get("token") != self.token:
            self.lost = _plain(found)
            return
        self.beats += 1
        said = {"machine": self.machine, "token": self.token, "beats": self.beats}
        self.remote.write(NAME, json.dumps(said).encode())

    def refuse_if_lost(self) -> None:
        """Raise `OutputError` if another command has taken the sweep over."""
        if self.lost:
            raise self._refusal({"machine": self.lost})

    def leave(self) -> None:
        """Take the claim back."""
        with suppress(Exception):
            if self.beats and not self.lost:
                self.remote.remove(NAME)

    def _read(self) -> dict[str, Any]:
        with suppress(ValueError, FileNotFoundError):
            found = json.loads(self.remote.read(NAME))
            return found if isinstance(found, dict) else {}
        return {}

    def _refusal(self, found: dict[str, Any]) -> OutputError:
        return OutputError(
            f"{self.remote.url}: a command on another machine ({_plain(found)}) is working on this sweep. Wait until "
            f"it is done, stop it, or choose another address."
        )


def _plain(found: dict[str, Any]) -> str:
    """Get the machine's name in letters that steer no terminal."""
    return re.sub(r"[^\w.-]", "?", str(found.get("machine", "")), flags=re.ASCII)[:60] or "unknown"
