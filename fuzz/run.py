"""Fuzz one target: `python fuzz/run.py TARGET --count 100000 --seed 1 [--engine atheris] [--out FOLDER]`.

Writes FOLDER/TARGET-ENGINE-SEED.json (counts, what came out, slowest input, peak memory) and every finding beside it.
`--engine mutate` needs nothing but the library; `--engine atheris` (pip install atheris) is guided by coverage.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import signal
import sys
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
# More address space than this is a lie in a header that was believed. torch itself maps a few GiB.
ADDRESS_SPACE = 12 * 2**30
# The peak may rise by so much over that of the valid inputs.
MOST_GROWTH_MIB = 400


class TooSlow(BaseException):
    """Raised by the alarm, past every `except Exception`."""


class Session:
    """Counts, findings and the slowest input of one run."""

    def __init__(self, name: str, engine: str, seed: int, count: int, out: Path) -> None:
        from mutate import mutate
        from targets import all_targets, judge

        self.target, self.judge, self.mutate = all_targets()[name], judge, mutate
        self.engine, self.seed, self.count, self.out = engine, seed, count, out
        self.random = random.Random(seed)
        self.done, self.slowest, self.findings = 0, 0.0, Counter[str]()
        for data in self.target.seeds:
            self.judge(self.target, data)  # once without a limit of time: imports are not what is measured
        self.start_peak, self.started = peak_mib(), time.monotonic()

    def one(self, data: bytes) -> None:
        began = time.monotonic()
        signal.setitimer(signal.ITIMER_REAL, self.target.seconds)
        try:
            self.judge(self.target, data)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # also a panic of a Rust library
            self.note(error, data)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        self.slowest = max(self.slowest, time.monotonic() - began)
        self.done += 1

    def note(self, error: BaseException, data: bytes) -> None:
        frames = traceback.extract_tb(error.__traceback__)
        ours = [frame for frame in frames if "spectune" in frame.filename] or list(frames)
        where = f"{Path(ours[-1].filename).name}:{ours[-1].lineno}" if ours else "?"
        kind = f"{type(error).__name__} at {where}: {str(error)[:120]!r}"
        short = f"{type(error).__name__} at {where}"
        if short not in self.findings:
            self.out.joinpath(f"{self.target.name}-{self.engine}-{self.seed}-{len(self.findings)}.input").write_bytes(
                data
            )
            print(f"FINDING {self.target.name}: {kind}", flush=True)
        self.findings[short] += 1

    def report(self) -> dict[str, Any]:
        seconds = time.monotonic() - self.started
        growth = peak_mib() - self.start_peak
        if growth > MOST_GROWTH_MIB:
            self.findings["memory"] = 1
        return {
            "target": self.target.name,
            "engine": self.engine,
            "seed": self.seed,
            "inputs": self.done,
            "seconds": round(seconds, 1),
            "per_second": round(self.done / max(seconds, 1e-9)),
            "slowest_ms": round(1000 * self.slowest, 1),
            "peak_growth_mib": round(growth, 1),
            "findings": dict(self.findings),
        }

    def status(self) -> int:
        """Get the status to exit with: 1 where anything was found, growth of memory among it."""
        return 1 if self.report()["findings"] else 0

    def save(self) -> None:
        place = self.out / f"{self.target.name}-{self.engine}-{self.seed}.json"
        place.write_text(json.dumps(self.report(), indent=2) + "\n")


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def by_mutation(session: Session) -> None:
    """Mutate a valid input, or one of the last that got in."""
    pool = list(session.target.seeds)
    while session.done < session.count:
        data = session.mutate(session.random.choice(pool), session.random)
        session.one(data)
        if session.random.random() < 0.01:
            if len(pool) > 200:
                pool = list(session.target.seeds)
            pool.append(data[:20_000])
    session.save()


def by_coverage(session: Session) -> None:
    """Let libFuzzer choose what to mutate; half of the mutations are ours."""
    import atheris

    corpus = session.out / f"{session.target.name}-{session.seed}.corpus"
    corpus.mkdir(exist_ok=True)
    for place, data in enumerate(session.target.seeds):
        (corpus / f"seed-{place}").write_bytes(data)

    def one(data: bytes) -> None:
        session.one(data)
        if session.done >= session.count:
            session.save()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(session.status())
        if session.done % 5000 == 0:
            session.save()

    def change(data: bytes, most: int, seed: int) -> bytes:
        if seed % 2:
            return atheris.Mutate(data, most)
        return session.mutate(data, random.Random(seed))[:most]

    options = [f"-seed={session.seed}", "-max_len=65536", "-timeout=60", "-rss_limit_mb=6000", str(corpus)]
    atheris.Setup([sys.argv[0], *options], one, custom_mutator=change)
    atheris.Fuzz()


def alarm(*_: Any) -> None:
    raise TooSlow


def main() -> int:
    """Get the status to exit with."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("target", nargs="?")
    parser.add_argument("--list", action="store_true", help="name the targets, and end")
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--engine", choices=("mutate", "atheris"), default="mutate")
    parser.add_argument("--out", type=Path, default=Path("fuzz/out"))
    asked = parser.parse_args()
    if asked.list or asked.target is None:
        from targets import all_targets

        print(*all_targets(), sep="\n")
        return 0 if asked.list else 2
    asked.out.mkdir(parents=True, exist_ok=True)
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))
    signal.signal(signal.SIGALRM, alarm)
    if asked.engine == "atheris":
        import atheris

        with atheris.instrument_imports(
            include=["spectune.checkpoint", "spectune.methods", "spectune.spectrum", "spectune.fusion.adapters"],
            enable_loader_override=False,
        ):
            session = Session(asked.target, asked.engine, asked.seed, asked.count, asked.out)
        by_coverage(session)
    else:
        session = Session(asked.target, asked.engine, asked.seed, asked.count, asked.out)
        by_mutation(session)
        print(json.dumps(session.report()))
    return session.status()


if __name__ == "__main__":
    sys.exit(main())
