"""Entries of the cache whose tensors do not belong together: each is a miss with a warning, and never a crash."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from spectune.checkpoint import TensorFile
from spectune.records import Weight
from spectune.spectrum import BasisCache, Key, Request, decompose

REQUEST = Request(2)


def weight() -> Weight:
    return Weight("layer", torch.randn(6, 5, generator=torch.Generator().manual_seed(0)))


def rotten(
    folder: Path, changes: dict[str, torch.Tensor], said: dict[str, str] | None = None
) -> tuple[BasisCache, Key]:
    """A cache of one entry with other tensors or other words in it."""
    cache, key = BasisCache(folder, limit=2**30), Key.of(weight())
    cache.store(key, decompose(weight(), 2), REQUEST)
    (path,) = folder.glob("??/*.safetensors")
    file = TensorFile.open(path)
    tensors = {name: file.tensor(name) for name in file.names} | changes
    save_file(tensors, path, {**file.metadata, **(said or {})})
    return cache, key


def served(cache: BasisCache, key: Key) -> bool:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        list(cache.entries())
        return cache.find(key, REQUEST) is not None


def test_an_honest_entry_is_served(tmp_path: Path) -> None:
    assert served(*rotten(tmp_path, {}))


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("columns", torch.tensor(3)),
        ("columns", torch.ones(2, 2, dtype=torch.int64)),
        ("columns", torch.zeros(0, dtype=torch.int64)),
        ("columns", torch.tensor([0.0, 1.0])),
        ("S_R", torch.ones(1)),
        ("S_R", torch.ones(2, dtype=torch.float64)),
        ("S_R", torch.full((2,), float("nan"))),
        ("U_OR", torch.ones(6, 1)),
        ("Vh_RI", torch.ones(5)),
        ("Vh_RI", torch.ones(2, 4)),
    ],
    ids=lambda value: value if isinstance(value, str) else f"{tuple(value.shape)}{value.dtype}",
)
def test_tensors_that_do_not_belong_together_are_a_miss(name: str, tensor: torch.Tensor, tmp_path: Path) -> None:
    assert not served(*rotten(tmp_path, {name: tensor}))


@pytest.mark.parametrize("claim", ["inf", "nan", "1e9", "-1", "0.5", "none"])
def test_an_entry_is_not_believed_how_bad_it_is(claim: str, tmp_path: Path) -> None:
    """What an entry may leave is measured in what it claims for itself, so a claim without bound serves any basis."""
    foreign = torch.linalg.qr(torch.randn(6, 2, generator=torch.Generator().manual_seed(1)))[0].contiguous()
    assert not served(*rotten(tmp_path, {"U_OR": foreign}, {"residual": claim}))


@pytest.mark.parametrize("key", ["kind", "steps", "gap", "orthogonality"])
def test_words_that_are_no_numbers_are_a_miss(key: str, tmp_path: Path) -> None:
    assert not served(*rotten(tmp_path, {}, {key: "\x1b[2J"}))
