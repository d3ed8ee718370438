"""Makes PEFT know the method in every process, without importing spectune, torch or peft.

`spectune_autoload.pth` imports this file when Python starts, and so does `import spectune`. It only leaves a finder
that waits for `import peft`; after that, PEFT's table of configs has an entry that imports spectune when somebody
reads a Spectune adapter. SPECTUNE_AUTOLOAD=0 turns the start-up file off.
"""

import sys

TYPE_CHECKING = False  # importing typing would take longer than everything here
if TYPE_CHECKING:
    from typing import Any

METHOD = "spectune"
PEFT_TYPE = METHOD.upper()


class AfterImport:
    """Does something with a module right after somebody imports it, once."""

    asking = False

    def __init__(self, module: str, act: "Any") -> None:
        self.module, self.act = module, act

    def find_spec(self, fullname: str, path: "Any" = None, target: "Any" = None) -> "Any":
        """Get the spec of the module, whose loader then also acts; None for all others."""
        # Libraries also ask for the spec without importing, to see whether peft is installed.
        if fullname != self.module or self.asking:
            return None
        self.asking = True
        try:
            found = (finder.find_spec(fullname, path, target) for finder in sys.meta_path)
            spec: Any = next((spec for spec in found if spec is not None), None)
        finally:
            self.asking = False
        if spec is not None and hasattr(spec.loader, "exec_module"):
            execute = spec.loader.exec_module

            def execute_and_act(module: "Any") -> None:
                execute(module)
                self.act(module)

            spec.loader.exec_module = execute_and_act
        return spec


def after_import(name: str, act: "Any") -> None:
    """Do something with a module now if it is imported, or else as soon as it is. A second call does nothing."""
    if name in sys.modules:
        act(sys.modules[name])
    elif not any(getattr(finder, "module", None) == name for finder in sys.meta_path):
        sys.meta_path.insert(0, AfterImport(name, act))


def install() -> None:
    """Announce the method as soon as peft is imported. (PEFT has no plugins.)"""
    after_import("peft", announce)


def announce(peft: "Any") -> None:
    """Enter the method into PEFT's closed enum and its table of configs; a peft that has neither is left alone."""
    types, configs = getattr(peft, "PeftType", None), getattr(peft, "PEFT_TYPE_TO_CONFIG_MAPPING", None)
    if types is not None and configs is not None and PEFT_TYPE not in configs:
        configs[extend(types)] = ConfigWhenAsked


def extend(types: "Any") -> "Any":
    """Get the PeftType of this method, adding it to PEFT's closed enum if need be."""
    if PEFT_TYPE not in types.__members__:
        member = str.__new__(types, PEFT_TYPE)
        member._name_, member._value_ = PEFT_TYPE, PEFT_TYPE
        # Since Python 3.12 members are attributes of their class; before, they are looked up in the first table.
        setattr(types, PEFT_TYPE, member)
        types._member_map_[PEFT_TYPE] = member
        types._value2member_map_[PEFT_TYPE] = member
        types._member_names_.append(PEFT_TYPE)
    return types[PEFT_TYPE]


class Waiting(type):
    """The class of a name for spectune's config: whatever is asked of it, spectune answers, imported for that."""

    def __call__(cls, *args: "Any", **kwargs: "Any") -> "Any":
        return config_class()(*args, **kwargs)

    def __getattribute__(cls, name: str) -> "Any":
        return getattr(config_class(), name)

    def __instancecheck__(cls, config: object) -> bool:
        return isinstance(config, config_class())

    def __subclasscheck__(cls, other: type) -> bool:
        return issubclass(other, config_class())


class ConfigWhenAsked(metaclass=Waiting):
    """What PEFT's table of configs has until spectune is imported."""


def config_class() -> "Any":
    """Get the class that reads a Spectune config; importing it puts it, and the tuner, into PEFT's tables."""
    from spectune.tuner.register import SpectralConfigFromFile

    return SpectralConfigFromFile
