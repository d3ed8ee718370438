"""A vocabulary that was resized for training: its rows, on their way into a LoRA or a merged checkpoint."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from ..checkpoint import CONFIG_LIMIT, PEFT_PREFIX, AdapterFolder, Checkpoint, load_auto, write_atomically
from ..checkpoint.live_names import LiveView
from ..checkpoint.reader import read_json
from ..errors import ExportError, SpectuneError

# What PEFT writes beside a module that is trained in full when it saves the embeddings too: the same numbers, and the
# base's, under the names of its wrapper.
WRAPPED = (".modules_to_save.", ".original_module.")


def carried_keys(folder: AdapterFolder) -> list[str]:
    """Get the tensors of an adapter's file beside its updates: what was trained in full, and resized embeddings."""
    skipped = (".spectune_adapter.", *WRAPPED)
    return [key for key in folder.names if not any(part in key for part in skipped)]


def embedding_paths(model: Any) -> list[str]:
    """Get the paths of a model's input embedding and output head, of those it has."""
    found = []
    for get in ("get_input_embeddings", "get_output_embeddings"):
        try:
            module = getattr(model, get)()
        except (AttributeError, NotImplementedError):  # not a model of words
            continue
        if getattr(getattr(module, "weight", None), "ndim", 0) == 2:  # vision models name their patches here
            found += [path for path, other in model.named_modules() if other is module][:1]
    return found


def carried_rows(folder: AdapterFolder, paths: list[str]) -> dict[str, int]:
    """Get path -> rows of the embeddings and heads that come with an adapter."""
    rows = {}
    for key in carried_keys(folder):
        name = key.removeprefix(PEFT_PREFIX).replace(".base_layer.", ".").removesuffix(".weight")
        if name in paths and len(folder.shapes[key]) == 2:
            rows[name] = folder.shapes[key][0]
    return rows


def resize_for(folder: AdapterFolder, model: Any) -> None:
    """Give a base the vocabulary that an adapter was trained with; `ExportError` where its rows are not all there."""
    paths = embedding_paths(model)
    rows = carried_rows(folder, paths)
    here = {path: int(model.get_submodule(path).weight.shape[0]) for path in paths}
    changed = sorted(path for path in rows if rows[path] != here[path])
    if not changed:
        return
    new = rows[changed[0]]
    missing = [path for path in paths if rows.get(path) != new]
    if missing:
        raise _incomplete(folder, new, missing[0], here[missing[0]])
    model.resize_token_embeddings(new, mean_resizing=False)


def _incomplete(folder: AdapterFolder, new: int, missing: str, rows: int) -> ExportError:
    leaf = missing.rpartition(".")[2]
    return ExportError(
        f"{folder.path}: the vocabulary was resized to {new} rows, but {missing} has {rows} in the base and is not in "
        f"the adapter. Train with {leaf!r} in modules_to_save, or save the adapter with save_embedding_layers=True."
    )


def resized_embeddings(model: nn.Module, base: str | None) -> dict[str, torch.Tensor]:
    """Get the embedding and the head of a live model, under PEFT's names, where its base has another vocabulary.

    As PEFT's own files have them. The base is a folder or a repository whose config is on this machine; nothing is
    found without one.
    """
    config: Any = getattr(model, "config", None)
    if not base or not isinstance(config, transformers.PreTrainedConfig):
        return {}
    try:
        said = load_auto(transformers.AutoConfig, base, local_files_only=True)
    except (OSError, ValueError, KeyError, SpectuneError):
        return {}
    if _size(said) == _size(config):
        return {}
    found = {}
    for path in embedding_paths(model):
        module: Any = model.get_submodule(path)
        for name, tensor in module.state_dict().items():
            if not any(part in f".{name}." for part in (".spectune_adapter.", *WRAPPED)):
                found[f"{PEFT_PREFIX}{path}.{name}"] = tensor
    return found


def _size(config: Any) -> int | None:
    return getattr(config.get_text_config(), "vocab_size", None)


def with_resized_bases(checkpoint: Checkpoint, folder: AdapterFolder, view: LiveView) -> Checkpoint:
    """Get the base with the resized weight of each adapted embedding that the adapter's file brings."""
    files: dict[str, Any] = dict(checkpoint.files)
    for key in carried_keys(folder):
        live = key.removeprefix(PEFT_PREFIX).replace(".base_layer.", ".")
        group = view.groups.get(live)
        if ".base_layer.weight" not in key or group is None or group.converter is not None:
            continue
        (stored,) = group.stored
        if folder.shapes[key] != checkpoint.shapes[stored]:
            files[stored] = _Brought(folder, key, stored, checkpoint.files[stored])
    return replace(checkpoint, files=files)


class _Brought:
    """A tensor of an adapter's file in the place of one of the base, in the base's dtype."""

    def __init__(self, folder: AdapterFolder, key: str, name: str, instead_of: Any) -> None:
        self.path: Path = instead_of.path
        self.shapes = {name: folder.shapes[key]}
        self.dtypes = {name: instead_of.dtypes[name]}
        self._folder, self._key = folder, key

    def tensor(self, name: str, device: torch.device | str = "cpu") -> torch.Tensor:
        return self._folder.tensor(self._key).to(device, self.dtypes[name])


def new_vocabulary(
    model: Any, base: Path, folder: AdapterFolder, rows: Mapping[str, tuple[int, ...]], options: Mapping[str, Any]
) -> int | None:
    """Get the rows of a merged model's vocabulary where they are not the base's; None where they are.

    `rows` are the shapes of what is written, by live names. `ExportError` for a tensor that would keep the old size.
    """
    paths = [f"{path}.weight" for path in embedding_paths(model)]
    old = _size(model.config)
    carried = {f"{path}.weight" for path in carried_rows(folder, [path.removesuffix(".weight") for path in paths])}
    sizes = [rows[path][0] for path in paths if path in rows and path in carried and rows[path][0] != old]
    before = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if not sizes or all(rows[path] == before[path] for path in carried if path in rows):
        return None
    new = sizes[0]
    config = type(model.config).from_pretrained(base, **options)
    config.get_text_config().vocab_size = new
    with torch.device("meta"):
        wanted = {name: tuple(tensor.shape) for name, tensor in type(model)(config).state_dict().items()}
    for name, shape in wanted.items():
        if name in rows and rows[name] != shape:
            raise _incomplete(folder, new, name.rpartition(".")[0], rows[name][0])
    return new


def write_vocabulary(base: Path, folder: Path, model: Any, size: int) -> None:
    """Write the size of the vocabulary into the config of a merged folder, at the place where its class has it."""
    path = folder / "config.json" if (folder / "config.json").exists() else base / "config.json"
    said = read_json(path, CONFIG_LIMIT)
    text = model.config.get_text_config()
    parts = [name for name in getattr(model.config, "sub_configs", {}) if getattr(model.config, name, None) is text]
    place = said.setdefault(parts[0], {}) if parts else said
    place["vocab_size"] = size
    write_atomically(folder / "config.json", json.dumps(said, indent=2, ensure_ascii=False) + "\n")
