from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from spectune.errors import WeightError
from spectune.records import Weight
from spectune.spectrum import BasisCache, Request, obtain
from spectune.spectrum.distributed import assign

from .weights import power_law

SHAPES = [(60, 50), (50, 60), (90, 90), (60, 50), (20, 30)]


def weights() -> list[Weight]:
    return [Weight(f"layer.{i}", power_law(*shape, seed=i)) for i, shape in enumerate(SHAPES)]


def _entry(rank: int, world: int, rendezvous: str, answers: str, job: Callable[[int], Any]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world)
    try:
        answer = job(rank)
    except WeightError as error:
        answer = f"WeightError: {error}"
    torch.save(answer, f"{answers}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def together(job: Callable[[int], Any], folder: Path, world: int = 2) -> list[Any]:
    """Run a job in processes that form one distributed run; get what each of them answered."""
    # Forked, so that torch is not imported again; one thread each, as OpenMP does not survive a fork.
    mp.start_processes(_entry, (world, str(folder / "rendezvous"), str(folder), job), nprocs=world, start_method="fork")
    return [torch.load(folder / f"{rank}.pt") for rank in range(world)]


def _all(rank: int) -> Any:
    solved: list[str] = []
    found = obtain(weights(), Request(rank=4), share=True, on_done=lambda weight: solved.append(weight.name))
    return solved, [(one.name, one.U_OR, one.S_R, one.Vh_RI, one.columns, one.quality.solver) for one in found]


def test_each_weight_is_solved_once_and_all_get_the_same_bits(tmp_path: Path) -> None:
    (solved0, found0), (solved1, found1) = together(_all, tmp_path)
    assert sorted(solved0 + solved1) == [weight.name for weight in weights()]
    assert solved0 and solved1
    alone = obtain(weights(), Request(rank=4))
    for one, other, single in zip(found0, found1, alone, strict=True):
        assert one[0] == other[0] == single.name and one[4:] == other[4:]
        assert all(torch.equal(a, b) for a, b in zip(one[1:4], other[1:4], strict=True))
        torch.testing.assert_close(one[2], single.S_R)


def _empty_on_one(rank: int) -> Any:
    mine = weights()
    if rank == 1:
        mine = [Weight(weight.name, torch.empty(weight.W_OI.shape, device="meta")) for weight in mine]
    return [(one.S_R, one.U_OR.device.type) for one in obtain(mine, Request(rank=4), share=True)]


def test_a_process_without_the_numbers_only_listens(tmp_path: Path) -> None:
    full, empty = together(_empty_on_one, tmp_path)
    for one, other, single in zip(full, empty, obtain(weights(), Request(rank=4)), strict=True):
        torch.testing.assert_close(one[0], single.S_R)
        assert torch.equal(one[0], other[0]) and other[1] == "cpu"


def _bad_on_one(rank: int) -> Any:
    mine = weights()
    mine[4] = Weight("layer.4", torch.full((20, 30), float("nan")))
    return len(obtain(mine, Request(rank=4), share=True))


def test_an_error_on_one_process_is_raised_on_all(tmp_path: Path) -> None:
    answers = together(_bad_on_one, tmp_path)
    assert all("layer.4: 600 of the weight's 600 entries are NaN" in answer for answer in answers)


def _fewer_on_one(rank: int) -> Any:
    return len(obtain(weights()[: 5 - rank], Request(rank=4), share=True))


def test_other_weights_on_another_process_are_refused(tmp_path: Path) -> None:
    answers = together(_fewer_on_one, tmp_path)
    assert all("process 1 adapts 4 weights and process 0 adapts 5" in answer for answer in answers)


def _with_cache(rank: int) -> Any:
    cache = BasisCache(Path(os.environ["SHARED_BASES"]))
    first = obtain(weights(), Request(rank=4), cache, share=True)
    again = obtain(weights(), Request(rank=3), cache, share=True)
    return [one.quality.cached for one in first], [one.quality.cached for one in again]


def test_all_read_and_fill_one_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHARED_BASES", str(tmp_path / "bases"))
    for first, again in together(_with_cache, tmp_path):
        assert first == [False] * 5 and again == [True] * 5


def test_work_goes_to_whoever_has_the_least() -> None:
    assert assign([(1, 8), (1, 7), (1, 6), (1, 5), (1, 4)], [0, 1]) == [0, 1, 1, 0, 0]
    assert assign([(2, 2), (2, 2), (2, 2)], [3]) == [3, 3, 3]


def test_one_process_shares_with_nobody() -> None:
    assert len(obtain(weights(), Request(rank=2), share=True)) == 5
