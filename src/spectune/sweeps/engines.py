"""`connect`: where a sweep works other than in processes of this machine."""

from __future__ import annotations

from collections.abc import Sequence

from ..errors import OptionError
from .cluster import Cluster
from .on_ray import OnRay
from .on_slurm import OnSlurm


def connect(on: str, cpus: float = 1, gpus: float | None = None, slurm: Sequence[str] = ()) -> Cluster:
    """Get the cluster for `run_sweep(engine=…)`: `ray`, `ray://HOST:PORT` or `slurm`, and what a run gets of it.

    `gpus` may be a share of one on Ray; None is one where Ray has any, and none on Slurm. `slurm`: words NAME=VALUE for
    sbatch. `OptionError` names what does not fit, `MissingExtraError` a missing package.
    """
    name, _, address = on.partition("://")
    if name not in ("ray", "slurm") or (name == "slurm" and on != name) or (on != name and not address):
        raise OptionError(f"--on {on}: this is unknown. Give ray, ray://HOST:PORT or slurm.")
    if gpus is not None and gpus > 1 and gpus != int(gpus):
        raise OptionError(f"--gpus {gpus:g}: only less than one GPU can be shared. Ask for a whole number.")
    if name == "ray":
        if slurm:
            raise OptionError("--slurm: works only with --on slurm. Leave it out.")
        return OnRay("auto" if not address else on, cpus, gpus)
    options = dict(word.partition("=")[::2] for word in slurm)
    if not all(options.values()):
        raise OptionError(f"--slurm {' '.join(slurm)}: give NAME=VALUE, such as partition=gpu.")
    return OnSlurm(cpus, gpus, options)
