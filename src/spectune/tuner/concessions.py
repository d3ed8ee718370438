"""Where an adapter has less than its config says: lowered ranks, and layers with nothing to train."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable

from ..adapter import SpectralModule
from ..errors import LeftOutError, OptionError
from .config import SpectralConfig

# A line is read by a person; a model may have hundreds of such layers. Chosen.
MOST_NAMED = 12
# From here to the call of get_peft_model: this room's and PEFT's own frames are between them.
ABOVE_PEFT = 6


class Concessions:
    """Collects them while a model is adapted, and reports them at the end, one line for each kind.

    Lowered ranks follow from the shapes and need no record. Layers that are left out become part of the config's
    `exclude_modules`, so that whoever reads the saved config finds the layers that the file has.
    """

    def __init__(self, config: SpectralConfig) -> None:
        self.config = config
        self._lowered: dict[tuple[str, int], dict[int, list[str]]] = {}
        self._left_out: dict[str, LeftOutError] = {}
        self._whole = 0
        """The number of layers with everything that the config says."""

    def note(self, path: str, module: SpectralModule, pattern: int | None) -> None:
        """Add a layer that has fewer directions, or a smaller inner rank, than the config (or its pattern) says."""
        asked, given = self.config.basis_rank, min(module.U_OR.shape[0], module.Vh_RI.shape[1])
        if asked is not None and asked != module.method.options()["basis_rank"] and asked > given:
            self._lowered.setdefault(("basis_rank", asked), {}).setdefault(given, []).append(path)
        own = pattern is not None and module.method.size_option() == "r"
        asked, given = pattern if own else self.config.r, getattr(module.method, "r", 0)
        if asked is not None and given < asked:
            self._lowered.setdefault(("r", asked), {}).setdefault(given, []).append(path)
        else:
            self._whole += 1

    def leave_out(self, path: str, reason: LeftOutError) -> None:
        """Add a layer that is not adapted."""
        self._left_out[path] = reason

    def close(self, any_adapted: bool) -> None:
        """Warn of what was collected (of ranks only for a new config), or raise it if no layer is adapted."""
        if self._left_out:
            reason = next(iter(self._left_out.values()))
            if not any_adapted:
                raise reason
            self.config.exclude_modules = also_excluding(self.config.exclude_modules, self._left_out)
            whys: dict[str, list[str]] = {}
            for path, error in self._left_out.items():
                whys.setdefault(error.why, []).append(path)
            said = "; ".join(f"{named(paths)} ({why})" for why, paths in whys.items())
            warnings.warn(f"left out of the adapter: {said}.", stacklevel=ABOVE_PEFT)
        if self.config.origin is not None:
            return
        if isinstance(self.config.columns, list) and any_adapted and not self._whole:
            raise OptionError(
                f"columns={self.config.columns}: no targeted weight has all of these. Remove those that none has."
            )
        for (option, asked), places in self._lowered.items():
            said = "; ".join(f"to {given} in {named(paths)}" for given, paths in sorted(places.items(), reverse=True))
            warnings.warn(
                f"{option}={asked} is more than some weights have and was lowered {said}.", stacklevel=ABOVE_PEFT
            )


def named(paths: Iterable[str]) -> str:
    """Get the names in a list, shortened if there are many."""
    paths = list(paths)
    more = f" and {len(paths) - MOST_NAMED} more" if len(paths) > MOST_NAMED else ""
    return ", ".join(paths[:MOST_NAMED]) + more


def also_excluding(given: set[str] | list[str] | str | None, paths: Iterable[str]) -> str:
    """Get the pattern that excludes `exclude_modules` and these paths; PEFT matches it on whole paths."""
    before = [given] if isinstance(given, str) and given else []
    names = [] if isinstance(given, str) else sorted(given or ())
    before += [rf"(?:.*\.)?{re.escape(name)}" for name in names]
    return "|".join([*before, *map(re.escape, paths)])
