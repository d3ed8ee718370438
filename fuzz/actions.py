"""What is killed: training, saving, exporting, merging, decomposing, fusing and extracting on tiny models.

Each action writes `folder/out`, starts from what stood there before, and says what may stand there afterwards.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from peft import get_peft_model

import spectune
from spectune.checkpoint import find_targets, fresh_folder, open_checkpoint, read_adapter_folder
from spectune.extraction import extract_adapter
from spectune.recipes import parse_config
from spectune.runs import run
from spectune.spectrum import BasisCache, Request, fill_cache
from spectune.spectrum.cache_folder import MARKER
from spectune.training.checkpoints import save_whole

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests.recipes import tiny

STEPS = 4
Tree = dict[str, str]
"""Path below a folder -> SHA-256 of the file; hidden things left out."""


@dataclass(frozen=True)
class Action:
    """Something that writes `folder/out`."""

    name: str
    act: Callable[[World, Path], None]
    before: Callable[[World, Path], None] = lambda world, folder: None
    whole: bool = True
    """What stands in `out` is the old or the new tree; else each file is judged by itself."""


@dataclass(frozen=True)
class World:
    """The folders that the actions read and must never change."""

    path: Path

    @property
    def base(self) -> Path:
        return self.path / "base"

    @property
    def tuned(self) -> Path:
        return self.path / "tuned"

    def adapter(self, name: str) -> Path:
        return self.path / "adapters" / name

    def training(self) -> dict[str, Any]:
        return {
            "recipe": "text_classification",
            "model": str(self.path / "bert"),
            "adapter": {"method": "spectral_a", "r": 2, "target_modules": ["query", "value"]},
            "data": {"train": str(self.path / "rows.jsonl"), "validation": str(self.path / "rows.jsonl")},
            "training": {
                "steps": STEPS, "batch_size": 4, "learning_rate": 1e-2, "save_every": 1, "keep_checkpoints": 2,
            },
        }  # fmt: skip


def make_world(path: Path) -> World:
    """Write models, data and adapters; deterministic, and without a backward pass."""
    world = World(path)
    path.mkdir()
    tiny.bert(path / "bert")
    tiny.reviews(path / "rows.jsonl", 8)
    tiny.llama(path / "whole")
    model = tf.AutoModelForCausalLM.from_pretrained(path / "whole")
    model.save_pretrained(world.base, max_shard_size="20KB")
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.01 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)))
    model.save_pretrained(world.tuned)
    for seed, (name, start) in enumerate({"old": 0, "new": 0, "other": 2}.items()):
        adapted(world, seed, start).save_pretrained(str(world.adapter(name)))
    spectune.export_lora(
        world.adapter("old"), path / "old-lora", base_model=str(world.base), check_logits=False, overwrite=True
    )
    spectune.merge_checkpoint(world.base, world.adapter("old"), path / "old-merged")
    spectune.fuse([world.adapter("old")], base=world.base).save(path / "old-fused")
    list(_fill(world, path / "old-cache", "q_proj"))
    return world


def adapted(world: World, seed: int, start: int) -> Any:
    """Get a model with an adapter whose numbers stand for trained ones."""
    config = spectune.SpectralConfig(
        method="spectral_a", columns=[start, start + 1], r=2, target_modules=["q_proj", "v_proj"], save_basis="always",
        task_type="CAUSAL_LM",
    )  # fmt: skip
    model = get_peft_model(tf.AutoModelForCausalLM.from_pretrained(world.base), config)
    draw = torch.Generator().manual_seed(seed)
    for weight in model.parameters():
        if weight.requires_grad:
            weight.data += 0.01 * torch.randn(weight.shape, generator=draw)
    return model


def _train(world: World, folder: Path) -> None:
    run(parse_config(world.training()), folder / "out", resume=True)


def _stopped(world: World, folder: Path) -> None:
    shutil.copytree(world.path / "stopped", folder / "out")


def _two_checkpoints(world: World, folder: Path) -> None:
    for name in ("checkpoint-1", "checkpoint-2"):
        shutil.copytree(world.path / "kept" / "checkpoints" / name, folder / "out" / "checkpoints" / name)


def _checkpoint(world: World, folder: Path) -> None:
    """Write one checkpoint of a run as the loop does, without the training; the oldest goes."""
    name, checkpoints = "checkpoint-3", folder / "out" / "checkpoints"

    def write() -> None:
        shutil.copytree(world.path / "kept" / "checkpoints" / name, checkpoints / ".partial" / name)

    save_whole(checkpoints, name, write, 2, lambda: None, True)


def _save(world: World, folder: Path) -> None:
    with fresh_folder(folder / "out", overwrite=True) as partial:
        adapted(world, 1, 0).save_pretrained(str(partial))


def _save_plainly(world: World, folder: Path) -> None:
    adapted(world, 1, 0).save_pretrained(str(folder / "out"))


def _export(world: World, folder: Path) -> None:
    spectune.export_lora(
        world.adapter("new"), folder / "out", base_model=str(world.base), check_logits=False, overwrite=True
    )


def _merge(world: World, folder: Path) -> None:
    spectune.merge_checkpoint(world.base, world.adapter("new"), folder / "out", overwrite=True)


def _fuse(world: World, folder: Path) -> None:
    adapters = [world.adapter("new"), world.adapter("other")]
    spectune.fuse(adapters, base=world.base).save(folder / "out", overwrite=True)


def _extract(world: World, folder: Path) -> None:
    extract_adapter(world.base, world.tuned, folder / "out", rank=2)


def _decompose(world: World, folder: Path) -> None:
    list(_fill(world, folder / "out", "q_proj|k_proj|v_proj|o_proj"))


def _fill(world: World, folder: Path, include: str) -> Any:
    checkpoint = open_checkpoint(world.base)
    targets, _ = find_targets(checkpoint, include=include)
    # One weight at a time, so that the rest is found in the same way, whatever was stored before.
    for target in targets:
        yield from fill_cache(checkpoint, [target], Request(4), BasisCache(folder))


def _from(name: str) -> Callable[[World, Path], None]:
    return lambda world, folder: shutil.copytree(world.path / name, folder / "out") and None


ACTIONS = {
    action.name: action
    for action in (
        Action("train", _train, whole=False),
        Action("resume", _train, _stopped, whole=False),
        Action("checkpoint", _checkpoint, _two_checkpoints, whole=False),
        Action("save", _save, _from("adapters/old")),
        Action("save_plainly", _save_plainly, _from("adapters/old")),
        Action("export_lora", _export, _from("old-lora")),
        Action("merge", _merge, _from("old-merged")),
        Action("fuse", _fuse, _from("old-fused")),
        Action("extract", _extract),
        Action("decompose", _decompose, _from("old-cache"), whole=False),
    )
}
# PEFT's own way of saving, which is not ours to mend: counted, and not held against us.
FOREIGN = ("save_plainly",)


def tree(folder: Path) -> Tree:
    """Get the hashes of all files that do not stand below a hidden name."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(_content(path)).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    }


