"""`make release`: wheel and sdist, the same bytes twice, with hashes, bill of materials and licences; checked, tried.

    python release/make_release.py [--extras train,llm | none] [--sdist-tests PATH …]

Run it with the Python of an environment that has release/requirements.txt. It releases what is committed. Each extra is
tried alone: the wheel without its source tree, in an environment that has nothing else (release/promises.py).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
DIST = ROOT / "dist"
EXTRAS = ("core", "train", "llm", "vision", "diffusion", "quant", "gguf", "ray", "slurm", "optuna", "report", "demo")
# 10 needs the addresses of a home page and of a person, and the project has none yet.
PYROMA_LEAST = 8
# The formats, the methods' contract, the public list; `nox -s sdist` runs all tests of the sdist.
SDIST_TESTS = ("tests/golden", "tests/methods", "tests/house/test_public.py")


def run(*words: str | Path, cwd: Path = ROOT, **environment: str) -> None:
    """Run a command; `CalledProcessError` if it fails."""
    print("$", *words, flush=True)
    subprocess.run([str(word) for word in words], cwd=cwd, env={**os.environ, **environment}, check=True)


def output_of(*words: str) -> str:
    return subprocess.run(words, cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()


def committed(folder: Path) -> Path:
    """Get a copy of what is committed."""
    folder.mkdir()
    with tempfile.NamedTemporaryFile(suffix=".tar") as archive:
        run("git", "archive", "--output", archive.name, "HEAD")
        run("tar", "--extract", "--file", archive.name, "--directory", folder)
    return folder


def build(place: Path) -> dict[str, str]:
    """Build twice, from two copies in two folders, and get file -> SHA-256; ends where the bytes differ."""
    found = []
    for name in ("one", "another-folder"):
        source = committed(place / name)
        shutil.rmtree(DIST, ignore_errors=True)
        epoch = output_of("git", "log", "-1", "--format=%ct")
        run(sys.executable, "-m", "build", "--outdir", DIST, source, SOURCE_DATE_EPOCH=epoch)
        found.append({path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(DIST.iterdir())})
    if found[0] != found[1]:
        sys.exit(f"two builds of one commit differ: {found}")
    return found[0]


def check(wheel: Path, sdist: Path) -> None:
    """Run the checkers of packages."""
    tool = Path(sys.executable).parent
    run(tool / "twine", "check", "--strict", wheel, sdist)
    run(tool / "check-wheel-contents", wheel)
    run(tool / "pyroma", "--min", str(PYROMA_LEAST), sdist)


def python_of(environment: Path) -> Path:
    return environment / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def install(environment: Path, *packages: str) -> None:
    words = ["-m", "pip", "install", "-qq", "--disable-pip-version-check", "--constraint", ROOT / "constraints.txt"]
    run(python_of(environment), *words, *packages)


def core_environment(place: Path, wheel: Path) -> Path:
    """Get an environment with the wheel and what it depends on; torch first, as in the Makefile."""
    run(sys.executable, "-m", "venv", place / "core")
    install(place / "core", "torch")
    install(place / "core", str(wheel))
    return place / "core"


def check_types(core: Path, place: Path) -> None:
    """Check a script with every public name against the installed wheel, strictly and without our settings."""
    script = shutil.copy(ROOT / "release" / "every_name.py", place)
    tool = Path(sys.executable).parent / "mypy"
    run(tool, "--strict", "--python-executable", python_of(core), "--cache-dir", place / "mypy", script, cwd=place)


def write_bill(core: Path) -> None:
    """Write the bill of materials (CycloneDX) of the wheel with its dependencies, and a list of their licences."""
    bill = DIST / "spectune.cdx.json"
    words = ["environment", python_of(core), "--pyproject", ROOT / "pyproject.toml", "--output-reproducible"]
    run(Path(sys.executable).parent / "cyclonedx-py", *words, "--output-file", bill)
    lines = []
    for one in json.loads(bill.read_text(encoding="utf-8"))["components"]:
        named = [entry.get("expression") or entry["license"].get("id") or entry["license"]["name"]
                 for entry in one.get("licenses", ())]  # fmt: skip
        lines.append(f"{one['name']} {one['version']}: {', '.join(dict.fromkeys(named)) or 'not said'}\n")
    head = "The wheel contains Spectune alone (Apache-2.0, LICENSE). What pip installs beside it, and its licence:\n\n"
    (DIST / "LICENSES.txt").write_text(head + "".join(sorted(lines, key=str.lower)), encoding="utf-8")


def write_hashes() -> None:
    files = sorted(path for path in DIST.iterdir() if path.name != "SHA256SUMS")
    lines = [f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n" for path in files]
    (DIST / "SHA256SUMS").write_text("".join(lines), encoding="utf-8")
    print("".join(lines))


def try_extra(extra: str, core: Path, wheel: Path) -> None:
    """Run what an extra promises, in a copy of the core's environment with this extra, in an empty folder."""
    environment = core
    if extra != "core":
        environment = core.parent / extra
        shutil.copytree(core, environment, symlinks=True, copy_function=_link)
        install(environment, f"{wheel}[{extra}]")
    with tempfile.TemporaryDirectory() as folder:
        shutil.copy(ROOT / "release" / "promises.py", folder)
        run(python_of(environment), "promises.py", extra, cwd=Path(folder), PYTHONPATH="", HF_HUB_OFFLINE="1")
    if environment != core:
        shutil.rmtree(environment)


def _link(source: str, target: str) -> None:
    """Copy without the bytes where the disk can: pip replaces files, it does not write into them."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def try_sdist(sdist: Path, core: Path, place: Path, tests: list[str]) -> None:
    """Run tests of the unpacked sdist, on its own sources."""
    with tarfile.open(sdist) as archive:
        archive.extractall(place, filter="data")
    source = place / sdist.name.removesuffix(".tar.gz")
    install(core, f"{source}[test]")
    words = ["-m", "pytest", "-q", "-p", "no:cacheprovider", *tests]
    run(python_of(core), *words, cwd=source, HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1")


def kept(try_it: Callable[..., None], *words: Any) -> bool:
    """Get whether a trial went well; one that did not does not end the others."""
    try:
        try_it(*words)
    except subprocess.CalledProcessError as error:
        print(error)
        return False
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--extras", default=",".join(EXTRAS), help="which to try, with commas; none tries nothing")
    parser.add_argument("--sdist-tests", nargs="*", default=list(SDIST_TESTS), help="tests that the sdist runs")
    told = parser.parse_args()
    if output_of("git", "status", "--porcelain"):
        print("note: uncommitted changes are left out")
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        built = build(place)
        wheel, sdist = (next(DIST / name for name in built if name.endswith(end)) for end in (".whl", ".tar.gz"))
        check(wheel, sdist)
        core = core_environment(place, wheel)
        check_types(core, place)
        write_bill(core)
        write_hashes()
        tried = told.extras.split(",") if told.extras != "none" else []
        broken = [extra for extra in tried if not kept(try_extra, extra, core, wheel)]
        if told.sdist_tests and not kept(try_sdist, sdist, core, place, told.sdist_tests):
            broken.append("sdist")
    print("tried:", *tried, "sdist" if told.sdist_tests else "")
    sys.exit(f"promises that were not kept: {', '.join(broken)}" if broken else 0)


if __name__ == "__main__":
    main()
