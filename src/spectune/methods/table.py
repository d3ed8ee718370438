"""The table of methods. A new method is one file and one row here."""

from __future__ import annotations

from collections.abc import Mapping

from ..errors import OptionError, unknown_option
from .contract import Method
from .one_sided import OneSided
from .orthogonal import LiDB, OrthogonalAdaptation
from .specadapt import SpecAdapt
from .spectral_a import SpectralA
from .spectral_r import SpectralR
from .svdiff import SVDiff
from .svft import SVFT

METHODS: dict[str, type[Method]] = {
    method.name: method
    for method in (SpectralA, SpectralR, SVFT, SpecAdapt, OneSided, SVDiff, LiDB, OrthogonalAdaptation)
}


def build_method(name: str, options: Mapping[str, object]) -> Method:
    """Get the method called `name` with its options; `OptionError` for an option that it does not use."""
    if name not in METHODS:
        raise OptionError(f"unknown method {name!r}. {unknown_option(name, list(METHODS))}")
    known = METHODS[name].options()
    for option, value in options.items():
        if option not in known:
            raise OptionError(
                f"method {name!r} has no option {option!r} (given: {value!r}). Leave it out; {name} has: "
                f"{', '.join(known)}."
            )
    return METHODS[name](**options)
