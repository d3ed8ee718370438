"""The versions and the machine of a run, for every record."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from typing import Any

from .. import __version__

# The packages that decide what a run computes.
PACKAGES = ("torch", "peft", "transformers")


def versions(*more: str) -> dict[str, str]:
    """Get the release of Python and of each package that affects the numbers, without importing them."""
    found = {"python": platform.python_version(), "spectune": __version__}
    for name in (*PACKAGES, *more):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def machine(**more: Any) -> dict[str, Any]:
    """Get the machine; `more` adds what only the run knows, such as the name of its accelerator."""
    return {
        "platform": platform.platform(),
        "processor": platform.processor() or platform.machine(),
        "cpu_count": os.cpu_count(),
        **more,
    }
