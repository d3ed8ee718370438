"""A reward in the user's own Python file, which only the command line can name."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from ..errors import DataError, OptionError, one_line
from .rewards import Reward

Function = Callable[..., Sequence[Any]]
# FILE.py:function -> the hash of the file, and the function. Filled by the command line alone: a run.yaml says which
# function a run had, and never where it is.
_GIVEN: dict[str, tuple[str, Function]] = {}


class OwnReward(Reward):
    """What a function of a Python file says, as trl calls it: `function(prompts, completions, **columns)`."""

    reward: Literal["python"]
    function: str = Field(description="FILE.py:function, without the folder.")
    sha256: str = Field(description="Of the file.")

    def scores(self, prompts: list[str], written: list[str], rows: list[dict[str, Any]]) -> list[float]:
        """Get the scores of all texts; `OptionError` unless the function was given to this process."""
        columns = {name: [row.get(name) for row in rows] for name in {name: 0 for row in rows for name in row}}
        for taken in ("prompts", "completions"):
            columns.pop(taken, None)
        found = self._given()(prompts=prompts, completions=written, **columns)
        try:
            scores = [float(score) for score in found]
        except (TypeError, ValueError) as error:
            raise DataError(f"{self.function}: the scores must be numbers: {one_line(error)}.") from error
        if len(scores) != len(written) or not all(map(math.isfinite, scores)):
            raise DataError(f"{self.function}: gave {len(scores)} scores for {len(written)} texts: {scores[:4]}.")
        return scores

    def ready(self) -> None:
        self._given()

    def _given(self) -> Function:
        sha256, function = _GIVEN.get(self.function, ("", None))
        if function is None or sha256 != self.sha256:
            raise OptionError(
                f"rewards: {self.function} is Python code, which no file of a run can start, or it has changed. Look "
                f"at it, then give --reward {self.function}."
            )
        return function


def own_reward(asked: str) -> OwnReward:
    """Run the Python file in `FILE.py:function`, and get the function as a reward."""
    file, _, name = asked.rpartition(":")
    path = Path(file)
    if not file or not name:
        raise OptionError(f"--reward {asked}: expected FILE.py:function.")
    if not path.is_file():
        raise OptionError(f"--reward {asked}: the file {file} does not exist. Check the path.")
    spec = spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise OptionError(f"--reward {asked}: {file} is not a Python file. Give FILE.py:function.")
    module = module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # the user's code can raise anything
        raise OptionError(f"--reward {asked}: cannot run {file}: {one_line(error)}.") from error
    function = getattr(module, name, None)
    if not callable(function):
        raise OptionError(f"--reward {asked}: {file} has no function {name!r}.")
    named, sha256 = f"{path.name}:{name}", hashlib.sha256(path.read_bytes()).hexdigest()
    _GIVEN[named] = sha256, function
    return OwnReward.model_validate({"reward": "python", "function": named, "sha256": sha256})
