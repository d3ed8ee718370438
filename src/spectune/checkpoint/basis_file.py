"""A basis file: the singular directions of many layers in one safetensors file, which many adapters share.

It holds the tensors that an adapter's own file would hold, under the same names. An adapter that shares it has only the
identity of its contents in its config, and it is looked for by that beside the adapter.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch

from ..errors import AdapterError
from .fingerprint import fingerprint
from .tensor_file import TensorFile

# Begins as every kind of file in the cache of bases does.
BASIS_KIND = "spectune basis of data 1"
IDENTITY = re.compile("[0-9a-f]{64}")
# Digits of the identity in the name of a file: two of a million files have the same ones with a chance of 1 in 10^7.
DIGITS = 16
# A basis lies beside the adapter, beside its run, or beside the folder of the run.
FOLDERS_ABOVE = 2


def basis_identity(tensors: Mapping[str, torch.Tensor]) -> str:
    """Get 64 hex digits, equal for equal tensors under equal names."""
    lines = [f"{name} {fingerprint(tensor)}\n" for name, tensor in sorted(tensors.items())]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def basis_name(identity: str) -> str:
    """Get the name of a basis file."""
    return f"basis-{identity[:DIGITS]}.safetensors"


def open_basis(path: str | Path) -> TensorFile:
    """Open a basis file; `AdapterError` for any other file."""
    file = TensorFile.open(path)
    if file.metadata.get("kind") != BASIS_KIND:
        raise AdapterError(f"{path}: this is not a basis file. Write one with spectune.prepare(…, save=FOLDER).")
    return file


def basis_beside(adapter: Path, identity: str) -> TensorFile | None:
    """Get the basis file of this name next to an adapter's folder, or None; what it holds is not looked at."""
    for folder in _folders(adapter):
        if (path := folder / basis_name(identity)).is_file():
            return open_basis(path)
    return None


def checked_tensors(file: TensorFile, identity: str) -> dict[str, torch.Tensor]:
    """Get the tensors of a basis file; `AdapterError` unless they have this identity."""
    tensors = {name: file.tensor(name) for name in file.names}
    if basis_identity(tensors) != identity:
        raise AdapterError(f"{file.path}: the adapter shares another basis, {basis_name(identity)}. Use that file.")
    return tensors


def no_basis(adapter: object, identity: str) -> AdapterError:
    """Get the error for an adapter without its basis."""
    return AdapterError(
        f"{adapter}: this adapter shares the basis {basis_name(identity)}, and the file is not beside it. Copy it "
        f"there, or in Python name it: SpectralConfig.from_pretrained(…, basis=FILE)."
    )


def shared_identity(config: Mapping[str, object]) -> str | None:
    """Get the identity of the basis that a saved adapter shares, or None; `AdapterError` for anything else in there."""
    found = config.get("basis_id")
    if found is not None and (not isinstance(found, str) or IDENTITY.fullmatch(found) is None):
        raise AdapterError(f"adapter_config.json: basis_id={str(found)[:80]!r} is not 64 hex digits. Copy it again.")
    return found


def _folders(adapter: Path) -> Iterable[Path]:
    return [adapter, *adapter.resolve().parents[:FOLDERS_ABOVE]]
