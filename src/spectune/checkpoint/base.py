"""`find_base`: the files of a base model, by the name that a user gave or an adapter's config contains."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field, replace
from pathlib import Path

from ..errors import AdapterError, one_line
from .adapter_folder import CONFIG_FILE, AdapterFolder
from .reader import Checkpoint, open_checkpoint
from .run_folder import model_in

# Downloaded from a repository: weights that are not pickles, configs and tokenizers. Not its subfolders, and not the
# second copy of the weights that Mistral's and Meta's repositories have for their own code.
WANTED = ["*.safetensors", "*.json", "*.jinja", "*.model", "vocab.txt", "merges.txt"]
UNWANTED = ["*/*", "consolidated*.safetensors"]
# Any of these leads to the folder of a cached repository.
CACHED_FILES = ("config.json", "model.safetensors", "model.safetensors.index.json")
# The check of huggingface_hub (utils/_validators.py), which does not export it.
HUB_NAME = re.compile(r"(\w[\w.-]{0,95}/)?\w[\w.-]{0,95}", re.ASCII)
REMEDY = "Pass --base with a folder, a safetensors or GGUF file, or a hub name."


@dataclass(frozen=True)
class Base:
    """A base model on this disk; its tensors are not read yet."""

    name: str
    """The name given for it, as adapter configs contain it."""
    path: Path
    """A folder, a safetensors file or a GGUF file."""
    checkpoint: Checkpoint = field(repr=False)
    revision: str | None = None
    """Revision of a hub name; None for the main one, and for a folder or a file."""
    from_hub: bool = False

    @property
    def gguf(self) -> Path | None:
        """Its GGUF file; None for safetensors."""
        return next((file.path for file in self.checkpoint.files.values() if file.path.suffix == ".gguf"), None)

    @property
    def config_folder(self) -> Path:
        """The folder where its config.json would be: the base itself, or the folder of its file."""
        return self.path if self.path.is_dir() else self.path.parent

    @property
    def model_folder(self) -> Path:
        """The folder of the whole model: also of a file that is the only one beside a config.json; else the path."""
        beside = self.config_folder
        weights = [path for path in beside.iterdir() if path.suffix in (".safetensors", ".gguf")]
        return beside if self.path.is_dir() or ((beside / "config.json").is_file() and len(weights) == 1) else self.path


@dataclass(frozen=True)
class _Asked:
    """The name of the model to find, and who gave it."""

    name: str
    revision: str | None
    adapter: Path | None
    said: bool
    """True if the user named it; False for an adapter's config, which may come from anybody."""

    def refuse(self, why: str, remedy: str | None = None) -> AdapterError:
        """Get the error that says which base was not found, and why."""
        at = f" (revision {self.revision})" if self.revision else ""
        if self.said:
            role = f"as the base of {self.adapter}, " if self.adapter else ""
            return AdapterError(f"{self.name}{at}: {role}a model is needed, but {why}. {remedy or 'Check the name.'}")
        return AdapterError(
            f"{self.adapter}: its config names the base {self.name!r}{at}, but {why}. {remedy or REMEDY}"
        )


def find_base(said: str | Path | None, adapter: AdapterFolder | None = None) -> Base:
    """Get a model's files by the name that the user gave, else by the one in the adapter's config.

    A name is, in this order: a folder (also of a run with adapter: none), a safetensors or GGUF file; a hub name in
    the local cache; a hub name that is downloaded now, unless HF_HUB_OFFLINE is set. A relative path starts at the
    working directory, as in transformers, and never at the adapter's folder. A hub name has the adapter's revision
    if the adapter names that model. Only headers are read. `AdapterError` says where the model was looked for, or
    why it cannot be used: pickled weights are never read.
    """
    asked = _asked(said, adapter)
    found = _on_disk(asked) or _cached(asked)[0]
    return found or _downloaded(asked)


def base_at_hand(adapter: AdapterFolder) -> Base | None:
    """Get the base that an adapter's config names, or None if it is not on this disk. Downloads nothing."""
    if not adapter.base_name:
        return None
    asked = _asked(None, adapter)
    return _on_disk(asked) or _cached(asked)[0]


