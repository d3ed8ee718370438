"""`OnSlurm`: the runs of a sweep as Slurm jobs, through submitit; one out of time is queued again."""

from __future__ import annotations

import getpass
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

from ..errors import MissingExtraError, OptionError, OutputError, one_line
from .cluster import Cluster, LostError, token_in
from .on_node import Errand, obstacle
from .worker import INTERRUPTED

MINUTES = 24 * 60
"""Time limit of a job where `time` is not given; chosen, not measured (submitit's own is 5)."""
QUEUED_AGAIN = 20
"""How often a job may run out of time, and continue from its last checkpoint; chosen, not measured."""
LOOK = 5
"""Minutes for the job that looks at the folder; a short job is scheduled sooner."""
LOST = ("NODE_FAIL", "BOOT_FAIL", "PREEMPTED")
"""States of a job that Slurm stopped and did not queue again by itself."""


class OnSlurm(Cluster):
    """Runs as jobs of a Slurm cluster."""

    def __init__(self, cpus: float, gpus: float | None, options: Mapping[str, str]) -> None:
        """Set what each job gets; `options` are sbatch's, with submitit's names, such as partition or account.

        `MissingExtraError` without submitit, `OptionError` where Slurm is not, or for parts of a CPU or GPU.
        """
        super().__init__(max(1, int(cpus)))
        self._submitit = _submitit()
        for name, value in (("--cpus", cpus), ("--gpus", gpus or 0)):
            if value != int(value):
                raise OptionError(f"{name} {value:g}: Slurm gives whole ones. Ask for a whole number.")
        if shutil.which("sbatch") is None:
            raise OptionError("--on slurm: sbatch was not found on this machine. Run the command on a login node.")
        minutes = options.get("time", str(MINUTES))
        if not minutes.isdecimal():
            raise OptionError(f"--slurm time={minutes}: a number of minutes is needed, such as time=240.")
        self._minutes = int(minutes)
        self._asked = {"cpus_per_task": int(cpus), "gpus_per_node": int(gpus or 0) or None}
        self._options = {f"slurm_{name}": value for name, value in options.items() if name != "time"}
        self.said = f"slurm: each run gets {cpus:g} CPU, {gpus or 0:g} GPU and {minutes} minutes at a time"

    def prepare(self, folder: Path) -> None:
        """Cancel what a killed command left in the queue; let one short job say whether it sees the folder."""
        from .. import __version__

        name = f"spectune-{sha256(str(folder.resolve()).encode()).hexdigest()[:12]}"
        subprocess.run(["scancel", "-u", getpass.getuser(), "-n", name], check=False, capture_output=True)
        # Beside the sweep's folder, where nothing may be a link: submitit makes some.
        self._jobs = self._executor(folder.resolve().with_name(f"{folder.resolve().name}.slurm"), name)
        with token_in(folder) as token:
            self._jobs.update_parameters(timeout_min=min(LOOK, self._minutes))
            job = self._submitted(obstacle, str(folder.resolve()), token, str(Path.cwd()), __version__)
            try:
                found = job.result()
            except self._failures as error:
                found = f"did not answer ({one_line(error, 200)})"
            except BaseException:  # Ctrl-C while it waits in the queue
                job.cancel(check=False)
                raise
        if found:
            raise OutputError(f"--on slurm: the node of job {job.job_id} {found}.")
        self._jobs.update_parameters(timeout_min=self._minutes)

    def _executor(self, folder: Path, name: str) -> Any:
        try:
            found = self._submitit.AutoExecutor(folder, cluster="slurm", slurm_max_num_timeout=QUEUED_AGAIN)
            found.update_parameters(name=name, **self._asked, **self._options)
        except (NameError, ValueError, RuntimeError, AssertionError) as error:
            raise OptionError(f"--on slurm: submitit refuses this: {one_line(error, 400)}") from None
        return found

    def _submitted(self, *asked: Any) -> Any:
        try:
            return self._jobs.submit(*asked)
        except self._failures as error:
            raise OptionError(f"--on slurm: sbatch refuses the job: {one_line(error, 400)}") from None

    @property
    def _failures(self) -> tuple[type[Exception], ...]:
        core = self._submitit.core.utils
        return (core.FailedJobError, core.UncompletedJobError, core.FailedSubmissionError)

    def submit(self, errand: Errand) -> Any:
        """Queue a job."""
        return self._submitted(errand)

    def ended(self, task: Any) -> bool:
        """Whether a job is over."""
        return bool(task.done())

    def outcome(self, task: Any) -> tuple[int, Sequence[str]]:
        """Get what the errand returned; `LostError` names what submitit says of one that returned nothing."""
        try:
            found: tuple[int, Sequence[str]] = task.result()
        except self._failures as error:
            if str(task.state).split(" ")[0] in LOST:
                return INTERRUPTED, ()
            raise LostError(f"slurm: job {task.job_id}: {one_line(error, 300)}") from None
        return found

    def cancel(self, task: Any, at_once: bool) -> None:
        """Cancel a job: Slurm lets its run save a checkpoint, for 30 seconds unless KillWait says otherwise."""
        task.cancel(check=False)


def _submitit() -> Any:
    try:
        import submitit
    except ImportError as error:
        raise MissingExtraError(
            f"--on slurm: cannot import submitit ({error}). Run: pip install 'spectune[slurm]'"
        ) from None
    import cloudpickle

    from . import on_node, remote

    for sent in (on_node, remote):
        cloudpickle.register_pickle_by_value(sent)
    return submitit
