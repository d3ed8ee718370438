"""One entry of the cache: the singular directions of one weight in one safetensors file, checked when it is read."""

from __future__ import annotations

import hashlib
import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from ..algebra import fix_signs
from ..checkpoint import BASIS_KIND, TensorFile, fingerprint, save_tensors
from ..errors import AdapterError
from ..records import Quality, Spectrum, Weight
from .engine import Request, gap_at, residual_of

FORMAT = "spectune basis 1"
# An entry fits its weight when it leaves no more than this many times the residual noted in it, and a little
# roundoff: another machine multiplies in another order. Chosen; a foreign or damaged basis leaves 0.01 or more.
MORE_RESIDUAL = 4.0
# An entry says how accurate it is, and a hostile or damaged one may say anything: what a foreign basis leaves.
LARGEST_RESIDUAL = 0.01
ROUNDOFF_RESIDUAL = 1e-5


@dataclass(frozen=True, eq=False)
class Key:
    """A weight as the cache knows it: by its values, in the orientation that it has in memory."""

    identity: str
    stored: Weight
    transposed: bool

    @property
    def turned_weight(self) -> Weight:
        """The weight as out x in again."""
        return Weight(self.stored.name, self.stored.W_OI.mT) if self.transposed else self.stored

    @classmethod
    def of(cls, weight: Weight) -> Key:
        """Get the key of a weight, by reading all of it once.

        Half precision is read as the float32 that it equals, so a bfloat16 file finds its entry again when it is
        loaded as float32. A view that is contiguous only as W^T (transformers' Conv1D) is known as W^T, as the
        checkpoint stores it. `WeightError` for a weight without data.
        """
        W_OI = weight.W_OI
        transposed = W_OI.ndim == 2 and not W_OI.is_contiguous() and W_OI.mT.is_contiguous()
        stored_OI = W_OI.mT if transposed else W_OI
        lossless = stored_OI.dtype in (torch.float16, torch.bfloat16)
        identity = fingerprint(stored_OI.float() if lossless else stored_OI)
        return cls(identity, Weight(weight.name, stored_OI), transposed)


@dataclass(frozen=True)
class Entry:
    """One file of the cache, read from its header."""

    path: Path
    name: str
    """The name of the weight when it was stored; the same bytes may have other names."""
    shape: tuple[int, int]
    rank: int
    solver: str
    tolerance: float
    size: int
    used: float
    """When it was last served or stored, in seconds since 1970."""

    @classmethod
    def open(cls, path: Path) -> Entry:
        """Read one file; `AdapterError`, KeyError or ValueError for a damaged one."""
        file, status = TensorFile.open(path), path.stat()
        if file.metadata.get("kind") == BASIS_KIND:
            return cls._of_data(path, file)
        noted = _noted(file)
        (rows_O, R), (_, cols_I) = file.shapes["U_OR"], file.shapes["Vh_RI"]
        solver, tolerance = noted["solver"], float(noted["tolerance"])
        return cls(path, noted["name"], (rows_O, cols_I), R, solver, tolerance, status.st_size, status.st_mtime)

    @classmethod
    def _of_data(cls, path: Path, file: TensorFile) -> Entry:
        lefts, rights = ([s for n, s in file.shapes.items() if n.endswith(end)] for end in (".U_OR", ".Vh_RI"))
        name, directions, status = f"{len(lefts)} layers (largest sides)", file.metadata["directions"], path.stat()
        shape = max(rows_O for rows_O, _ in lefts), max(cols_I for _, cols_I in rights)
        return cls(path, name, shape, max(R for _, R in lefts), directions, 0.0, status.st_size, status.st_mtime)


def entry_name(key: Key, spectrum: Spectrum, request: Request) -> str:
    """Get the file name of an entry, below the folder of its first two digits."""
    what = f"{spectrum.columns} {request.dtype} {request.tolerance}"
    return f"{key.identity}-{hashlib.sha256(what.encode()).hexdigest()[:12]}.safetensors"


def write_entry(path: Path, key: Key, spectrum: Spectrum, request: Request) -> None:
    """Write the directions of a weight, completely or not at all; `OutputError` if that fails."""
    spectrum = turned_over(spectrum) if key.transposed else spectrum
    tensors = {"U_OR": spectrum.U_OR, "S_R": spectrum.S_R, "Vh_RI": spectrum.Vh_RI}
    tensors["columns"] = torch.tensor(spectrum.columns, dtype=torch.int64)
    noted = {name: str(value) for name, value in asdict(spectrum.quality).items() if name != "cached"}
    about = {"kind": FORMAT, "name": key.stored.name, "tolerance": str(request.tolerance)}
    save_tensors(path, tensors, about | noted)


