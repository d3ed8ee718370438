"""Many adapters on one basis in one layer: one batched product with a core for every row of a batch."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F

from ..errors import OptionError
from ..records import SparseCore, Spectrum
from .autocast import in_own_dtype
from .modules import SpectralModule

# Largest difference of entries in equal bases: singular vectors have entries of at most one, and float32 roundoff of a
# full SVD is about 1e-6. Chosen above it.
SAME_BASIS = 1e-5


@dataclass(frozen=True, eq=False)
class Rows:
    """The seat of every row in the running batch; seat 0 means no adapter."""

    bank: object
    seats_B: torch.Tensor
    copies: int = 1
    """Copies that `generate` makes of every row, for beams or several answers."""
    packed: bool = False
    """The tokens of all rows are in one long row, and there is a seat for each token."""

    def of_batch(self, shape: torch.Size, name: str) -> torch.Tensor:
        """Get a seat for each row of a layer's input (packed: each token); `OptionError` if their numbers differ."""
        rows = shape[:-1].numel() if self.packed else shape[0]
        refuse_other_rows(name, len(self.seats_B), rows, self.copies)
        return self.seats_B if rows == len(self.seats_B) else self.seats_B.repeat_interleave(self.copies)


ROWS: ContextVar[Rows | None] = ContextVar("spectune_bank_rows", default=None)
"""Set by `with bank(names):` for the layers; one per thread and task."""


@contextmanager
def rows_repeated(copies: int) -> Iterator[None]:
    """Repeat every row of the running batch, if there is one, this many times."""
    rows = ROWS.get()
    token = ROWS.set(None if rows is None else replace(rows, copies=copies))
    try:
        yield
    finally:
        ROWS.reset(token)


def refuse_other_rows(name: str, given: int, rows: int, copies: int = 1) -> None:
    """Raise `OptionError` unless every row has one name; an encoder sees rows before `generate` copies them."""
    if rows not in (given, given * copies):
        raise OptionError(
            f"{name}: Length of `adapter_names` should be the same as the number of inputs, but got {given} adapter "
            f"names for {rows} rows of input. Give each row one (`__base__` for none); if generate repeats rows, "
            f"pass num_beams or num_return_sequences to it as keywords."
        )


class Seats:
    """Which resident has which seat. A change makes a new table, so a running forward keeps its own.

    Writers of a table of names or of a layer's cores hold `lock`.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.of: dict[str, int] = {}
        self._last: tuple[Sequence[str], dict[str, int], torch.Tensor | None] | None = None

    def of_rows(self, names: Sequence[str], device: torch.device) -> torch.Tensor | None:
        """Get the seat of every row, or None if no row has a resident. Cached, since every layer needs the same."""
        last, table = self._last, self.of
        if last is not None and last[0] is names and last[1] is table:
            return None if last[2] is None else last[2].to(device)
        found = [table.get(name, 0) for name in names]
        seats_B = torch.tensor(found, device=device) if any(found) else None
        self._last = (names, table, seats_B)
        return seats_B

    def __getstate__(self) -> dict[str, object]:
        return {"of": self.of}

    def __setstate__(self, state: dict[str, dict[str, int]]) -> None:
        self.__init__()  # type: ignore[misc]
        self.of = state["of"]


@dataclass
class BankedLayer:
    """The cores of all residents for one layer, by seat."""

    bank: object
    module: SpectralModule
    seats: Seats
    cores: torch.Tensor = field(init=False)
    """(seats, ...): diagonals, matrices, or the values of one sparse pattern. Seat 0 stays zero."""
    pattern: SparseCore | None = field(init=False)

    # The tables outlive the forward that makes or moves them, and inference tensors can never be written again.
    @torch.inference_mode(False)
    @torch.no_grad()
    def __post_init__(self) -> None:
        core = self.module.delta().core
        self.pattern = core if isinstance(core, SparseCore) else None
        self.cores = torch.zeros_like(numbers_of(core))[None]

    @torch.inference_mode(False)
    @torch.no_grad()
    def put(self, seat: int, numbers: torch.Tensor, seats: int) -> None:
        """Write one core, in a new table if the seat is outside: a forward may be reading the present one."""
        with self.seats.lock:
            if seats > len(self.cores):
                more = self.cores.new_zeros(seats - len(self.cores), *self.cores.shape[1:])
                self.cores = torch.cat([self.cores, more])
            self.cores[seat].copy_(numbers)

    @torch.inference_mode(False)
    @torch.no_grad()
    def _move(self, device: torch.device) -> torch.Tensor:
        with self.seats.lock:
            self.cores = self.cores.to(device)
            return self.cores

    def add(self, y_NO: torch.Tensor, x_NI: torch.Tensor, seats_B: torch.Tensor) -> torch.Tensor:
        """Get y_NO plus the update of each row's resident."""
        cores = self.cores if self.cores.device == x_NI.device else self._move(x_NI.device)
        return add_rows(y_NO, x_NI, self.module, cores.index_select(0, seats_B), self.pattern)


def numbers_of(core: torch.Tensor | SparseCore) -> torch.Tensor:
    """Get the numbers of a core, whatever its form."""
    return core.values_C if isinstance(core, SparseCore) else core


