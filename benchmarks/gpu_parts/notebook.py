"""What a part measures goes to the disk row by row, so that a killed run keeps every row that it had."""

from __future__ import annotations

import json
import os
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RUNNING, DONE, FAILED, OUT_OF_TIME, NOT_RUN = "running", "done", "failed", "out of time", "not run"


class NotHere(Exception):  # noqa: N818 - nothing went wrong
    """A row that this device, or these arguments, cannot have; the message says why."""


@dataclass(frozen=True)
class Setting:
    """Where and how large: what the driver hands to every part."""

    device: str
    tiny: bool
    seconds: float
    """The most that this part may take."""
    smollm: str | None = None
    gsm8k: str | None = None

    @property
    def on_cuda(self) -> bool:
        return self.device.startswith("cuda")


def read(path: Path) -> dict[str, Any]:
    """Get the record as it stands on the disk, empty where there is none."""
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return found


def write(path: Path, record: dict[str, Any]) -> None:
    """Write the record whole or leave what was there."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(record, indent=1) + "\n")
    os.replace(partial, path)


class Notebook:
    """The rows of one part, in the record that all parts share; only one part writes at a time."""

    def __init__(self, path: Path, part: str, title: str, seconds: float) -> None:
        self.path, self.part, self.seconds = path, part, seconds
        self.started = time.perf_counter()
        self.found: dict[str, Any] = {"title": title, "state": RUNNING, "allowed_seconds": round(seconds, 1)}
        self.found |= {"planned": [], "rows": {}, "left_out": {}, "errors": {}}
        self.save()

    @property
    def out_of_time(self) -> bool:
        return time.perf_counter() - self.started > self.seconds

    def save(self) -> None:
        self.found["seconds"] = round(time.perf_counter() - self.started, 1)
        record = read(self.path)
        record.setdefault("parts", {})[self.part] = self.found
        write(self.path, record)

    def note(self, name: str, value: Any) -> None:
        """Note something about the part itself, outside its rows."""
        self.found[name] = value
        self.save()

    def plan(self, names: Sequence[str]) -> None:
        """Name the rows that are to come, so that the record shows which are missing."""
        self.found["planned"] += [name for name in names if name not in self.found["planned"]]
        self.save()

    def put(self, name: str, row: dict[str, Any]) -> None:
        self.plan([name])
        self.found["rows"][name] = row
        self.save()
        shown = {key: value for key, value in row.items() if not isinstance(value, (dict, list)) or len(value) < 4}
        print(f"  {self.part}  {name}: {shown}", flush=True)

    def leave_out(self, name: str, why: str) -> None:
        self.plan([name])
        self.found["left_out"][name] = why
        self.save()
        print(f"  {self.part}  {name}: left out, {why}", flush=True)

    def fail(self, name: str, error: BaseException) -> None:
        self.plan([name])
        self.found["errors"][name] = told(error)
        self.save()
        print(f"  {self.part}  {name}: FAILED, {type(error).__name__}: {first_line(error)}", flush=True)

    def attempt(self, name: str, job: Callable[[], Any]) -> Any:
        """Get what a job gives, None where it could not; an error is kept as that row's, and the part goes on."""
        if self.out_of_time:
            return None  # planned and not there: the end of the part says so
        try:
            return job()
        except NotHere as reason:
            self.leave_out(name, str(reason))
        except Exception as error:  # one row's error must not cost the others
            if is_out_of_memory(error):
                self.leave_out(name, f"out of memory: {first_line(error)}")
            else:
                self.fail(name, error)
        return None

    def row(self, name: str, measure: Callable[[], dict[str, Any]]) -> None:
        """Measure one row and keep it."""
        found = self.attempt(name, measure)
        if found is not None:
            self.put(name, found)

    def not_run(self, why: str) -> None:
        """Note that the whole part cannot run here."""
        self.found |= {"state": NOT_RUN, "reason": why}
        self.save()
        print(f"  {self.part}  {why}", flush=True)

    def close(self) -> None:
        if self.found["state"] == NOT_RUN:
            return
        held = (self.found["rows"], self.found["left_out"], self.found["errors"])
        missing = [name for name in self.found["planned"] if not any(name in rows for rows in held)]
        state = FAILED if self.found["errors"] else OUT_OF_TIME if missing else DONE
        self.found |= {"state": state, "not_reached": missing}
        self.save()


def told(error: BaseException) -> dict[str, str]:
    lines = traceback.format_exception(error)
    return {"type": type(error).__name__, "message": str(error), "traceback": "".join(lines)[-6000:]}


def first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [""])[0][:300]


def is_out_of_memory(error: BaseException) -> bool:
    return type(error).__name__ == "OutOfMemoryError"