def read_entry(path: Path, key: Key, places: tuple[int, ...], request: Request) -> Spectrum | None:
    """Get the chosen places from an entry, or None if it does not fit the request.

    It fits every choice inside its own leading directions, for the same dtype and any wider tolerance; `solver` must
    be "auto" or the one that ran. `AdapterError`, KeyError, ValueError or OSError if it is gone or damaged.
    """
    file = TensorFile.open(path)
    noted = _noted(file)
    coarse = noted["solver"] == "randomized" and float(noted["tolerance"]) > request.tolerance
    if file.dtypes["U_OR"] != request.dtype or request.solver not in ("auto", noted["solver"]) or coarse:
        return None
    columns = tuple(file.tensor("columns").tolist())
    if places != columns and not (_leading(columns) and max(places) < len(columns)):
        return None
    steps, gap = int(noted["steps"]), float(noted["gap"])
    quality = Quality(noted["solver"], float(noted["residual"]), float(noted["orthogonality"]), gap, steps, cached=True)
    U_OR, S_R, Vh_RI = (file.tensor(name) for name in ("U_OR", "S_R", "Vh_RI"))
    if places != columns:
        quality = replace(quality, gap=_gap_inside(S_R, gap, places, min(key.stored.W_OI.shape)))
        U_OR, S_R, Vh_RI = U_OR[:, list(places)], S_R[list(places)], Vh_RI[list(places)]
    spectrum = Spectrum(U_OR, S_R, Vh_RI.contiguous(), places, quality, key.stored.name)
    spectrum = spectrum.to(key.stored.W_OI.device)
    _check(spectrum, key.stored)
    return turned_over(spectrum) if key.transposed else spectrum


def is_outdone(path: Path, spectrum: Spectrum, request: Request) -> bool:
    """Ask whether the new entry contains this one, at least as accurately. Also true for a damaged entry."""
    try:
        file = TensorFile.open(path)
        same = file.dtypes["U_OR"] == request.dtype and float(_noted(file)["tolerance"]) >= request.tolerance
        return same and _leading(spectrum.columns) and set(file.tensor("columns").tolist()) <= set(spectrum.columns)
    except (AdapterError, KeyError, ValueError, OSError):
        return True


def turned_over(spectrum: Spectrum) -> Spectrum:
    """Get the spectrum of W^T, with canonical signs."""
    U_OR, Vh_RI = fix_signs(spectrum.Vh_RI.mT, spectrum.U_OR.mT)
    columns, quality = spectrum.columns, spectrum.quality
    return Spectrum(U_OR.contiguous(), spectrum.S_R, Vh_RI.contiguous(), columns, quality, spectrum.name)


def _noted(file: TensorFile) -> dict[str, str]:
    if file.metadata.get("kind") != FORMAT:
        raise ValueError(f"its kind is {file.metadata.get('kind')!r}, not {FORMAT!r}")
    U, S, Vh = (file.shapes[name] for name in ("U_OR", "S_R", "Vh_RI"))
    whole = len(U) == len(Vh) == 2 and (U[1],) == S == file.shapes["columns"] == Vh[:1] and U[1] > 0
    dtypes = {file.dtypes[name] for name in ("U_OR", "S_R", "Vh_RI")}
    if not whole or len(dtypes) > 1 or file.dtypes["columns"] != torch.int64:
        raise ValueError("its tensors do not match each other")
    if not 0 <= float(file.metadata["residual"]) <= LARGEST_RESIDUAL:
        raise ValueError(f"it claims a residual of {file.metadata['residual']!r}")
    return file.metadata


def _leading(columns: tuple[int, ...]) -> bool:
    return columns == tuple(range(len(columns)))


def _gap_inside(S_J: torch.Tensor, gap: float, places: tuple[int, ...], K: int) -> float:
    """Get the gap around a few of J leading places, a fraction of S[0]; the value after the last follows from `gap`."""
    values_J = S_J.double().cpu()
    if math.isfinite(gap):
        values_J = torch.cat([values_J, (values_J[-1:] - gap * values_J[0]).clamp_min(0)])
    return gap_at(values_J, places, K) / (float(values_J[0]) or 1.0)


def _check(spectrum: Spectrum, weight: Weight) -> None:
    """Raise ValueError when the directions are not singular directions of this weight."""
    if spectrum.U_OR.shape[0] != weight.W_OI.shape[0] or spectrum.Vh_RI.shape[1] != weight.W_OI.shape[1]:
        raise ValueError("its shape differs from the weight's")
    W_OI = weight.W_OI.to(spectrum.S_R)
    # As a fraction of |W|_F, which is known for bottom directions too; a foreign direction leaves about 1 / sqrt(K).
    residual = residual_of(W_OI, spectrum.U_OR, spectrum.S_R, spectrum.Vh_RI)
    residual /= float(torch.linalg.vector_norm(W_OI)) or 1.0
    allowed = MORE_RESIDUAL * spectrum.quality.residual + ROUNDOFF_RESIDUAL
    if not residual <= allowed:
        raise ValueError(f"its residual on {weight.name} is {residual:.1e}, more than {allowed:.1e}")
