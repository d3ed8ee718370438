"""Spectune: fine-tune pretrained models in the singular space of their own weights.

`import spectune` registers the method with PEFT. It costs milliseconds: nothing heavy is imported
before it is used. Where PEFT is not imported yet, the registration waits for that moment.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.util
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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

__version__ = "0.1.0.dev0"

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


class _RegisterWithPeft(importlib.abc.MetaPathFinder):
    """Runs the registration right after somebody imports `peft`, once.

    PEFT has no plugin discovery, and importing it here would make `spectune --help` wait for torch.
    """

    asking = False

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> Any:
        # Libraries also ask for the spec without importing, to see whether peft is installed.
        if fullname != "peft" or self.asking:
            return None
        self.asking = True
        try:
            spec = importlib.util.find_spec("peft")
        finally:
            self.asking = False
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_register(module: Any) -> None:
                execute(module)
                _register()

            spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


def _register() -> None:
    importlib.import_module(".tuner", __name__)


if "peft" in sys.modules:
    _register()
elif not any(isinstance(finder, _RegisterWithPeft) for finder in sys.meta_path):
    sys.meta_path.insert(0, _RegisterWithPeft())
