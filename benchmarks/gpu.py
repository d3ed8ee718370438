"""Everything that wants a GPU, in one call of ten minutes: parts ordered by worth, each bounded in time.

    python benchmarks/gpu.py                        # all parts, 540 seconds, writes benchmarks/results/gpu.json
    python benchmarks/gpu.py --parts b,c --seconds 300
    python benchmarks/gpu.py --device cpu --tiny    # every part on tiny sizes: does the script work?
    bash benchmarks/gpu_folder.sh OUT               # a folder that runs this on a machine without a network

a correctness, b a training step, c decomposition, d batches of many adapters, e CUDA graphs and kernels, g a 4-bit
base, h directions of the data, i merging, j several GPUs, f a real run (with --smollm and --gsm8k). Each part runs in a
process of its own, so that a crash on the device costs one part; the next one imports what it needs while this one
measures. The record is written after every row and never half. A call with other --parts and the same --output adds to
the record, if it is of the same commit, device and versions.
Exits with 1 when a part failed.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from gpu_parts import PARTS
from gpu_parts.notebook import FAILED, OUT_OF_TIME, RUNNING, Notebook, NotHere, Setting, first_line, read, told, write
from gpu_tables import printed

RESULTS = Path(__file__).parent / "results" / "gpu.json"
# What a part may take beyond its time to end a row by itself, before it is stopped. Chosen.
GRACE = 3.0
DIE_WITH_PARENT = 1  # prctl's PR_SET_PDEATHSIG
OTHER_MACHINE = 3  # exit code of a part that will not write into this record


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default=",".join(PARTS), help="which, by letter: a,b,c")
    parser.add_argument("--seconds", type=float, default=540, help="for all parts together")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes, to see the script work")
    parser.add_argument("--output", type=Path, help="default benchmarks/results/gpu.json; not there with --tiny")
    parser.add_argument("--smollm", help="part f: folder of SmolLM2-135M (Hugging Face files, or one GGUF)")
    parser.add_argument("--gsm8k", help="part f: folder of gsm8k_train.jsonl[.gz] and gsm8k_test.jsonl[.gz]")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    given = parser.parse_args()
    given.parts = [part for part in given.parts.split(",") if part]
    if unknown := [part for part in given.parts if part not in PARTS]:
        parser.error(f"--parts: {', '.join(unknown)} does not exist. Choose from {', '.join(PARTS)}.")
    if given.output is None:
        given.output = Path("gpu-tiny.json") if given.tiny else RESULTS
    return given


def start(part: str, given: argparse.Namespace) -> subprocess.Popen[str]:
    """Start the process of a part: it imports, then waits for its seconds on standard input."""
    words = ["--child", part, "--device", given.device, "--output", str(given.output.resolve())]
    words += ["--tiny"] if given.tiny else []
    for name in ("smollm", "gsm8k"):
        words += [f"--{name}", getattr(given, name)] if getattr(given, name) else []
    command = [sys.executable, "-u", str(Path(__file__).resolve()), *words]
    return subprocess.Popen(command, stdin=subprocess.PIPE, text=True, start_new_session=True)


def child(given: argparse.Namespace) -> None:
    """Be the process of one part."""
    with contextlib.suppress(OSError, AttributeError):  # only Linux can; elsewhere the part ends with its time
        ctypes.CDLL(None).prctl(DIE_WITH_PARENT, signal.SIGKILL)
    part = PARTS[given.child]
    error: BaseException | None = None
    try:
        run = part.runner()
    except Exception as failed:
        error = failed
    told_seconds = sys.stdin.readline()
    if not told_seconds:
        return  # the driver is gone
    if error is None:
        write_head(given)
    notebook = Notebook(given.output, given.child, part.title, float(told_seconds))
    try:
        if error is not None:
            raise error
        run(Setting(given.device, given.tiny, notebook.seconds, given.smollm, given.gsm8k), notebook)
    except NotHere as reason:
        notebook.not_run(str(reason))
    except Exception as failed:
        notebook.fail("the part itself", failed)
    notebook.close()


def write_head(given: argparse.Namespace) -> None:
    """Write the head of the record; leave without touching it where it is of another machine, or the device is not."""
    from gpu_parts.machine import OtherMachineError, agree

    try:
        agree(given.output, given.device, given.tiny)
    except OtherMachineError as error:
        print(error, file=sys.stderr)
    except (RuntimeError, AssertionError) as error:  # what torch raises without CUDA, without a driver, without a card
        print(f"--device {given.device}: {first_line(error)}. Name another --device.", file=sys.stderr)
    else:
        return
    raise SystemExit(OTHER_MACHINE)


def wait(process: subprocess.Popen[str], part: str, seconds: float, path: Path) -> None:
    """Let a part run for its time, then stop it; note in the record how it ended if it could not do so itself."""
    assert process.stdin is not None
    ended: int | None = None
    with contextlib.suppress(subprocess.TimeoutExpired, BrokenPipeError):
        process.stdin.write(f"{seconds}\n")
        process.stdin.close()
        ended = process.wait(timeout=seconds + GRACE)
    stop(process)
    if ended == OTHER_MACHINE:
        raise SystemExit(1)  # the part has said why
    record = read(path)
    found = record.setdefault("parts", {}).setdefault(part, {"title": PARTS[part].title, "state": RUNNING})
    if found["state"] == RUNNING:
        found["state"] = OUT_OF_TIME if ended is None else FAILED
        if ended is not None:
            lost = RuntimeError(f"the process of part {part} ended with {process.returncode} before it was done")
            found.setdefault("errors", {})["the process"] = told(lost)
        write(path, record)


def stop(process: subprocess.Popen[str]) -> None:
    """End a process that this one started, and its own."""
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def allowance(left: float, part: str, waiting: list[str]) -> float:
    """Get the seconds of a part: its share of what is left for it and those after it."""
    return max(1.0, left) * PARTS[part].share / sum(PARTS[name].share for name in waiting)


def drive(given: argparse.Namespace) -> dict[str, Any]:
    """Run the parts one after another, and get the record."""
    begun = time.perf_counter()
    has_weights = given.smollm and given.gsm8k
    # Part f without weights only says so: the others share its time.
    order = [part for part in PARTS if part in given.parts]
    following = start(order[0], given)
    for place, part in enumerate(order):
        process = following
        waiting = [name for name in order[place:] if name != "f" or has_weights or name == part]
        seconds = allowance(given.seconds - (time.perf_counter() - begun), part, waiting)
        print(f"{part}: {PARTS[part].title}, at most {seconds:.0f} s", flush=True)
        if place + 1 < len(order):
            following = start(order[place + 1], given)
        try:
            wait(process, part, seconds, given.output)
        except BaseException:
            stop(process)
            stop(following)
            raise
    return read(given.output)


def main() -> None:
    given = arguments()
    if given.child:
        child(given)
        return
    if not given.parts:
        raise SystemExit("--parts: there is none. Name at least one of " + ", ".join(PARTS))
    given.output.parent.mkdir(parents=True, exist_ok=True)
    try:
        record = drive(given)
    except (OSError, json.JSONDecodeError) as error:
        raise SystemExit(f"{given.output}: {first_line(error)}") from None
    print(f"\n{printed(record)}\n\n{given.output}")
    failed = [part for part in given.parts if record["parts"][part]["state"] == FAILED]
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}. The errors stand in {given.output}.")


if __name__ == "__main__":
    main()
