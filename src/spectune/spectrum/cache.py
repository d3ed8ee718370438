"""`BasisCache`: singular directions on disk, looked up by the weight's bytes; an entry also serves smaller requests.

An entry is written completely or not at all, is checked against the weight whenever it is read, and may disappear at
any time: a faulty entry counts as a miss. So any number of processes may share one folder without a lock.
"""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import AdapterError, OptionError
from ..records import Spectrum
from .cache_folder import claim, entries_in, entries_of, halves_in, is_marked, make_shelf, refuse_foreign
from .data_spectra import DataSpectra
from .engine import Request, requested_places
from .entry import Entry, Key, entry_name, is_outdone, read_entry, write_entry

# Next to a model of the usual size this is little, and it holds r = 64 of a 70B model's linear layers. Chosen.
DEFAULT_LIMIT = 20 * 2**30
# What is half-written for so many seconds was left by a killed process; one entry takes a second to write. Chosen.
STALE_SECONDS = 600.0


@dataclass
class BasisCache:
    """A folder of singular directions; `writes` says whether what is missing there is added.

    Only what spectune has made is written into and deleted from: see `cache_folder`.
    """

    folder: Path
    writes: bool = True
    limit: int = field(default_factory=lambda: size_limit())
    _total: int | None = field(default=None, repr=False)
    _claimed: bool = field(default=False, repr=False)

    def claim(self) -> None:
        """See that the folder may be written, and make it where it is missing; `OutputError` for a foreign folder."""
        if self.writes and not self._claimed:
            claim(self.folder)
            self._claimed = True

    def find(self, key: Key, request: Request) -> Spectrum | None:
        """Get the requested directions of a weight from the disk, or None. A damaged entry is a miss with a warning."""
        places = requested_places(key.turned_weight, request)
        for path in sorted(self._paths_of(key)):
            try:
                spectrum = read_entry(path, key, places, request)
            except (AdapterError, KeyError, ValueError, OSError) as error:
                if path.exists():  # else another process has just made room
                    _warn_once(path, str(error))
                continue
            if spectrum is not None:
                with suppress(OSError):
                    os.utime(path)
                return spectrum
        return None

    def store(self, key: Key, spectrum: Spectrum, request: Request) -> None:
        """Add the directions of a weight; smaller entries that they contain are removed. `OutputError` if it fails.

        A result that did not converge, or that is larger than the whole limit, is not stored.
        """
        size = sum(tensor.nbytes for tensor in (spectrum.U_OR, spectrum.S_R, spectrum.Vh_RI))
        if not self.writes or not spectrum.quality.converged or size > self.limit:
            return
        self.claim()
        outdone = [path for path in self._paths_of(key) if is_outdone(path, spectrum, request)]
        path = self.folder / key.identity[:2] / entry_name(key, spectrum, request)
        make_shelf(path.parent)
        write_entry(path, key, spectrum, request)
        for old in outdone:
            if old != path:
                old.unlink(missing_ok=True)
        self._make_room(_size(path))

    def find_data(self, question: str) -> DataSpectra | None:
        """Get the directions of data that are stored for a question (64 hex digits), or None."""
        for path in sorted(entries_of(self.folder, question)):
            try:
                found = DataSpectra.read(path)
                if path.name != _data_name(question, found):
                    raise AdapterError("its contents are not those that its name says")
            except (AdapterError, OSError) as error:
                if path.exists():
                    _warn_once(path, str(error))
                continue
            with suppress(OSError):
                os.utime(path)
            return found
        return None

    def store_data(self, question: str, found: DataSpectra) -> None:
        """Add directions of data under what they were found for; `OutputError` if it fails."""
        if not self.writes or sum(tensor.nbytes for tensor in found.tensors.values()) > self.limit:
            return
        self.claim()
        path = self.folder / question[:2] / _data_name(question, found)
        make_shelf(path.parent)
        self._make_room(_size(found.save(path)))

    def entries(self) -> Iterator[Entry]:
        """Get all entries, the least recently used first; damaged files are skipped with a warning."""
        for path in sorted(self._files(), key=_used):
            try:
                yield Entry.open(path)
            except (AdapterError, KeyError, ValueError, OSError) as error:
                _warn_once(path, str(error))

    def clear(self) -> tuple[int, int]:
        """Delete every entry; get their number and bytes. `OutputError` for a folder that is not a cache."""
        if self.folder.is_dir() and not is_marked(self.folder):
            refuse_foreign(self.folder)
        count = size = 0
        for path in self._files():
            with suppress(FileNotFoundError):
                size += path.stat().st_size
                path.unlink()
                count += 1
        self._remove_left()
        self._total = 0
        return count, size

    def _files(self) -> list[Path]:
        return list(entries_in(self.folder))

    def _remove_left(self) -> None:
        for left in halves_in(self.folder):
            with suppress(OSError):
                if time.time() - left.stat().st_mtime > STALE_SECONDS:
                    left.unlink()

    def _paths_of(self, key: Key) -> list[Path]:
        return entries_of(self.folder, key.identity)

    def _make_room(self, added: int) -> None:
        """Delete the least recently used entries beyond the limit, and what killed processes left."""
        self._total = None if self._total is None else self._total + added
        if self._total is not None and self._total <= self.limit:
            return
        self._remove_left()
        files = sorted(self._files(), key=_used)
        sizes = [_size(path) for path in files]
        self._total = sum(sizes)
        for path, size in zip(files, sizes, strict=True):
            if self._total <= self.limit:
                break
            path.unlink(missing_ok=True)
            self._total -= size


