"""`OnRay`: the runs of a sweep as tasks of a Ray cluster; a run whose node is lost goes on at another one."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import MissingExtraError, OptionError, OutputError, one_line
from .cluster import RETRIES, Cluster, LostError, token_in
from .on_node import Errand, obstacle, work
from .remote import Remote

PATIENCE = 120.0
"""Seconds for a node to start a Python process and answer; chosen, not measured."""


class OnRay(Cluster):
    """Runs as tasks of a Ray cluster that is already up."""

    def __init__(self, address: str, cpus: float, gpus: float | None) -> None:
        """Connect to `auto`, HOST:PORT or ray://HOST:PORT; `gpus` None is one where the cluster has any.

        `MissingExtraError` without ray, `OptionError` if no cluster answers or none of its nodes has as much.
        """
        super().__init__(max(1, int(cpus)))
        self._ray = ray = _connected(address)
        from . import on_node, remote

        for sent in (on_node, remote):
            ray.cloudpickle.register_pickle_by_value(sent)
        nodes = [node for node in ray.nodes() if node["Alive"]]
        all_gpus = sum(node["Resources"].get("GPU", 0) for node in nodes)
        self._gpus = gpus if gpus is not None else float(all_gpus > 0)
        self._options = {"num_cpus": cpus, "num_gpus": self._gpus}
        self._nodes = [
            node
            for node in nodes
            if node["Resources"].get("CPU", 0) >= cpus and node["Resources"].get("GPU", 0) >= self._gpus
        ]
        asked = _amount(cpus, self._gpus)
        if not self._nodes:
            has = {_amount(node["Resources"].get("CPU", 0), node["Resources"].get("GPU", 0)) for node in nodes}
            raise OptionError(
                f"--on ray: a run needs {asked}, and no node has as much: {'; '.join(sorted(has))}. Ask for less."
            )
        self.said = f"ray: {len(self._nodes)} of {len(nodes)} nodes can work; each run gets {asked}"

    def use_store(self, store: Remote) -> None:
        """Let the nodes work in folders of their own, and upload."""
        self._store = store

    def prepare(self, folder: Path) -> None:
        """Ask every node that can work whether it sees the folder, or reaches the store, and has the same spectune."""
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        from .. import __version__

        with token_in(folder if self._store is None else self._store) as token:
            asked: list[Any] = [str(folder.resolve()), token, str(Path.cwd()), __version__]
            asked += [] if self._store is None else [self._store.afar()]
            answers = {}
            for node in self._nodes:
                there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
                task = self._ray.remote(obstacle).options(num_cpus=0, scheduling_strategy=there, max_retries=0)
                answers[node["NodeManagerAddress"], node["NodeID"]] = task.remote(*asked)
            for (address, _), answer in answers.items():
                try:
                    found = self._ray.get(answer, timeout=PATIENCE)
                except self._ray.exceptions.RayError as error:
                    found = f"does not answer ({one_line(error, 200)}). Look at it with: ray status"
                if found:
                    raise OutputError(f"--on ray: the node {address} {found}.")

    def submit(self, errand: Errand) -> Any:
        """Start a task on the node with most room."""
        task = self._ray.remote(work).options(
            **self._options, max_retries=RETRIES, scheduling_strategy="SPREAD", name=Path(errand.job).stem
        )
        return task.remote(errand)

    def ended(self, task: Any) -> bool:
        """Whether a task is over."""
        return bool(self._ray.wait([task], timeout=0)[0])

    def outcome(self, task: Any) -> tuple[int, Sequence[str]]:
        """Get what the errand returned; `LostError` names what Ray says of one that returned nothing."""
        try:
            found: tuple[int, Sequence[str]] = self._ray.get(task)
        except self._ray.exceptions.RayError as error:
            raise LostError(f"ray: {type(error).__name__}: {one_line(error, 300)}") from None
        return found

    def cancel(self, task: Any, at_once: bool) -> None:
        """Interrupt a task; its run saves a checkpoint, unless it is to end at once."""
        self._ray.cancel(task, force=at_once)


def _amount(cpus: float, gpus: float) -> str:
    return f"{cpus:g} CPU and {gpus:g} GPU"


def _connected(address: str) -> Any:
    """Get ray, connected to a cluster."""
    try:
        import ray
    except ImportError as error:
        raise MissingExtraError(f"--on ray: cannot import ray ({error}). Run: pip install 'spectune[ray]'") from None
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, ignore_reinit_error=True)
    except (ConnectionError, RuntimeError, ValueError, ImportError) as error:
        where = "here" if address == "auto" else f"at {address}"
        raise OptionError(
            f"--on ray: no Ray cluster answers {where} ({one_line(error, 200)}). Start one with: ray start --head; "
            f"or give --on ray://HOST:10001."
        ) from None
    return ray
