"""Which adapted weights train numbers together, and which of them holds these numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from ..errors import OptionError
from ..methods.contract import Method

if TYPE_CHECKING:
    from .modules import SpectralModule


def group_of(method: Method, layer: str) -> str:
    """Get a name for the weights that share numbers with this layer's: all of them, or those of its kind."""
    return "" if method.shared_by() == "model" else kind_of_layer(layer)


def kind_of_layer(layer: str) -> str:
    """Get the path of a layer without its indices (`encoder.layer.*.attention.self.query`): equal for one kind."""
    return ".".join("*" if part.isdigit() else part for part in layer.split("."))


class Owners:
    """The first adapted weight of each group, which holds the shared numbers of one adapter."""

    def __init__(self, modules: Iterable[SpectralModule] = ()) -> None:
        self._first: dict[str, SpectralModule] = {}
        self.members: list[SpectralModule] = []
        for module in modules:
            self.add(module)

    def add(self, module: SpectralModule) -> None:
        """Note a weight; it becomes the owner if it is the first of its group, or replaces the first."""
        if module.method.shared_by():
            self.members.append(module)
            first = self._first.setdefault(group_of(module.method, module.name), module)
            if first.name == module.name:
                self._first[group_of(module.method, module.name)] = module

    def refuse_left_behind(self, attached_again: Callable[[str], bool]) -> None:
        """Raise `OptionError` if an owner is to be attached again, and a weight that trains its numbers is not."""
        for module in self.members:
            owner = self._first[group_of(module.method, module.name)]
            if attached_again(owner.name) and not attached_again(module.name):
                raise OptionError(
                    f"{module.name}: trains the numbers of {owner.name}, which would be replaced. Give the new "
                    f"adapter another name, or delete the old one first."
                )

    def of(self, method: Method, layer: str, rows_O: int, cols_I: int) -> SpectralModule | None:
        """Get the holder of a layer's shared numbers, None for the first; `OptionError` if it holds other shapes."""
        owner = self._first.get(group_of(method, layer)) if method.shared_by() else None
        if owner is None or owner.name == layer:  # an adapter that is attached once more begins anew
            return None
        held = owner.method.shared_shapes(owner.U_OR.shape[0], owner.Vh_RI.shape[1])
        for name, shape in method.shared_shapes(rows_O, cols_I).items():
            if held[name] != shape:
                mine, theirs = ("x".join(map(str, sides)) for sides in (shape, held[name]))
                raise OptionError(
                    f"{layer}: share='kind' gives the layers of a kind one {name}, but here it is {mine}, and in "
                    f"{owner.name} {theirs}. Exclude one of the layers, or set share to 'none'."
                )
        return owner