def open_cache(cache_dir: str | Path | None = None) -> BasisCache | None:
    """Get the cache that `svd.cache_dir` names: a folder is read and written, "off" means no cache.

    None: the folder that `spectune decompose` fills is read if it exists, and nothing is written.
    """
    if cache_dir is None:
        folder = default_folder()
        return BasisCache(folder, writes=False) if folder.is_dir() else None
    return None if str(cache_dir) == "off" else BasisCache(Path(cache_dir).expanduser())


def default_folder() -> Path:
    """Get where `spectune decompose` stores: SPECTUNE_CACHE, or spectune/bases in the user's cache folder."""
    if named := os.environ.get("SPECTUNE_CACHE"):
        return Path(named).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "spectune" / "bases"


def size_limit() -> int:
    """Get the largest size of a cache in bytes: SPECTUNE_CACHE_LIMIT such as "5GiB", or 20 GiB."""
    return parse_bytes(os.environ.get("SPECTUNE_CACHE_LIMIT") or str(DEFAULT_LIMIT))


def parse_bytes(words: str) -> int:
    """Get a number of bytes from words such as "512MiB", "4 GB" or "1000000"; `OptionError` for anything else."""
    from pydantic import (  # here: `import spectune` loads nothing that PEFT does not
        ByteSize,
        TypeAdapter,
        ValidationError,
    )

    try:
        return int(TypeAdapter(ByteSize).validate_python(words.strip()))
    except ValidationError:
        raise OptionError(
            f"{words!r} is not a size. Give bytes, or a number with a unit such as MB, GB, MiB or GiB."
        ) from None


def _data_name(question: str, found: DataSpectra) -> str:
    return f"{question}-{found.identity[:12]}.safetensors"


def _used(path: Path) -> float:
    with suppress(FileNotFoundError):
        return path.stat().st_mtime
    return 0.0


def _size(path: Path) -> int:
    with suppress(FileNotFoundError):
        return path.stat().st_size
    return 0


_WARNED: set[Path] = set()


def _warn_once(path: Path, why: str) -> None:
    if path not in _WARNED:
        _WARNED.add(path)
        warnings.warn(f"{path}: damaged cache entry ignored: {why}. The directions are computed again.", stacklevel=4)
