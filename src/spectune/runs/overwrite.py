"""A run that replaces another one in its folder: at its own first step, and in one step."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from ..checkpoint import fresh_folder, write_atomically
from ..checkpoint.claim import LOCK_FILE
from ..checkpoint.run_folder import ADAPTER, MODEL, RUN_FILE
from ..errors import OptionError, OutputError
from ..recipes.scoring import COMPLETIONS
from ..training.config import RunConfig
from ..training.yaml_file import read_yaml, write_yaml

# What a run's folder may hold; pictures that a run drew are in `validation`.
OWN = {RUN_FILE, LOCK_FILE, ADAPTER, MODEL, "checkpoints", "validation", "result.json", "report.html"} | {COMPLETIONS}


def refuse_to_replace(folder: Path) -> None:
    """Raise `OutputError` unless the folder is that of a run and holds nothing else."""
    if folder.is_symlink():
        raise OutputError(
            f"{folder}: this is a link, and nothing is deleted through links. Pass the folder itself to --overwrite."
        )
    try:
        is_run = "recipe" in read_yaml(folder / RUN_FILE)
    except OptionError:
        is_run = False
    if not is_run:
        raise OutputError(
            f"{folder}: {RUN_FILE} in it is not the file of a run, so --overwrite keeps it. Choose another."
        )
    for precious in (Path.cwd(), Path.home()):
        if folder.resolve() in (precious, *precious.parents):
            raise OutputError(f"{folder}: replacing this folder would delete {precious}. Choose another folder.")
    foreign = sorted(path.name for path in folder.iterdir() if path.name not in OWN and ".partial-" not in path.name)
    if foreign:
        raise OutputError(
            f"{folder}: {foreign[0]} in it is not part of a run, so --overwrite does not delete it. Move it, or choose "
            f"another folder."
        )


def replace_run(folder: Path, config: RunConfig) -> None:
    """Put a new folder with this run.yaml in the place of an old run's, which is deleted then.

    The new one has the old one's lock, which the caller holds.
    """
    with fresh_folder(folder, overwrite=True) as partial:
        try:
            os.link(folder / LOCK_FILE, partial / LOCK_FILE)
        except OSError as error:
            raise OutputError(
                f"{folder}: the lock cannot be handed on ({error.strerror}), so the old run was kept. Choose another "
                f"folder."
            ) from error
        write_atomically(partial / RUN_FILE, write_yaml(config.plain()))


class FirstStep(TrainerCallback):
    """Does something once, when the first step is done: until then a run may still be refused or fail."""

    def __init__(self, work: Callable[[], None]) -> None:
        self.work: Callable[[], None] | None = work

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.now()

    def now(self) -> None:
        """Do it now unless it is done."""
        work, self.work = self.work, None
        if work is not None:
            work()
