"""The versions that Spectune promises to work with: `nox` runs the oldest and the newest, `nox -s NAME` one session.

Each session makes its own environment; torch is a large download (CPU wheels: PIP_EXTRA_INDEX_URL or a mirror).
`lean` borrows the packages of the Python that runs nox and replaces a single one, which takes seconds.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from pathlib import Path

import nox

nox.options.sessions = ["oldest", "newest"]
nox.options.reuse_existing_virtualenvs = True

# The lower and upper ends of the ranges in pyproject.toml.
OLDEST = {"torch": "torch==2.6.*", "peft": "peft==0.21.0", "transformers": "transformers==5.6.*"}
NEWEST = {"torch": "torch>=2.6,<3", "peft": "peft>=0.21,<0.23", "transformers": "transformers>=5.6,<5.24"}
# The lower ends of all others that the core needs.
LOWEST = [
    "safetensors==0.5.*", "numpy==1.26.*", "scipy==1.11.*", "threadpoolctl==3.1.*", "filelock==3.16.*",
    "fsspec==2024.5.*", "typer==0.15.*", "rich==13.0.*", "pydantic==2.0.*", "pyyaml==6.0.*", "regex==2025.10.22",
]  # fmt: skip
PYTHONS = ["3.10", "3.11", "3.12", "3.13", "3.14"]  # those of pyproject.toml's classifiers
# What touches other packages: PEFT's hooks, files saved earlier, attaching and training.
TOUCHING = ["tests/house/test_peft_canary.py", "tests/golden", "tests/tuner", "tests/numerics", "tests/export"]
# What `beyond` takes the newest of.
BEYOND = ["torch", "transformers", "peft", "accelerate", "trl", "datasets", "safetensors", "diffusers"]
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONUTF8": "1"}
# What other machines have: each entry rounds otherwise, reads sets in another order, and has another user.
# GOMP_SPINCOUNT and OMP_WAIT_POLICY: threads that wait do not take the cores from those that work.
MACHINES = {
    "old": {"ATEN_CPU_CAPABILITY": "default", "MKL_CBWR": "COMPATIBLE", "ONEDNN_MAX_CPU_ISA": "SSE41"}
    | {"PYTHONHASHSEED": "1", "LC_ALL": "C", "TERM": "dumb", "COLUMNS": "40", "CI": "true"},
    "other": {"ATEN_CPU_CAPABILITY": "avx2", "MKL_CBWR": "AVX2", "ONEDNN_MAX_CPU_ISA": "AVX2"}
    | {"OPENBLAS_CORETYPE": "Haswell", "OMP_NUM_THREADS": "2", "GOMP_SPINCOUNT": "0", "OMP_WAIT_POLICY": "PASSIVE"}
    | {"PYTHONHASHSEED": "2", "FORCE_COLOR": "1", "COLUMNS": "300", "TZ": "Asia/Kolkata"},
}


def python_of(session: nox.Session) -> str:
    """Get a session's Python: that of its environment, or the one that runs nox, never the first on the PATH."""
    return sys.executable if session.python is False else f"{session.bin}/python"


def run_tests(session: nox.Session, *paths: str, **environment: str) -> None:
    session.run(
        python_of(session), "-m", "pytest", "-q", *(session.posargs or paths), env={**ENVIRONMENT, **environment}
    )


@nox.session(python=["3.10"])
def oldest(session: nox.Session) -> None:
    """The lower end of every range."""
    session.install("--editable", ".[test,vision]", *OLDEST.values())  # transformers read pictures by torchvision then
    # The torchao that this peft takes wants a newer torch; without it the tests of its layers are skipped.
    session.run(python_of(session), "-m", "pip", "uninstall", "-y", "torchao")
    run_tests(session, "tests")


@nox.session(python=PYTHONS)
def newest(session: nox.Session) -> None:
    """What pip chooses today."""
    session.install("--upgrade", "--editable", ".[test]", *NEWEST.values())
    run_tests(session, "tests")


@nox.session(python=False)
@nox.parametrize("python", PYTHONS)
def resolves(session: nox.Session, python: str) -> None:
    """Check that all extras together can be resolved for each Python, with the newest releases and with our pins.

    It reads metadata alone, in less than a minute.
    """
    folder = os.path.join(session.create_tmp(), "uv")
    session.run(python_of(session), "-m", "pip", "install", "-q", "--upgrade", "--target", folder, "uv")
    words = ["compile", "-q", "--upgrade", "pyproject.toml", "--all-extras", "--python-version", python]
    words += ["-o", os.path.join(session.create_tmp(), "chosen.txt")]
    for pinned in ([], ["--constraint", "constraints.txt"]):
        session.run(python_of(session), "-m", "uv", "pip", *words, *pinned, env={"PYTHONPATH": folder})


@nox.session(python=["3.12"])
@nox.parametrize("package", ["peft", "transformers", "torch"])
def one_old(session: nox.Session, package: str) -> None:
    """One package at its lower end, all others new: says which of them a failure of `oldest` is about."""
    session.install("--editable", ".[test]", *{**NEWEST, package: OLDEST[package]}.values())
    run_tests(session, *TOUCHING)


