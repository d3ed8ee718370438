from __future__ import annotations

import multiprocessing
import os
import time
import warnings
from pathlib import Path

import pytest
import torch

from spectune.errors import OptionError, OutputError
from spectune.records import Weight
from spectune.spectrum import BasisCache, Key, Request, decompose, obtain, open_cache, parse_bytes
from spectune.spectrum.cache import default_folder, size_limit
from spectune.spectrum.engine import decompose_many

from .weights import largest_angle, power_law


@pytest.fixture
def cache(tmp_path: Path) -> BasisCache:
    return BasisCache(tmp_path / "bases")


WEIGHT = Weight("layer.q", power_law(90, 70))


def files(cache: BasisCache) -> list[Path]:
    return sorted(cache.folder.rglob("*.safetensors"))


def filled(cache: BasisCache, weight: Weight = WEIGHT, **request) -> Request:
    asked = Request(**{"rank": 12, **request})
    obtain([weight], asked, cache)
    return asked


def test_what_was_stored_is_found_bit_for_bit(cache: BasisCache) -> None:
    (solved,) = obtain([WEIGHT], Request(rank=12), cache)
    (found,) = obtain([WEIGHT], Request(rank=12), cache)
    assert not solved.quality.cached and found.quality.cached
    assert (found.columns, found.quality.gap, found.name) == (solved.columns, solved.quality.gap, "layer.q")
    for name in ("U_OR", "S_R", "Vh_RI"):
        assert torch.equal(getattr(found, name), getattr(solved, name))


@pytest.mark.parametrize("columns, rank", [("top", 5), (3, 4), ((7, 0, 11), None)])
def test_a_larger_entry_serves_any_choice_inside_it(cache: BasisCache, columns, rank) -> None:
    filled(cache)
    (found,) = obtain([WEIGHT], Request(rank, columns), cache)
    alone = decompose(WEIGHT, rank, columns=list(columns) if isinstance(columns, tuple) else columns)
    assert found.quality.cached and found.columns == alone.columns
    assert largest_angle(WEIGHT.W_OI, found) < 1e-4
    assert found.quality.gap == pytest.approx(alone.quality.gap, rel=1e-3)


@pytest.mark.parametrize(
    "request_", [Request(13), Request(12, tolerance=1e-6), Request(12, dtype=torch.float64), Request(12, solver="gram")]
)
def test_more_than_the_entry_holds_is_a_miss(cache: BasisCache, request_: Request) -> None:
    stored = filled(cache, solver="randomized")
    assert cache.find(Key.of(WEIGHT), stored) is not None
    assert cache.find(Key.of(WEIGHT), request_) is None


def test_a_larger_entry_takes_the_place_of_what_it_contains(cache: BasisCache) -> None:
    for rank in (3, 12, 5):
        filled(cache, rank=rank)
    assert [entry.rank for entry in cache.entries()] == [12]
    filled(cache, rank=3, columns="bottom")
    assert sorted(entry.rank for entry in cache.entries()) == [3, 12]


def test_a_bfloat16_weight_is_found_again_as_float32(cache: BasisCache) -> None:
    half = WEIGHT.W_OI.bfloat16()
    filled(cache, Weight("file", half))
    assert cache.find(Key.of(Weight("live", half.float())), Request(12)) is not None
    assert cache.find(Key.of(Weight("live", WEIGHT.W_OI)), Request(12)) is None


