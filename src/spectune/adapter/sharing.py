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

    def __init__(self, modules: Iterable[tuple[str, SpectralModule]] = ()) -> None:
        self._first: dict[str, tuple[str, SpectralModule]] = {}
        self._groups: dict[str, str] = {}
        for path, module in modules:
            self.add(module, path)

    def add(self, module: SpectralModule, path: str = "") -> None:
        """Note a weight; it becomes the owner if it is the first of its group, or replaces the first.

        `path` is where it stands in the model, if that is not its name: a wrapped model has longer paths.
        """
        path = path or module.name
        if module.method.shared_by():
            group = self._groups[path] = group_of(module.method, path)
            if self._first.setdefault(group, (path, module))[0] == path:
                self._first[group] = path, module

    def refuse_left_behind(self, attached_again: Callable[[str], bool]) -> None:
        """Raise `OptionError` if an owner is to be attached again, and a weight that trains its numbers is not."""
        for path, group in self._groups.items():
            owner, _ = self._first[group]
            if attached_again(owner) and not attached_again(path):
                raise OptionError(
                    f"{path}: trains the numbers of {owner}, which would be replaced. Give the new adapter another "
                    f"name, or delete the old one first."
                )

    def of(self, method: Method, layer: str, rows_O: int, cols_I: int) -> SpectralModule | None:
        """Get the holder of a layer's shared numbers, None for the first; `OptionError` if it holds other shapes."""
        path, owner = self._first.get(group_of(method, layer), ("", None)) if method.shared_by() else ("", None)
        if owner is None or path == layer:  # an adapter that is attached once more begins anew
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
