"""`AdapterBank`: thousands of adapters in one basis, resident in one model; each row of a batch can use another."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..adapter import SpectralModule
from ..adapter.rows import ROWS, BankedLayer, Rows, Seats, has_frozen_factors
from ..checkpoint import PEFT_PREFIX
from ..errors import AdapterError, OptionError, nearest
from ..tuner.kinds import SpectralLinear
from ..tuner.layer import SpectralLayer
from .file import cores_of

BASE = "__base__"


class AdapterBank:
    """Make a bank from the layers and the basis of one spectral adapter of a model.

        bank = AdapterBank(model)                      # model: a PeftModel with a spectral_r, svft or svdiff adapter
        bank.load("anna", "adapters/anna")
        with bank(["anna", "ben", "__base__"]):        # one name for each row of the batch
            model(**inputs)

    Adapters of methods with frozen factors differ only in a small core, so a batch takes one product with the factors
    for all rows and one batched product with the gathered cores. 10,000 residents of `spectral_r`, r = 8, take
    2.6 MB a layer.
    `model(**inputs, adapter_names=[...])` and `generate(..., adapter_names=[...])` also accept the residents.

    Residents may be loaded, replaced and unloaded while other threads run `with bank(...)`: a forward that has begun
    keeps its adapters, and the place of an unloaded resident is reused once the last block that uses it has ended.
    A batch has one name for each row; where `generate` repeats rows (num_beams, num_return_sequences, passed to it by
    name) the copies of a row share its name. Where an engine puts the tokens of all rows into one long row, as
    transformers' continuous batching does, `bank(names, tokens=[3, 1, 1])` says how many each has.
    The basis adapter itself is not a resident; its numbers act only outside `with bank(...)`.
    Raises `OptionError` for a method that trains its factors, and for layers that are not linear.
    """

    def __init__(self, model: nn.Module, adapter_name: str = "default") -> None:
        self._model = model
        self._basis_id = getattr(getattr(model, "peft_config", {}).get(adapter_name), "basis_id", None)
        self._seats = Seats()
        self._layers: dict[str, BankedLayer] = {}
        self._free: deque[int] = deque()
        self._retired: set[int] = set()  # unloaded, but a running block still uses them
        self._held: Counter[int] = Counter()  # seat -> running blocks that use it
        self._count = 1  # seats used so far; seat 0 is not an adapter
        self._lock = self._seats.lock
        for path, layer in _layers_of(model, adapter_name).items():
            self._layers[path] = layer.bank = BankedLayer(self, layer.module(adapter_name), self._seats)

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the residents."""
        return tuple(self._seats.of)

    def load(self, name: str, folder: str | Path) -> None:
        """Make a saved adapter resident; one with the same name is replaced. `AdapterError` if it does not fit."""
        self.put(name, cores_of(folder, self.modules, self._basis_id))

    @property
    def modules(self) -> dict[str, SpectralModule]:
        """Layer -> the module with the basis that the bank uses."""
        return {path: layer.module for path, layer in self._layers.items()}

    def put(self, name: str, cores: Mapping[str, torch.Tensor]) -> None:
        """Make cores resident: for each layer, the numbers of a core in the bank's own basis.

        `AdapterError` for a layer without a core, a core of the wrong shape, NaN or infinity; then nothing changes.
        """
        if name == BASE or name in getattr(self._model, "peft_config", {}):
            raise OptionError(
                f"{name!r} is the name of the base or of a live adapter. Choose another name for the resident."
            )
        for path, layer in self._layers.items():
            _refuse_unfit(path, cores.get(path), layer.cores[0])
        with self._lock:
            seat = self._take_seat()
            try:
                for path, layer in self._layers.items():
                    layer.put(seat, cores[path], _room_for(self._count))
            except BaseException:
                self._free.append(seat)
                raise
            table = dict(self._seats.of)
            former = table.pop(name, None)
            self._seats.of = {**table, name: seat}
            self._retire(former)

    def unload(self, name: str) -> None:
        """Remove a resident; `AdapterError` for an unknown name."""
        with self._lock:
            self._refuse_unknown([name])
            table = dict(self._seats.of)
            former = table.pop(name)
            self._seats.of = table
            self._retire(former)

    @contextmanager
    def __call__(self, adapter_names: Sequence[str], tokens: Sequence[int] | None = None) -> Iterator[None]:
        """Run forwards with one resident (or `__base__`) per row, in place of the active adapter.

        `tokens`: how many tokens each row has in the one long row that all of them share.
        """
        if tokens is not None and len(tokens) != len(adapter_names):
            raise OptionError(f"{len(tokens)} numbers of tokens for {len(adapter_names)} adapter names: give one each.")
        with self._lock:
            self._refuse_unknown([name for name in adapter_names if name != BASE])
            seats = [self._seats.of.get(name, 0) for name in adapter_names]
            self._held.update(set(seats))
        try:
            device = next(iter(self._layers.values())).module.S_R.device
            seats_B = torch.tensor(seats, device=device)
            if tokens is not None:
                seats_B = seats_B.repeat_interleave(torch.tensor(tokens, device=device))
            token = ROWS.set(Rows(self, seats_B, packed=tokens is not None))
            try:
                yield
            finally:
                ROWS.reset(token)
        finally:
            with self._lock:
                self._let_go(set(seats))

    def close(self) -> None:
        """Take the bank out of the model."""
        for layer in self._model.modules():
            if isinstance(layer, SpectralLayer) and layer.bank is not None and layer.bank.bank is self:
                layer.bank = None

    def __len__(self) -> int:
        return len(self._seats.of)

    def __contains__(self, name: object) -> bool:
        return name in self._seats.of

    def _take_seat(self) -> int:
        if self._free:
            return self._free.popleft()
        self._count += 1
        return self._count - 1

    def _retire(self, seat: int | None) -> None:
        """Free the seat of an unloaded resident, once the blocks that may be reading it have ended."""
        if seat is None:
            return
        if seat in self._held:
            self._retired.add(seat)
        else:
            self._free.append(seat)

    def _let_go(self, seats: set[int]) -> None:
        """Note that a block with these seats has ended."""
        self._held -= Counter(seats)
        ended = {seat for seat in seats & self._retired if seat not in self._held}
        self._retired -= ended
        self._free.extend(sorted(ended))

    def _refuse_unknown(self, names: Sequence[str]) -> None:
        unknown = [name for name in dict.fromkeys(names) if name not in self._seats.of]
        if unknown:
            are = "is" if len(unknown) == 1 else "are"
            raise AdapterError(
                f"{', '.join(map(repr, unknown))} {are} not resident in this bank. {nearest(unknown[0], self.names)}"
            )

    def __getstate__(self) -> dict[str, Any]:
        # A copy has no running blocks.
        free = deque([*self._free, *sorted(self._retired)])
        return {**self.__dict__, "_lock": None, "_held": Counter(), "_free": free, "_retired": set()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = self._seats.lock


def _refuse_unfit(path: str, core: torch.Tensor | None, place: torch.Tensor) -> None:
    if core is None:
        raise AdapterError(f"{path}: no core was given for this layer, which the bank adapts. Give one for each layer.")
    if core.shape != place.shape or not core.is_floating_point():
        asked, found = ("x".join(map(str, tensor.shape)) for tensor in (place, core))
        raise AdapterError(
            f"{path}: the bank keeps {asked} numbers per resident, but the given core has {found} of "
            f"{str(core.dtype).removeprefix('torch.')}. Convert it to the bank's basis first."
        )
    if not bool(torch.isfinite(core.to(place.dtype)).all()):
        raise AdapterError(f"{path}: the core contains NaN or infinity. Train or copy the adapter again.")


def _room_for(count: int) -> int:
    """Get the size of the tables for this many seats: the next power of two, so that growing is rare."""
    return 1 << (count - 1).bit_length()


def _layers_of(model: nn.Module, adapter_name: str) -> dict[str, SpectralLayer]:
    found = {
        name.removeprefix(PEFT_PREFIX): layer
        for name, layer in model.named_modules()
        if isinstance(layer, SpectralLayer) and adapter_name in layer.spectune_adapter
    }
    if not found:
        raise OptionError(
            f"AdapterBank: the model has no spectral adapter {adapter_name!r}. Load one of the residents first "
            "(PeftModel.from_pretrained): the bank works in its basis."
        )
    for path, layer in found.items():
        if not isinstance(layer, SpectralLinear):
            raise OptionError(f"AdapterBank: {path} is not a linear layer. Leave it out of target_modules.")
        method = layer.module(adapter_name).method
        if method.shared_by() or not has_frozen_factors(layer.module(adapter_name)):
            raise OptionError(
                f"AdapterBank: {method.name} trains more than a core, shares it between layers, or works on a "
                "completed basis. A bank takes spectral_r, svft and svdiff."
            )
    return found
