"""Sweeps as Slurm jobs through submitit, with doubles for Slurm's four commands."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from spectune.errors import OptionError, OutputError
from spectune.sweeps import connect, parse_sweep, run_sweep
from tests.sweeps.sweeps import text_sweep

pytest.importorskip("submitit")
pytestmark = pytest.mark.filterwarnings("ignore")  # submitit's own

SBATCH = """
import os, subprocess, sys
jobs = [int(name[:-3]) for name in os.listdir(HERE) if name.endswith(".sh")]
number = str(max(jobs, default=0) + 1)
text = open(sys.argv[1]).read()
open(f"{HERE}/{number}.sh", "w").write(text)
env = os.environ | {"SLURM_JOB_ID": number, "SLURM_JOB_NODELIST": "n1", "SLURM_NTASKS": "1"}
env |= dict.fromkeys(["SLURM_NODEID", "SLURM_PROCID", "SLURM_LOCALID"], "0") | {"SLURM_JOB_NUM_NODES": "1"}
done = subprocess.Popen(["bash", sys.argv[1]], env=env, start_new_session=True, stdin=subprocess.DEVNULL,
                        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
open(f"{HERE}/{number}.pid", "w").write(str(done.pid))
print("Submitted batch job", number)
"""
SRUN = """
import os, sys
words = sys.argv[1:]
while words[0].startswith("--"):
    words = words[1 if words[0] == "--unbuffered" else 2:]
os.execvp(words[0], words)
"""
SACCT = """
import sys
print("JobID|State|NodeList")
for number in sys.argv[sys.argv.index("-j") + 1::2]:
    print(f"{number}|RUNNING|n1")
"""
# As Slurm does: every process of the job, also those that began a session of their own.
SCANCEL = """
import os, pathlib, signal, sys
open(f"{HERE}/cancelled", "a").write(" ".join(sys.argv[1:]) + "\\n")
if sys.argv[1].isdecimal():
    parents = {}
    for status in pathlib.Path("/proc").glob("[0-9]*/stat"):
        parents[int(status.parent.name)] = int(status.read_text().rpartition(")")[2].split()[1])
    job = [int(open(f"{HERE}/{sys.argv[1]}.pid").read())]
    for pid in job:
        job += [child for child, parent in parents.items() if parent == pid]
    for pid in job[1:]:  # the shell of the batch script ends with its step
        os.kill(pid, signal.SIGTERM)
"""


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the commands, in which sbatch leaves the scripts."""
    folder = tmp_path / "slurm"
    folder.mkdir()
    for name, text in (("sbatch", SBATCH), ("srun", SRUN), ("sacct", SACCT), ("scancel", SCANCEL)):
        (folder / name).write_text(f"#!{sys.executable}\nHERE = {str(folder)!r}\n{text}")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=":")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return folder


@pytest.mark.slow
def test_jobs_stop_with_a_checkpoint_and_end_in_the_figures_of_this_machine(slurm: Path, tmp_path: Path) -> None:
    asked = text_sweep(tmp_path, seeds=[0])
    asked["run"]["training"] |= {"steps": 400, "save_every": 1000}
    del asked["methods"]["spectral_a"]
    sweep, out = parse_sweep(asked), tmp_path / "out"
    (out / "records").mkdir(parents=True)
    reached = list[int]()

    def stop(done: int, runs: int, name: str, step: int, steps: int, loss: float | None) -> None:
        reached.append(step)
        if step >= 3:
            raise KeyboardInterrupt

    words = ["partition=gpu", "time=90"]
    with pytest.raises(KeyboardInterrupt):
        run_sweep(sweep, out, provenance={}, engine=connect("slurm", 2, 1, words), on_run=stop)
    (saved,) = out.rglob("checkpoint-*")
    assert int(saved.name.rpartition("-")[2]) >= reached[-1]
    (found,) = run_sweep(sweep, out, provenance={}, engine=connect("slurm", 2, 1, words))
    (here,) = run_sweep(sweep, tmp_path / "here", provenance={})
    assert found.ok and found.metrics == here.metrics and found.found.losses == here.found.losses

    scripts = [(slurm / f"{number}.sh").read_text() for number in (1, 2, 3, 4)]  # a look and a run, twice
    wanted = ("--partition=gpu", "--cpus-per-task=2", "--gpus-per-node=1", "--job-name=spectune-")
    assert all(f"#SBATCH {line}" in text for text in scripts for line in wanted)
    times = [line.rpartition("=")[2] for text in scripts for line in text.splitlines() if "--time=" in line]
    assert times == ["5", "90"] * 2
    name = next(line.rpartition("=")[2] for line in scripts[0].splitlines() if "--job-name" in line)
    cancelled = (slurm / "cancelled").read_text().splitlines()
    assert [line.rpartition("-n ")[2] for line in cancelled] == [name, "2", name]


def test_a_node_that_does_not_see_the_folder_is_named_before_the_first_run(slurm: Path, tmp_path: Path) -> None:
    engine = connect("slurm")
    sbatch = (slurm / "sbatch").read_text()
    (slurm / "sbatch").write_text(sbatch.replace("text = ", "os.rename(f'{HERE}/../out', f'{HERE}/../gone')\ntext = "))
    (tmp_path / "out").mkdir()
    with pytest.raises(OutputError, match=r"--on slurm: the node of job 1 cannot see .*/out\. Choose a folder"):
        engine.prepare(tmp_path / "out")


@pytest.mark.parametrize(
    ("words", "cpus", "line"),
    [
        (["partitoin=gpu"], 1, "submitit refuses this: Unknown argument 'partitoin' for executor 'slurm'"),
        (["time=1-0"], 1, "--slurm time=1-0: a number of minutes is needed"),
        ([], 0.5, "--cpus 0.5: Slurm gives whole ones"),
    ],
)
def test_what_slurm_does_not_have_is_refused(
    slurm: Path, tmp_path: Path, words: list[str], cpus: float, line: str
) -> None:
    with pytest.raises(OptionError, match=line):
        connect("slurm", cpus, None, words).prepare(tmp_path)
    assert not list(slurm.glob("*.sh"))


def test_slurm_is_refused_where_it_is_not(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(OptionError, match="sbatch was not found on this machine"):
        connect("slurm")
