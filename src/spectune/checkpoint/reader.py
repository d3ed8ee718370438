"""Lazy reading of models: names, shapes and dtypes from the headers, one tensor at a time from the disk.

Nothing is unpickled: `.bin` and `.pt` files are refused, because reading one runs code in it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

import torch

from ..errors import AdapterError, nearest
from .gguf_file import GgufFile
from .tensor_file import HEADER_LIMIT, TensorFile

# File names of a model in transformers and diffusers, in search order.
STEMS = ("model", "diffusion_pytorch_model")
PICKLES = (".bin", ".pt", ".pth", ".ckpt")


class LazyFile(Protocol):
    """A file whose names, shapes and dtypes are known and whose tensors stay on the disk."""

    @property
    def path(self) -> Path: ...
    @property
    def shapes(self) -> dict[str, tuple[int, ...]]: ...
    @property
    def dtypes(self) -> dict[str, torch.dtype]: ...
    def tensor(self, name: str, device: torch.device | str = "cpu") -> torch.Tensor: ...


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of a model in one or several files, read one at a time."""

    path: Path
    files: dict[str, LazyFile] = field(repr=False)
    """Tensor name -> the file that holds it."""

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The names of the tensors, sorted."""
        return tuple(sorted(self.files))

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Tensor name -> shape, without reading the tensors."""
        return {name: file.shapes[name] for name, file in self.files.items()}

    @cached_property
    def dtypes(self) -> dict[str, torch.dtype]:
        """Tensor name -> dtype, without reading the tensors."""
        return {name: file.dtypes[name] for name, file in self.files.items()}

    @property
    def parts(self) -> int:
        """How many tensors there are, each matrix of a stack (experts) by itself."""
        return sum(shape[0] if len(shape) == 3 else 1 for shape in self.shapes.values())

    def tensor(self, name: str, device: torch.device | str = "cpu") -> torch.Tensor:
        """Read one tensor; `AdapterError` names similar tensors if this one is missing."""
        if name not in self.files:
            raise AdapterError(f"{self.path}: the tensor {name!r} does not exist. {nearest(name, self.names)}")
        return self.files[name].tensor(name, device)

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Read the tensors one after the other, file by file."""
        for name in sorted(self.files, key=lambda name: (str(self.files[name].path), name)):
            yield name, self.tensor(name)


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Get the tensors of a model folder (single file or shards with an index), of one safetensors or one GGUF file.

    Only headers are read; GGUF tensors have transformers' names and are dequantised when they are read.
    `AdapterError` for a path that is not a model, for tensors in an index that no file has, and for pickles.
    """
    path = Path(path)
    if path.suffix in PICKLES:
        raise AdapterError(f"{path}: {_why_no_pickle(path.name)}")
    if os.path.isfile(path):
        return _of_gguf(path, path) if path.suffix == ".gguf" else _of_one_file(path, path)
    if not os.path.isdir(path):
        raise AdapterError(f"{path}: no such model folder or safetensors file. Check the path.")
    for stem in STEMS:
        if (path / f"{stem}.safetensors").exists():
            return _of_one_file(path, path / f"{stem}.safetensors")
        if (path / f"{stem}.safetensors.index.json").exists():
            return _of_shards(path, path / f"{stem}.safetensors.index.json")
    if not any(path.glob("*.safetensors")) and len(ggufs := sorted(path.glob("*.gguf"))) == 1:
        return _of_gguf(path, ggufs[0])
    return _of_one_file(path, _only_file(path))


def read_json(path: Path, limit: int) -> dict[str, Any]:
    """Get the object in a JSON file of at most `limit` bytes; `AdapterError` for anything else."""
    if not os.path.isfile(path):
        why = "this is not a regular file" if os.path.exists(path) else "there is no such file"
        raise AdapterError(f"{path}: a JSON file is needed, but {why}. Check the path.")
    size = path.stat().st_size
    if size > limit:
        raise AdapterError(f"{path}: {size:,} bytes are too many for this kind of file (limit {limit:,}). Check it.")
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise AdapterError(f"{path}: cannot read the file: {error.strerror}. Check its permissions.") from error
    except (ValueError, RecursionError) as error:
        raise AdapterError(f"{path}: the file is not valid JSON: {error}. Copy it again.") from error
    if not isinstance(content, dict):
        raise AdapterError(f"{path}: a JSON object is needed, but this is a {type(content).__name__}. Copy it again.")
    return content


def _of_one_file(path: Path, file_path: Path) -> Checkpoint:
    file = TensorFile.open(file_path)
    return Checkpoint(path, dict.fromkeys(file.shapes, file))


def _of_gguf(path: Path, file_path: Path) -> Checkpoint:
    gguf = GgufFile.open(file_path)
    return Checkpoint(path, dict.fromkeys(gguf.shapes, gguf))


def _of_shards(path: Path, index: Path) -> Checkpoint:
    weight_map = read_json(index, HEADER_LIMIT).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise AdapterError(f"{index}: the index has no weight_map from tensor names to files. Copy it again.")
    for shard in set(weight_map.values()):
        place = PurePosixPath(shard.replace("\\", "/"))
        if place.is_absolute() or ".." in place.parts or ":" in shard or not shard or not shard.isprintable():
            raise AdapterError(
                f"{index}: the index names the file {shard!r}, which is outside its folder. Do not use it."
            )
    shards = {shard: TensorFile.open(path / shard) for shard in sorted(set(weight_map.values()))}
    for name, shard in weight_map.items():
        if name not in shards[shard].shapes:
            raise AdapterError(
                f"{index}: the index lists the tensor {name!r} in {shard}, which does not contain it. "
                f"Copy the index and the files again, all from one version of the model."
            )
    return Checkpoint(path, {name: shards[shard] for name, shard in weight_map.items()})


def _only_file(path: Path) -> Path:
    found = sorted(path.glob("*.safetensors"))
    if len(found) == 1:
        return found[0]
    if found:
        raise AdapterError(f"{path}: contains {len(found)} safetensors files and no index. Name one of them.")
    pickles = [file.name for file in sorted(path.iterdir()) if file.suffix in PICKLES]
    raise AdapterError(
        f"{path}: {_why_no_pickle(pickles[0])}"
        if pickles
        else f"{path}: a model is needed, but this folder contains no safetensors file. Check the path."
    )


def _why_no_pickle(name: str) -> str:
    return f"{name} is a pickle, and reading it would run code in it. Save the model as safetensors instead."