def has_frozen_factors(module: SpectralModule) -> bool:
    """Ask whether only the core of an update is trained, so that adapters on one basis differ only in small cores."""
    delta, basis = module.delta(), module.spectrum
    return _leads(delta.left_OP, basis.U_OR) and _leads(delta.right_QI, basis.Vh_RI)


def _leads(factor: torch.Tensor, of_basis: torch.Tensor) -> bool:
    """Ask whether a factor is the basis itself, or its first directions."""
    same = factor.data_ptr() == of_basis.data_ptr() and factor.stride() == of_basis.stride()
    return factor is of_basis or (same and factor.untyped_storage().nbytes() > 0)


def add_rows(
    y_NO: torch.Tensor, x_NI: torch.Tensor, module: SpectralModule, cores: torch.Tensor, pattern: SparseCore | None
) -> torch.Tensor:
    """Get y_NO + x_NI dW^T with one core for each of B rows of N / B tokens; the factors are read once for all.

    `cores` are B diagonals, B matrices, or the values of B cores of one sparse `pattern`. Overwrites y_NO where no
    gradient is wanted.
    """
    rows, tokens = len(cores), x_NI.shape[0]
    left_OR, right_RI = module.factors_in(x_NI.dtype)
    cores = cores.to(x_NI.dtype)
    if cores.ndim == 3:
        left_OR, right_RI = left_OR[:, : cores.shape[1]], right_RI[: cores.shape[2]]
    z_BTR = F.linear(x_NI, right_RI).view(rows, tokens // rows, -1)
    if pattern is not None:
        rows_B1 = torch.arange(rows, device=cores.device)[:, None]
        places = (rows_B1, pattern.rows_C.long(), pattern.cols_C.long())
        cores = cores.new_zeros(rows, *pattern.shape).index_put(places, cores)
    h_BTR = z_BTR * cores[:, None] if cores.ndim == 2 else torch.bmm(z_BTR, cores.mT)
    h_NR = h_BTR.reshape(tokens, -1)
    if y_NO.dtype != h_NR.dtype:
        return y_NO + F.linear(h_NR, left_OR).to(y_NO.dtype)
    return torch.addmm(y_NO, h_NR, left_OR.T) if torch.is_grad_enabled() else y_NO.addmm_(h_NR, left_OR.T)


class Groups:
    """Which live adapters of a layer stand on one basis: found once, and again when a basis is another tensor."""

    def __init__(self) -> None:
        self._of: WeakKeyDictionary[SpectralModule, tuple[Spectrum, int, object]] = WeakKeyDictionary()

    def of(self, modules: dict[str, SpectralModule]) -> list[list[str]]:
        """Get the names in groups that one batched product can serve; others are alone."""
        groups: dict[tuple[object, float], list[str]] = {}
        for name, module in modules.items():
            groups.setdefault((self._group(module), module.strength), []).append(name)
        return list(groups.values())

    def _group(self, module: SpectralModule) -> object:
        basis = module.spectrum
        written = basis.U_OR._version + basis.Vh_RI._version
        held = self._of.get(module)
        if held is None or held[0] is not basis or held[1] != written:
            self._of.pop(module, None)
            alike = (entry[2] for other, entry in self._of.items() if share_basis(other, module))
            held = self._of[module] = (basis, written, next(alike, object()))
        return held[2]

    def __getstate__(self) -> dict[str, object]:
        return {}  # a copy of the layer has other modules

    def __setstate__(self, state: dict[str, object]) -> None:
        self._of = WeakKeyDictionary()


def share_basis(one: SpectralModule, other: SpectralModule) -> bool:
    """Ask whether two adapters of one weight differ only in their cores."""
    if one.method != other.method or not has_frozen_factors(one) or not has_frozen_factors(other):
        return False
    # The other frozen tensors follow from the method and the basis.
    frozen = other.frozen
    places = all(torch.equal(kept, frozen[name]) for name, kept in one.frozen.items() if not kept.is_floating_point())
    mine, theirs = one.spectrum, other.spectrum
    pairs = ((mine.U_OR, theirs.U_OR), (mine.Vh_RI, theirs.Vh_RI))
    return places and all(torch.allclose(a, b, rtol=0, atol=SAME_BASIS) for a, b in pairs)


def stacked_cores(modules: list[SpectralModule]) -> tuple[torch.Tensor, SparseCore | None]:
    """Get (modules + 1, ...): the cores of adapters on one basis, computed together, and a last one of zeros.

    With them the pattern that they share, if any.
    """
    lead = modules[0]
    trained = {name: torch.stack([module.trained[name] for module in modules]) for name in lead.trained_names}
    spectrum, strength = lead.spectrum, lead.strength
    # Places as int64: the batched index_select of torch 2.6 needs it.
    frozen = {name: kept if kept.is_floating_point() else kept.long() for name, kept in lead.frozen.items()}
    seen: list[SparseCore | None] = []

    def numbers(one: dict[str, torch.Tensor]) -> torch.Tensor:
        core = lead.method.delta(spectrum, one, frozen, strength).core
        seen.append(core if isinstance(core, SparseCore) else None)  # only its values are batched
        return numbers_of(core)

    with in_own_dtype(spectrum.S_R):
        cores: torch.Tensor = torch.vmap(numbers)(trained)
    return torch.cat([cores, torch.zeros_like(cores[:1])]), seen[0]