def _content(path: Path) -> bytes:
    """Get a file's bytes; of tensors with the header in one order, as safetensors shuffles its metadata."""
    data = path.read_bytes()
    if path.suffix != ".safetensors":
        return data
    try:
        length = int.from_bytes(data[:8], "little")
        return json.dumps(json.loads(data[8 : 8 + length]), sort_keys=True).encode() + data[8 + length :]
    except ValueError:
        return data  # broken, and equal to no whole file


def hidden(folder: Path) -> int:
    """Get how many hidden things lie around, each with what is in it counted as one."""
    found = [path.relative_to(folder).parts for path in folder.rglob(".*")]
    return sum(
        not any(part.startswith(".") for part in parts[:-1]) and parts[-1] not in (".lock", MARKER) for parts in found
    )


def told(folder: Path) -> dict[str, Any]:
    """Get what a finished run found out, without its times."""
    values: dict[str, Any] = json.loads((folder / "result.json").read_text())
    return {name: values[name] for name in ("metrics", "losses", "learning_rate", "trainable", "head", "file_bytes")}


def broken(action: Action, out: Path, old: Tree, new: Tree) -> str | None:
    """Get what is wrong with what stands under its final name, or None."""
    found = tree(out)
    if action.whole:
        return None if found in (old, new) else f"neither the old nor the new: {sorted(found)}"
    if missing := [name for name in old if name not in found and not _may_go(name, new)]:
        return f"lost: {missing[0]}"
    for name, digest in found.items():
        if name == "result.json":
            told(out)
        elif digest not in (old.get(name), new.get(name)):
            return f"another {name}"
    if max(_steps(found), default=0) < max(_steps(old), default=0):
        return "the newest checkpoint is gone"
    return _half_a_folder(found, new)


def _steps(files: Tree) -> set[int]:
    return {int(name.split("/")[1].rpartition("-")[2]) for name in files if name.startswith("checkpoints/")}


def _may_go(name: str, new: Tree) -> bool:
    return name.startswith("checkpoints/") and name in new  # older ones are deleted once a newer one is whole


def _half_a_folder(found: Tree, new: Tree) -> str | None:
    """Get the checkpoint or adapter of a run that lacks a file; `new` holds all that there ever were."""
    of = {str(Path(name).parent) for name in found if name.startswith(("checkpoints/", "adapter/"))}
    for folder in of:
        lacks = [name for name in new if str(Path(name).parent) == folder and name not in found]
        if lacks:
            return f"lacks {lacks[0]}"
    return None


def readable(out: Path) -> None:
    """Open everything that has a name: tensors read, JSON parsed; raises where that fails."""
    for path in out.rglob("*"):
        if any(part.startswith(".") for part in path.relative_to(out).parts):
            continue
        if path.suffix == ".safetensors":
            checkpoint = open_checkpoint(path)
            assert all(tensor.isfinite().all() for _, tensor in checkpoint if tensor.is_floating_point())
        elif path.suffix == ".json":
            json.loads(path.read_text())
    if (out / "adapter_config.json").exists():
        read_adapter_folder(out)