@nox.session(python=["3.12"])
def beyond(session: nox.Session) -> None:
    """The newest torch, transformers, peft and what goes with them, within our ranges or not: says what broke.

    Each is installed without asking the others, for a release may demand one that is not out yet (transformers 5.24 and
    peft 0.22). torch's CPU build: PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu.
    """
    session.install("--editable", ".[test]")
    for package in BEYOND:
        session.install("--upgrade", "--no-deps", package)
    _say_what_broke(session, {})


@nox.session(python=False)
def lean_beyond(session: nox.Session) -> None:
    """The same without torch, laid over the packages of this Python: takes seconds to install."""
    folder = os.path.join(session.create_tmp(), "over")
    words = ["-q", "--no-deps", "--upgrade", "--target", folder, *(p for p in BEYOND if p != "torch")]
    session.run(python_of(session), "-m", "pip", "install", *words)
    _say_what_broke(session, {"PYTHONPATH": os.pathsep.join([folder, "src"])})


def _say_what_broke(session: nox.Session, environment: dict[str, str]) -> None:
    """Print the versions and whether they fit, then one line for each test that fails."""
    told = {**ENVIRONMENT, **environment}
    session.run(python_of(session), "-m", "pip", "check", success_codes=[0, 1], env=told)
    session.run(python_of(session), "-m", "spectune.cli", "env", env=told)
    words = ["--tb=line", "-rf", "-W", "ignore", *(session.posargs or TOUCHING)]
    session.run(python_of(session), "-m", "pytest", "-q", *words, env=told)


@nox.session(python=["3.12"])
def next_peft(session: nox.Session) -> None:
    """PEFT's main branch: the canary says what moved before a release does."""
    session.install("--editable", ".[test]")
    session.install("--no-deps", "git+https://github.com/huggingface/peft")
    run_tests(session, *TOUCHING)


@nox.session(python=PYTHONS)
@nox.parametrize(
    "extra", ["", "train", "llm", "vision", "diffusion", "quant", "gguf", "ray", "slurm", "optuna", "report", "demo"]
)
def extra(session: nox.Session, extra: str) -> None:
    """The wheel without its source tree, with one extra alone: what it promises runs in an empty folder."""
    _keep_promises(session, extra or "core", "torch", "--constraint", "constraints.txt")


@nox.session(python=["3.10", "3.11"])
def lowest(session: nox.Session) -> None:
    """The wheel on the lower end of every core dependency: what the core promises runs in an empty folder."""
    _keep_promises(session, "core", *OLDEST.values(), *LOWEST)


def _keep_promises(session: nox.Session, extra: str, *first: str) -> None:
    session.run(python_of(session), "-m", "pip", "wheel", "-q", "--no-deps", "-w", session.create_tmp(), ".")
    wheel = max(Path(session.create_tmp()).glob("*.whl"))
    session.install(*first)
    session.install(str(wheel) if extra == "core" else f"spectune[{extra}] @ {wheel.resolve().as_uri()}")
    script = shutil.copy("release/promises.py", session.create_tmp())
    session.chdir(tempfile.mkdtemp())
    session.run(python_of(session), str(script), extra, env={"HF_HUB_OFFLINE": "1"})


@nox.session(python=["3.12"])
def sdist(session: nox.Session) -> None:
    """All tests of the unpacked sdist, on its own sources."""
    session.install("build")
    session.run(python_of(session), "-m", "build", "--sdist", "--outdir", session.create_tmp(), ".")
    shutil.unpack_archive(max(Path(session.create_tmp()).glob("*.tar.gz")), session.create_tmp())
    session.chdir(next(path for path in Path(session.create_tmp()).glob("spectune-*") if path.is_dir()))
    session.install("--editable", ".[test]", *NEWEST.values())
    run_tests(session, "tests")


@nox.session(python=False)
@nox.parametrize("requirement", [OLDEST["peft"], OLDEST["transformers"]])
def lean(session: nox.Session, requirement: str) -> None:
    """One package in another version, laid over the packages of this Python."""
    folder = os.path.join(session.create_tmp(), "over")
    session.run(
        python_of(session), "-m", "pip", "install", "-q", "--no-deps", "--upgrade", "--target", folder, requirement
    )
    run_tests(session, *TOUCHING, PYTHONPATH=folder)


@nox.session(python=False)
@nox.parametrize("machine", list(MACHINES))
def anywhere(session: nox.Session, machine: str) -> None:
    """All tests as another machine would run them, in random order, with the packages of this Python."""
    folder = os.path.join(session.create_tmp(), "order")
    session.run(python_of(session), "-m", "pip", "install", "-q", "--no-deps", "--target", folder, "pytest-randomly")
    home = os.path.join(session.create_tmp(), "home")
    os.makedirs(home, exist_ok=True)
    environment = {**MACHINES[machine], "HOME": home, "PYTHONPATH": folder}
    run_tests(session, "-n", "2", "--dist", "worksteal", "tests", **environment)


@nox.session(python=False)
def fuzz(session: nox.Session) -> None:
    """Some minutes of fuzzing: every door of fuzz/targets.py; fails where one has findings."""
    listed = session.run(python_of(session), "fuzz/run.py", "--list", env=ENVIRONMENT, silent=True)
    for door in str(listed).split():
        # A whole GGUF file, or a live model, takes a hundred times as long as a header.
        count = "500" if door == "gguf_file" else "10000"
        session.run(python_of(session), "fuzz/run.py", door, "--count", count, env=ENVIRONMENT)
