"""The parts of other tools that our plugins meet, as their sources have them.

axolotl 0.19, ms-swift 4.6, vLLM 0.33, SGLang 0.5.23.
The tool itself is used where it can be imported: it needs a GPU's packages, which tests must not depend on.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from enum import Enum
from importlib import import_module
from pkgutil import resolve_name
from types import ModuleType
from typing import Any

import pytest


def with_tool(monkeypatch: pytest.MonkeyPatch, plugin: str, **parts: dict[str, Any]) -> Any:
    """Get a plugin of ours, imported afresh beside the real tool, or beside a stand-in of `module__name: {…}`."""
    names = {module.replace("__", "."): content for module, content in parts.items()}
    try:
        for name in names:
            import_module(name)
    except ImportError:
        for name, content in names.items():
            for i in range(1, len(places := name.split(".")) + 1):
                stem = ".".join(places[:i])
                made = sys.modules.get(stem) if i < len(places) and stem in sys.modules else ModuleType(stem)
                monkeypatch.setitem(sys.modules, stem, made)
            vars(sys.modules[name]).update(content)
    monkeypatch.delitem(sys.modules, f"spectune.plugins.{plugin}", raising=False)
    found = import_module(f"spectune.plugins.{plugin}")
    del sys.modules[f"spectune.plugins.{plugin}"]  # not by monkeypatch, which would bring it back at the end
    return found


@dataclass(frozen=True)
class AdapterCapabilities:
    name: str
    lora_like: bool = False
    relora: bool = False


class BasePlugin:
    def get_input_args(self) -> str | None:
        return None

    def get_adapter_capabilities(self) -> list[AdapterCapabilities]:
        return []

    def load_adapter(self, model: Any, cfg: Any, inference: bool = False, config_only: bool = False) -> Any:
        return None


class PeftTuner:
    """Saves with PEFT and loads with PEFT."""


class LoRAResolver:
    async def resolve_lora(self, base_model_name: str, lora_name: str) -> Any:
        raise NotImplementedError


class LoRAResolverRegistry:
    def __init__(self) -> None:
        self.resolvers: dict[str, Any] = {}

    def register_resolver(self, resolver_name: str, resolver: Any) -> None:
        self.resolvers[resolver_name] = resolver


@dataclass
class LoRARequest:
    lora_name: str
    lora_int_id: int
    lora_path: str = ""


def get_adapter_absolute_path(lora_path: str) -> str:
    return lora_path  # what the worker does with an absolute path; a hub name is downloaded


class LoRAConfig:
    def __init__(self, path: str | None = None, config_dict: dict[str, Any] | None = None, **more: Any) -> None:
        self.path, self.config_dict, self.more = path, config_dict, more


class HookType(Enum):
    BEFORE = "before"


class HookRegistry:
    """A hook before a method gets its arguments and may give others."""

    @classmethod
    def register(cls, target: str, hook: Any, hook_type: HookType) -> None:
        place, _, name = target.rpartition(".")
        owner = resolve_name(place)
        original = getattr(owner, name)

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            args, kwargs = hook(*args, **kwargs) or (args, kwargs)
            return original(*args, **kwargs)

        setattr(owner, name, wrapped)


AXOLOTL = {"axolotl__integrations__base": {"BasePlugin": BasePlugin, "AdapterCapabilities": AdapterCapabilities}}
