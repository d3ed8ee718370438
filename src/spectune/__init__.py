"""Spectune: fine-tune pretrained models in the singular space of their own weights.

`import spectune` registers the method with PEFT. It costs milliseconds: nothing heavy is imported
before it is used. Where PEFT is not imported yet, the registration waits for that moment. An installed spectune is
registered without this import, too.
"""

from __future__ import annotations

import importlib

import _spectune_autoload

TYPE_CHECKING = False  # importing typing would take longer than everything here
if TYPE_CHECKING:
    from typing import Any

    from .adapter import attach_dynamics as attach_dynamics
    from .bank import AdapterBank as AdapterBank
    from .errors import SpectuneError as SpectuneError
    from .export import export_lora as export_lora
    from .export import merge_checkpoint as merge_checkpoint
    from .fusion import collect_grams as collect_grams
    from .fusion import fuse as fuse
    from .methods import METHODS as METHODS
    from .records import Delta as Delta
    from .records import Spectrum as Spectrum
    from .records import Weight as Weight
    from .spectrum import decompose as decompose
    from .tuner import SpectralConfig as SpectralConfig
    from .tuner import prepare as prepare

__version__ = "0.1.0"

_HOME = {
    "SpectralConfig": "tuner",
    "prepare": "tuner",
    "AdapterBank": "bank",
    "decompose": "spectrum",
    "Weight": "records",
    "Spectrum": "records",
    "Delta": "records",
    "METHODS": "methods",
    "attach_dynamics": "adapter",
    "export_lora": "export",
    "export_gguf": "export",
    "merge_checkpoint": "export",
    "fuse": "fusion",
    "collect_grams": "fusion",
    "SpectuneError": "errors",
}
__all__ = ["__version__", *_HOME]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'spectune' has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return __all__


_spectune_autoload.install()
