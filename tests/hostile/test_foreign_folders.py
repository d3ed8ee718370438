"""No file chooses a folder that is written into, and the cache of bases deletes what it has made, nothing else."""

from __future__ import annotations

import copy
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftConfig, PeftModel, get_peft_model
from safetensors.torch import save_file

from spectune import SpectralConfig
from spectune.errors import OutputError
from spectune.export.source import open_source
from spectune.fusion import fuse
from spectune.records import Weight
from spectune.spectrum import BasisCache, Key, Request, obtain
from spectune.spectrum.cache_folder import MARKER
from spectune.tuner.attach import load_attached, swap_adapter
from tests.golden.make import HERE, Base
from tests.hostile.test_adapters import changed, with_config
from tests.hostile.test_live_load import bert

REQUEST = Request(2)
ENTRY_SIZE = 1_000


def weight(seed: int = 0) -> Weight:
    return Weight("layer", torch.randn(6, 5, generator=torch.Generator().manual_seed(seed)))


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def precious(folder: Path) -> Path:
    """Somebody's models: a shard and a LoRA in folders of two letters, and a name like an entry's."""
    for name in (
        "v1/model-00001-of-00001.safetensors",
        "ab/lora.safetensors",
        f"ab/{'ab' * 32}-{'0' * 12}.safetensors",
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        save_file({"w": torch.ones(64, 64)}, folder / name)
    return folder


LOADERS: dict[str, Callable[[Path], Any]] = {
    "peft": lambda folder: PeftModel.from_pretrained(Base(), str(folder)),
    "load_attached": lambda folder: load_attached(Base(), folder),
    "a config alone": lambda folder: get_peft_model(Base(), PeftConfig.from_pretrained(str(folder))),
    "our config": lambda folder: get_peft_model(Base(), SpectralConfig.from_pretrained(str(folder))),
    "swap": lambda folder: swap_adapter(load_attached(Base(), HERE / "spectral_a"), folder),
    "a second adapter": lambda folder: load_attached(Base(), HERE / "spectral_a").load_adapter(str(folder), "second"),
}


@pytest.mark.parametrize("load", LOADERS)
@pytest.mark.parametrize("there", [True, False], ids=["full", "missing"])
def test_a_config_of_a_file_names_no_cache(
    load: str, there: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "models"
    before = tree(precious(target)) if there else {}
    monkeypatch.setenv("SPECTUNE_CACHE_LIMIT", str(ENTRY_SIZE))
    svd = {"cache_dir": str(target)}
    with pytest.warns(UserWarning, match=r"svd\.cache_dir='.*' is ignored") as warned:
        LOADERS[load](changed("spectral_a", tmp_path / "adapter", with_config(svd=svd)))
    assert all(str(one.message).isprintable() for one in warned)
    assert target.exists() == there
    assert not there or tree(target) == before


def test_a_config_without_its_type_names_no_cache_either(tmp_path: Path) -> None:
    folder = changed("spectral_a", tmp_path / "adapter", with_config(svd={"cache_dir": str(tmp_path / "bases")}))
    config = json.loads((folder / "adapter_config.json").read_text())
    del config["peft_type"]
    (folder / "adapter_config.json").write_text(json.dumps(config))
    (folder / "adapter_model.safetensors").unlink()
    with pytest.warns(UserWarning, match="is ignored"):
        get_peft_model(Base(), SpectralConfig.from_pretrained(str(folder)))
    assert not (tmp_path / "bases").exists()


def test_an_export_makes_no_folder_that_the_adapter_names(tmp_path: Path) -> None:
    base, folder, target = bert(tmp_path), tmp_path / "adapter", tmp_path / "there"
    get_peft_model(copy.deepcopy(base), SpectralConfig(r=2, target_modules=["query"])).save_pretrained(folder)
    place = folder / "adapter_config.json"
    place.write_text(json.dumps({**json.loads(place.read_text()), "svd": {"cache_dir": str(target)}}))
    with pytest.warns(UserWarning, match="is ignored"):
        open_source(folder, base, None)
    assert not target.exists()


def test_a_fused_adapter_passes_no_folder_on(tmp_path: Path) -> None:
    told = with_config(svd={"cache_dir": str(tmp_path / "there")})
    folders = [changed("spectral_a-embedded", tmp_path / name, told) for name in ("one", "other")]
    fuse(folders, rule="average").save(tmp_path / "ab")
    assert "there" not in (tmp_path / "ab" / "adapter_config.json").read_text()
    assert not (tmp_path / "there").exists()


def test_a_config_that_was_given_in_code_keeps_its_cache(tmp_path: Path) -> None:
    model = get_peft_model(
        Base(), SpectralConfig(r=2, target_modules=["lin0"], svd={"cache_dir": str(tmp_path / "bases")})
    )
    assert list(BasisCache(tmp_path / "bases").entries())
    model.save_pretrained(tmp_path / "adapter")
    assert "cache_dir" not in (tmp_path / "adapter" / "adapter_config.json").read_text()


FOREIGN: dict[str, Callable[[Path], Any]] = {
    "models": precious,
    "one file": lambda folder: (folder / "notes.txt").write_text("mine"),
    "a hidden file": lambda folder: (folder / ".netrc").write_text("mine"),
    "a name like an entry's": lambda folder: (
        (folder / "ab").mkdir(),
        save_file({"w": torch.ones(9)}, folder / "ab" / f"{'ab' * 32}-{'0' * 12}.safetensors"),
    ),
    "a link": lambda folder: (folder / "ab").symlink_to(folder.parent),
    "a linked marker": lambda folder: (folder / MARKER).symlink_to("/dev/null"),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_a_folder_of_other_things_is_no_cache(kind: str, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    FOREIGN[kind](folder)
    before, names = tree(folder), sorted(folder.rglob("*"))
    for act in (
        lambda cache: obtain([weight()], REQUEST, cache),
        lambda cache: cache.store(Key.of(weight()), obtain([weight()], REQUEST)[0], REQUEST),
        lambda cache: cache.clear(),
    ):
        with pytest.raises(OutputError, match=r"asked for a cache of bases, found .* Name a new or empty folder\.$"):
            act(BasisCache(folder, limit=ENTRY_SIZE * 10))
    assert tree(folder) == before and sorted(folder.rglob("*")) == names


def test_a_foreign_folder_is_refused_before_a_base_is_solved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    precious(tmp_path)
    solving = sys.modules["spectune.spectrum.obtain"]
    monkeypatch.setattr(solving, "decompose_many", lambda *_: pytest.fail("solved"))
    with pytest.raises(OutputError, match="asked for a cache of bases"):
        get_peft_model(Base(), SpectralConfig(r=2, target_modules=["lin0"], svd={"cache_dir": str(tmp_path)}))


def test_room_is_made_of_entries_alone(tmp_path: Path) -> None:
    """What somebody puts into a cache later stays, also when the cache is full and when it is cleared."""
    cache = BasisCache(tmp_path / "bases", limit=2**30)
    obtain([weight(seed) for seed in range(3)], REQUEST, cache)
    mine = precious(cache.folder)
    for path in mine.rglob("*.safetensors"):
        os.utime(path, (1_000, 1_000))
    lying = cache.folder / "cd" / f"{'ab' * 32}-{'0' * 12}.safetensors"  # in a folder that is not its own
    lying.parent.mkdir(exist_ok=True)
    lying.write_bytes(b"mine")
    (cache.folder / "ab" / f"{'ab' * 32}-{'0' * 12}.safetensors").unlink()
    kept = {name: data for name, data in tree(mine).items() if "v1" in name or "lora" in name or "cd/" in name}
    full = BasisCache(cache.folder, limit=2 * ENTRY_SIZE)
    obtain([weight(7)], REQUEST, full)
    assert 1 <= len(list(full.entries())) < 4
    full.clear()
    assert {name: data for name, data in tree(mine).items() if name != MARKER} == kept


def test_links_in_a_cache_lead_nowhere(tmp_path: Path) -> None:
    cache, key = BasisCache(tmp_path / "bases", limit=2**30), Key.of(weight())
    cache.claim()
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / f"{key.identity}-{'0' * 12}.safetensors").write_bytes(b"mine")
    (cache.folder / key.identity[:2]).symlink_to(outside)
    with pytest.raises(OutputError, match="this is a link"):
        obtain([weight()], REQUEST, cache)
    cache.clear()
    assert [path.read_bytes() for path in outside.iterdir()] == [b"mine"]


def test_a_cache_of_an_earlier_release_is_taken_over(tmp_path: Path) -> None:
    """Such a folder has no marker; that its entries are ours, their names and headers say."""
    cache = BasisCache(tmp_path / "bases")
    obtain([weight()], REQUEST, cache)
    (cache.folder / MARKER).unlink()
    (cache.folder / "00").mkdir(exist_ok=True)  # a shelf whose entries are gone
    later = BasisCache(cache.folder)
    assert obtain([weight()], REQUEST, later)[0].quality.cached
    assert (cache.folder / MARKER).is_file()
    (cache.folder / MARKER).unlink()
    assert later.clear()[0] == 1


def test_an_empty_folder_becomes_a_cache(tmp_path: Path) -> None:
    obtain([weight()], REQUEST, BasisCache(tmp_path))
    assert len(list(BasisCache(tmp_path).entries())) == 1


def test_clearing_what_is_not_there_makes_nothing(tmp_path: Path) -> None:
    assert BasisCache(tmp_path / "none").clear() == (0, 0)
    assert not (tmp_path / "none").exists()