def model_at_hand(name: str, commit: str | None = None) -> Base | None:
    """Get the files of a model that was loaded by this name (and commit of the hub), or None if they are not here.

    Downloads nothing, and unreadable files count as none.
    """
    asked = _Asked(name, commit, None, True)
    try:
        return _on_disk(asked) or _cached(asked)[0]
    except AdapterError:
        return None


def _asked(said: str | Path | None, adapter: AdapterFolder | None) -> _Asked:
    named, place = ("", None) if adapter is None else (adapter.base_name, adapter.path)
    name = named if said is None else str(said.as_posix() if isinstance(said, Path) else os.path.expanduser(said))
    if not name:
        why = "the name is empty" if place is None or said is not None else "its config does not name its base model"
        raise AdapterError(f"{place or 'base'}: {why}. {REMEDY}")
    revision = None if adapter is None or name != named else adapter.config.get("revision")
    asked = _Asked(name, None, place, said is not None)
    if revision and (not isinstance(revision, str) or not revision.isprintable() or _leaves(revision)):
        raise asked.refuse(f"{str(revision)[:100]!r} is not a valid revision")
    return replace(asked, revision=revision or None)


def _leaves(revision: str) -> bool:
    """Ask whether a revision, which becomes part of a path in the cache, would lead outside it."""
    return ".." in revision or os.path.isabs(revision) or "\\" in revision


def _on_disk(asked: _Asked) -> Base | None:
    name = asked.name
    # On Windows, merely checking for \\host\share signs in there, and a stranger's config may name any host.
    if (not asked.said and name.startswith(("\\\\", "//"))) or not os.path.exists(name):
        return None
    path = model_in(name)
    if not os.path.exists(path / "config.json") and os.path.exists(path / CONFIG_FILE):
        raise asked.refuse("this is an adapter and not a model", REMEDY)
    name = name if path == Path(name) else str(path)
    try:
        return Base(name, path, open_checkpoint(path))
    except AdapterError as error:
        if asked.said:
            raise
        raise AdapterError(
            f"{asked.adapter}: its config names the base {name!r}, which cannot be used: {error}"
        ) from error


def _cached(asked: _Asked) -> tuple[Base | None, str]:
    """Get the model in the local cache, or None and the reason."""
    from huggingface_hub import constants, try_to_load_from_cache

    folder: Path | None = None
    for file in CACHED_FILES:
        try:
            found = try_to_load_from_cache(asked.name, file, revision=asked.revision)
        except (OSError, ValueError):  # not a possible name on the hub or the disk
            break
        if isinstance(found, str):
            folder = Path(found).parent
            break
    if folder is None:
        return None, f"not in the cache {constants.HF_HUB_CACHE}"
    try:
        return Base(asked.name, folder, open_checkpoint(folder), asked.revision, from_hub=True), ""
    except AdapterError as error:  # only a config, missing shards, pickles
        return None, f"not usable in the cache ({str(error).rstrip('.')})"


def _downloaded(asked: _Asked) -> Base:
    from huggingface_hub import constants, snapshot_download

    place = os.path.abspath(asked.name)
    here = "no such folder or file" if place == asked.name else f"no folder or file {place}"
    if not HUB_NAME.fullmatch(asked.name) or "--" in asked.name or ".." in asked.name:
        raise asked.refuse(f"there is {here}, and it is not a hub name either")
    looked = f"there is {here}, it is {_cached(asked)[1]}"
    if constants.HF_HUB_OFFLINE:
        raise asked.refuse(f"{looked}, and HF_HUB_OFFLINE is set, so the hub was not asked")
    try:
        folder = Path(
            snapshot_download(asked.name, revision=asked.revision, allow_patterns=WANTED, ignore_patterns=UNWANTED)
        )
    except Exception as error:  # from the hub, its client or the disk
        answer = f"{type(error).__name__}: {one_line(error)}"
        raise asked.refuse(f"{looked}, and it cannot be downloaded: {answer}") from error
    try:
        return Base(asked.name, folder, open_checkpoint(folder), asked.revision, from_hub=True)
    except AdapterError as error:
        raise asked.refuse(
            f"its repository has no readable safetensors, and pickled weights (.bin) are never read: {error}"
        ) from error
