"""`AdapterBank`: thousands of adapters on one basis, resident in one model; every row of a batch has its own."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import AdapterError, OptionError, nearest
from ..methods import SpectralModule
from .bank_file import cores_of
from .bank_layer import ROWS, BankedLayer, Rows, Seats, has_frozen_factors
from .kinds import SpectralLinear
from .layer import SpectralLayer

BASE = "__base__"


class AdapterBank:
    """Get a bank on the layers and the basis of one spectral adapter of a model.

        bank = AdapterBank(model)                      # model: a PeftModel with a spectral_r, svft or svdiff adapter
        bank.load("anna", "adapters/anna")
        with bank(["anna", "ben", "__base__"]):        # one name for each row of the batch
            model(**inputs)

    Methods with frozen factors differ in a small core alone, so a batch is one product with the factors for all rows
    and one batched product with the gathered cores. 10,000 residents of `spectral_r`, r = 8, take 2.6 MB a layer.
    `model(**inputs, adapter_names=[...])` and `generate(..., adapter_names=[...])` know the residents as well.

    Residents may be loaded, replaced and unloaded while other threads run `with bank(...)`: a forward that has begun
    keeps what it began with. The basis adapter itself is no resident; its numbers act outside of `with bank(...)` only.
    Raises `OptionError` for a method whose factors train, and for layers that are not linear.
    """

    def __init__(self, model: nn.Module, adapter_name: str = "default") -> None:
        self._model = model
        self._seats = Seats()
        self._layers: dict[str, BankedLayer] = {}
        self._free: deque[int] = deque()
        self._retired: list[int] = []
        self._count = 1  # seats given out so far; seat 0 is no adapter
        self._running = 0
        self._lock = threading.RLock()
        for path, layer in _layers_of(model, adapter_name).items():
            self._layers[path] = layer.bank = BankedLayer(self, layer.module(adapter_name), self._seats)

    @property
    def names(self) -> tuple[str, ...]:
        """The residents."""
        return tuple(self._seats.of)

    def load(self, name: str, folder: str | Path) -> None:
        """Make a saved adapter resident; a resident of that name is replaced. `AdapterError` if it does not fit."""
        self.put(name, cores_of(folder, self.modules))

    @property
    def modules(self) -> dict[str, SpectralModule]:
        """Layer -> the module whose basis the bank stands on."""
        return {path: layer.module for path, layer in self._layers.items()}

    def put(self, name: str, cores: dict[str, torch.Tensor]) -> None:
        """Make cores resident: for each layer the numbers of a core in the bank's own basis."""
        if name == BASE or name in getattr(self._model, "peft_config", {}):
            raise OptionError(f"{name!r} is the name of the base or of a live adapter. Give the resident another.")
        with self._lock:
            seat = self._take_seat()
            for path, layer in self._layers.items():
                layer.put(seat, cores[path], _room_for(self._count))
            table = dict(self._seats.of)
            self._retire(table.pop(name, None))
            self._seats.of = {**table, name: seat}

    def unload(self, name: str) -> None:
        """Let a resident go; `AdapterError` for a name that is none."""
        with self._lock:
            self._refuse_unknown([name])
            table = dict(self._seats.of)
            self._retire(table.pop(name))
            self._seats.of = table

    @contextmanager
    def __call__(self, adapter_names: Sequence[str]) -> Iterator[None]:
        """Run forwards whose rows use these residents (or `__base__`), in place of the active adapter."""
        with self._lock:
            self._refuse_unknown([name for name in adapter_names if name != BASE])
            seats = [self._seats.of.get(name, 0) for name in adapter_names]
            self._running += 1
        device = next(iter(self._layers.values())).module.S_R.device
        token = ROWS.set(Rows(self, torch.tensor(seats, device=device)))
        try:
            yield
        finally:
            ROWS.reset(token)
            with self._lock:
                self._running -= 1
                if not self._running:
                    self._free.extend(self._retired)
                    self._retired.clear()

    def close(self) -> None:
        """Take the bank out of the model."""
        for layer in self._model.modules():
            if isinstance(layer, SpectralLayer) and layer.bank is not None and layer.bank.bank is self:
                layer.bank = None

    def __len__(self) -> int:
        return len(self._seats.of)

    def _take_seat(self) -> int:
        if self._free:
            return self._free.popleft()
        self._count += 1
        return self._count - 1

    def _retire(self, seat: int | None) -> None:
        """Give a seat back; not before the forwards that may be reading it have ended."""
        if seat is not None:
            (self._retired if self._running else self._free).append(seat)

    def _refuse_unknown(self, names: Sequence[str]) -> None:
        for name in names:
            if name not in self._seats.of:
                raise AdapterError(f"{name!r} is not resident in this bank. {nearest(name, self.names)}")

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_lock": None, "_running": 0}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.RLock())


def _room_for(count: int) -> int:
    """Get the size of the tables for so many seats: the next power of two, so that growing is rare."""
    return 1 << (count - 1).bit_length()


def _layers_of(model: nn.Module, adapter_name: str) -> dict[str, SpectralLayer]:
    found = {
        name.removeprefix("base_model.model."): layer
        for name, layer in model.named_modules()
        if isinstance(layer, SpectralLayer) and adapter_name in layer.spectune_adapter
    }
    if not found:
        raise OptionError(
            f"AdapterBank: the model has no spectral adapter {adapter_name!r}. Load one of those that will be resident "
            f"first (PeftModel.from_pretrained): the bank stands on its basis."
        )
    for path, layer in found.items():
        if not isinstance(layer, SpectralLinear):
            raise OptionError(f"AdapterBank: {path} is no linear layer. Leave it out of target_modules.")
        if not has_frozen_factors(layer.module(adapter_name)):
            raise OptionError(
                f"AdapterBank: {layer.module(adapter_name).method.name} trains the factors and not only a core, or "
                f"works on a completed basis. A bank takes spectral_r, svft and svdiff."
            )
    return found
