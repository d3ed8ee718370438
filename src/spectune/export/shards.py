"""`write_shards`: every file of a base checkpoint again, with other tensors in it, and an index over all of them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from ..checkpoint import Checkpoint, save_tensors, write_atomically
from ..checkpoint.live_names import LiveView
from ..checkpoint.reader import STEMS, read_json
from ..checkpoint.stacks import Read as Read
from ..checkpoint.tensor_file import HEADER_LIMIT


def stored_changes(view: LiveView, changed: Mapping[str, Read], scratch: Path) -> dict[str, Read]:
    """Get stored name -> its new tensor, from live names and theirs; what is split or joined waits in `scratch`."""
    found = {name: read for name, read in changed.items() if name not in view.groups}
    for place, (group, names) in enumerate(view.stored(set(changed))):
        if group.converter is None:
            found[group.stored[0]] = changed[group.first]
            continue
        tensors = {name: changed[name]() if name in changed else view.checkpoint.tensor(name) for name in names}
        path = scratch / f"joined-{place}.safetensors"
        stored = group.to_stored(tensors)
        save_tensors(path, stored)
        found |= {name: reader(path, name) for name in stored}
    return found


def reader(path: Path, name: str) -> Read:
    """Get a function that reads one tensor of a file."""
    from ..checkpoint import open_checkpoint

    return lambda: open_checkpoint(path).tensor(name)


def write_shards(
    checkpoint: Checkpoint, changed: Mapping[str, Read], names: Mapping[str, str | None], target: Path
) -> None:
    """Write the files of a checkpoint with the changed tensors in place of the old; new ones go into the last file.

    `names` says under which name a stored tensor is written; None leaves it out.
    """
    files = sorted({file.path for file in checkpoint.files.values()})
    shards: dict[str, str] = {}
    size = count = 0
    for path in files:
        stored = [name for name, file in checkpoint.files.items() if file.path == path]
        if path == files[-1]:
            stored += sorted(changed.keys() - checkpoint.files.keys())
        tensors = {}
        for name in stored:
            written = names.get(name, name)
            if written is not None:
                tensors[written] = changed[name]() if name in changed else checkpoint.tensor(name)
        goal = path.relative_to(checkpoint.path) if checkpoint.path.is_dir() else Path(path.name)
        (target / goal).parent.mkdir(parents=True, exist_ok=True)  # shards in folders of their own may bear equal names
        save_tensors(target / goal, tensors)
        shards |= dict.fromkeys(tensors, goal.as_posix())
        size += sum(tensor.nbytes for tensor in tensors.values())
        count += sum(tensor.numel() for tensor in tensors.values())
    if (index := _index(checkpoint.path)) is not None:
        told = read_json(index, HEADER_LIMIT).get("metadata")
        sums = {"total_size": size, "total_parameters": count}  # the second is told by newer transformers only
        told = told if isinstance(told, dict) else {}
        told = told | {key: value for key, value in sums.items() if key in told or key == "total_size"}
        content = json.dumps({"metadata": told, "weight_map": shards}, indent=2, sort_keys=True) + "\n"
        write_atomically(target / index.name, content)


def _index(base: Path) -> Path | None:
    """Get the index file of the base, or None if it is a single file."""
    for stem in STEMS if base.is_dir() else ():
        if (base / f"{stem}.safetensors").exists():
            return None
        if (base / f"{stem}.safetensors.index.json").exists():
            return base / f"{stem}.safetensors.index.json"
    return None