def test_a_transposed_view_is_known_by_what_lies_in_memory(cache: BasisCache) -> None:
    filled(cache)
    (found,) = obtain([Weight("conv1d", WEIGHT.W_OI.mT)], Request(12), cache)
    assert found.quality.cached
    alone = decompose(WEIGHT.W_OI.mT, 12)
    torch.testing.assert_close(
        found.U_OR * found.S_R @ found.Vh_RI, alone.U_OR * alone.S_R @ alone.Vh_RI, atol=2e-4, rtol=0
    )
    places = found.U_OR.abs().argmax(0)
    assert bool((found.U_OR.gather(0, places[None]) > 0).all()), "signs are canonical"


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "foreign kind", "no columns"])
def test_a_damaged_entry_is_a_miss_with_one_warning_and_is_replaced(cache: BasisCache, damage: str) -> None:
    asked = filled(cache)
    (path,) = files(cache)
    content = bytearray(path.read_bytes())
    if damage == "cut":
        content = content[: len(content) // 2]
    elif damage == "empty":
        content = bytearray()
    elif damage == "flipped":
        content[-5000:-4000] = bytes(1000)
    elif damage == "foreign kind":
        content = content.replace(b"spectune basis 1", b"spectune basis 9")
    else:
        content = content.replace(b'"columns"', b'"rows___"')
    path.write_bytes(bytes(content))
    with pytest.warns(UserWarning, match="damaged cache entry ignored"):
        assert cache.find(Key.of(WEIGHT), asked) is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (again,) = obtain([WEIGHT], asked, cache)
        assert not again.quality.cached
        assert cache.find(Key.of(WEIGHT), asked) is not None


def test_an_entry_that_belongs_to_another_weight_is_not_believed(cache: BasisCache) -> None:
    asked = filled(cache)
    other = Key.of(Weight("other", power_law(90, 70, seed=1)))
    (path,) = files(cache)
    lie = cache.folder / other.identity[:2] / path.name.replace(Key.of(WEIGHT).identity, other.identity)
    lie.parent.mkdir(exist_ok=True)
    lie.write_bytes(path.read_bytes())
    with pytest.warns(UserWarning, match="its residual on"):
        assert cache.find(other, asked) is None


def test_the_least_recently_used_make_room(tmp_path: Path) -> None:
    weights = [Weight(str(seed), power_law(90, 70, seed=seed)) for seed in range(4)]
    cache = BasisCache(tmp_path, limit=1)
    obtain(weights[:1], Request(rank=12), cache)
    assert files(cache) == [], "larger than the whole limit"
    cache.limit = 3 * (12 * (90 + 70 + 1) * 4 + 2000)
    for age, weight in enumerate(weights[:3]):
        before = set(files(cache))
        filled(cache, weight)
        (new,) = set(files(cache)) - before
        os.utime(new, (1000 + age, 1000 + age))
    filled(cache, weights[0])  # served, so it is the youngest now
    filled(cache, weights[3])
    assert {entry.name for entry in cache.entries()} == {"0", "2", "3"}


def test_what_killed_processes_left_is_removed_when_it_is_old(cache: BasisCache) -> None:
    filled(cache)
    left = files(cache)[0].with_name(f".{files(cache)[0].name}.partial-0123abcd")
    left.write_bytes(b"half")
    os.utime(left, (time.time() - 1e6,) * 2)
    cache.limit, cache._total = 10**9, None
    filled(cache, Weight("new", power_law(80, 60)))
    assert not left.exists()
    assert cache.clear()[0] == 2 and files(cache) == []


def test_what_did_not_converge_is_not_kept(cache: BasisCache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spectune.spectrum.randomized.MAX_STEPS", 1)
    with pytest.warns(UserWarning, match="did not converge"):
        filled(cache, Weight("flat", power_law(300, 300, 0.1)), rank=4, solver="randomized")
    assert files(cache) == []


def test_none_reads_what_is_there_and_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPECTUNE_CACHE", str(tmp_path / "here"))
    assert open_cache() is None and open_cache("off") is None
    writing = open_cache(tmp_path / "here")
    assert writing is not None
    filled(writing)
    reading = open_cache()
    assert reading is not None and not reading.writes
    obtain([WEIGHT], Request(rank=2), reading)
    obtain([Weight("new", power_law(30, 30))], Request(rank=2), reading)
    assert len(files(reading)) == 1


def test_the_places_are_the_users(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SPECTUNE_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert default_folder() == Path("/x/spectune/bases")
    monkeypatch.setenv("SPECTUNE_CACHE_LIMIT", "5GiB")
    assert size_limit() == 5 * 2**30


@pytest.mark.parametrize("words, size", [("1000", 1000), ("1.5 GiB", 3 * 2**29), ("4gb", 4 * 10**9), ("512MiB", 2**29)])
def test_sizes_are_read(words: str, size: int) -> None:
    assert parse_bytes(words) == size


@pytest.mark.parametrize("words", ["", "GiB", "4 parsecs", "-"])
def test_what_is_no_size_is_refused(words: str) -> None:
    with pytest.raises(OptionError, match="is not a size"):
        parse_bytes(words)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(OutputError, match="cannot write to the cache"):
        filled(BasisCache(tmp_path / "bases"))


def test_a_file_in_the_place_of_the_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "bases").write_text("")
    with pytest.raises(OutputError, match="cannot write to the cache"):
        filled(BasisCache(tmp_path / "bases"))


def _fill_and_read(folder: Path, start: int, failures: multiprocessing.Queue) -> None:  # type: ignore[type-arg]
    try:
        warnings.simplefilter("error")
        torch.set_num_threads(1)
        cache = BasisCache(folder, limit=60_000)
        for turn in range(30):
            weight = Weight("w", power_law(50, 40, seed=(start + turn) % 6))
            (found,) = obtain([weight], Request(rank=2 + turn % 5), cache)
            assert largest_angle(weight.W_OI, found) < 1e-3
            if turn % 11 == 10:
                cache.clear()
    except BaseException as error:
        failures.put(repr(error))


def test_many_processes_share_one_folder(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    failures = context.SimpleQueue()
    workers = [context.Process(target=_fill_and_read, args=(tmp_path, i, failures)) for i in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
    assert failures.empty(), failures.get()
    assert all(worker.exitcode == 0 for worker in workers)


def test_a_batch_with_some_hits_comes_back_in_order(cache: BasisCache) -> None:
    weights = [Weight(str(seed), power_law(60, 50, seed=seed)) for seed in range(5)]
    obtain([weights[1], weights[3]], Request(rank=4), cache)
    found = obtain(weights, Request(rank=4), cache)
    assert [one.quality.cached for one in found] == [False, True, False, True, False]
    for one, alone in zip(found, decompose_many(weights, Request(rank=4)), strict=True):
        torch.testing.assert_close(one.S_R, alone.S_R)
