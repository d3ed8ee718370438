from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from spectune.checkpoint import find_targets, open_checkpoint
from spectune.errors import OptionError
from spectune.records import Weight
from spectune.spectrum import BasisCache, Request, fill_cache, obtain
from spectune.spectrum import stream as subject

from .weights import largest_angle, power_law

SHAPES = {"q": (90, 70), "k": (90, 70), "up": (60, 120), "thin": (40, 5)}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    tensors = {
        f"layers.{layer}.{name}.weight": power_law(*shape, seed=10 * layer + len(name))
        for layer in range(3)
        for name, shape in SHAPES.items()
    }
    tensors |= {"embed.weight": torch.randn(50, 20), "norm.weight": torch.ones(20)}
    save_file(tensors, tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


def fill(model: Path, folder: Path, request: Request, **options):
    checkpoint = open_checkpoint(model)
    targets, _ = find_targets(checkpoint, exclude="thin")
    return list(fill_cache(checkpoint, targets, request, BasisCache(folder), **options))


def test_every_weight_is_stored_and_training_finds_it_again(model: Path, tmp_path: Path) -> None:
    done = fill(model, tmp_path / "bases", Request(6))
    assert len(done) == 9 and not any(one.cached or one.left_out for one in done)
    assert sum(one.bytes_read for one in done) == 3 * 4 * (90 * 70 * 2 + 60 * 120)
    live = open_checkpoint(model).tensor("layers.1.q.weight")
    (found,) = obtain([Weight("base_model.layers.1.q", live)], Request(4), BasisCache(tmp_path / "bases", writes=False))
    assert found.quality.cached and largest_angle(live, found) < 1e-4


def test_a_second_run_only_reads(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(model, tmp_path / "bases", Request(6))
    monkeypatch.setattr(
        subject, "decompose_many", lambda weights, request: [] if not weights else pytest.fail("solved")
    )
    assert all(one.cached for one in fill(model, tmp_path / "bases", Request(5)))


def test_what_is_rounded_is_found_by_the_model_in_that_dtype(model: Path, tmp_path: Path) -> None:
    fill(model, tmp_path / "bases", Request(6), dtype=torch.bfloat16)
    half = open_checkpoint(model).tensor("layers.0.q.weight").bfloat16()
    (found,) = obtain([Weight("q", half)], Request(6), BasisCache(tmp_path / "bases", writes=False))
    assert found.quality.cached


def test_a_weight_beyond_the_memory_is_refused_before_any_work(model: Path, tmp_path: Path) -> None:
    with pytest.raises(
        OptionError, match=r"layers\.\d\.\w+: decomposing this weight needs .* GiB, more than --max-memory .0.00 GiB."
    ):
        fill(model, tmp_path / "bases", Request(6), max_memory=20_000)
    assert not (tmp_path / "bases").exists()


def test_little_memory_means_small_batches(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    solve = subject.decompose_many
    monkeypatch.setattr(subject, "decompose_many", lambda w, request: sizes.append(len(w)) or solve(w, request))
    fill(model, tmp_path / "a", Request(6))
    assert sorted(sizes) == [3, 6]
    sizes.clear()
    fill(model, tmp_path / "b", Request(6), max_memory=300_000)
    assert max(sizes) == 1 and len(sizes) == 9


def test_where_a_direct_solver_does_not_fit_block_krylov_is_tried_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("spectune.spectrum.randomized.MAX_STEPS", 6)
    flat = torch.randn(800, 800, generator=torch.Generator().manual_seed(0))
    save_file({"a.flat.weight": flat, "a.steep.weight": power_law(800, 800, 1.5)}, tmp_path / "model.safetensors")
    checkpoint = open_checkpoint(tmp_path)
    targets, _ = find_targets(checkpoint)
    need = subject._plan(targets[0], checkpoint, Request(20), None)[0]
    (krylov, asked) = subject._plan(targets[0], checkpoint, Request(20), need - 1)
    assert asked.solver == "randomized" and krylov < need
    done = {
        one.name: one.left_out
        for one in fill_cache(checkpoint, targets, Request(20), BasisCache(tmp_path / "bases"), max_memory=need - 1)
    }
    assert "did not converge" in done["a.flat"] and done["a.steep"] == ""


PEAK = """
import re, sys
from pathlib import Path
import torch
from spectune.checkpoint import find_targets, open_checkpoint
from spectune.spectrum import BasisCache, Request, decompose, fill_cache
def peak():  # of this image alone: getrusage would count what the parent held when it forked
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
torch.set_num_threads(1)
decompose(torch.randn(800, 800), 4)
before = peak()
checkpoint = open_checkpoint(sys.argv[1])
targets, _ = find_targets(checkpoint)
asked, cache = Request(8), BasisCache(Path(sys.argv[2]))
assert sum(1 for _ in fill_cache(checkpoint, targets, asked, cache, max_memory=48 * 2**20)) == len(targets) == 40
print((peak() - before) // 1024)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's high-water mark of memory")
def test_memory_is_bounded_by_the_limit_and_not_by_the_file(tmp_path: Path) -> None:
    # 40 weights of 4 MiB: 160 MiB of file, of which 48 MiB may be in memory, and some slack for the allocator.
    one = power_law(1024, 1024, 1.0)
    save_file({f"a.{i}.weight": one + i for i in range(40)}, tmp_path / "model.safetensors")
    done = subprocess.run(
        [sys.executable, "-c", PEAK, str(tmp_path), str(tmp_path / "bases")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 60


FILL = """
import sys
from pathlib import Path
import torch
from spectune.checkpoint import find_targets, open_checkpoint
from spectune.spectrum import BasisCache, Request, fill_cache
torch.set_num_threads(1)
checkpoint = open_checkpoint(sys.argv[1])
targets, _ = find_targets(checkpoint)
for one in fill_cache(checkpoint, targets, Request(6), BasisCache(Path(sys.argv[2])), max_memory=2**20):
    print(one.name, one.cached, flush=True)
"""


def test_killed_at_any_moment_a_rerun_completes_and_nothing_is_corrupt(tmp_path: Path) -> None:
    save_file({f"a.{i}.weight": power_law(90, 70, seed=i) for i in range(60)}, tmp_path / "model.safetensors")
    command = [sys.executable, "-c", FILL, str(tmp_path), str(tmp_path / "bases")]
    chance, kills = random.Random(0), 0
    for _ in range(4):
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as running:
            assert running.stdout is not None
            for _ in range(chance.randrange(1, 50)):
                running.stdout.readline()
            time.sleep(chance.random() / 100)  # somewhere between two words; nothing is asserted about it
            running.send_signal(signal.SIGKILL)
        kills += running.returncode == -signal.SIGKILL
        assert len(list(BasisCache(tmp_path / "bases").entries())) > 0  # a damaged one would warn, and fail the test
    assert kills > 0
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert len(done.stdout.splitlines()) == 60
    checkpoint = open_checkpoint(tmp_path)
    weights = [Weight(name, checkpoint.tensor(name)) for name in checkpoint.names]
    found = obtain(weights, Request(6), BasisCache(tmp_path / "bases", writes=False))
    assert all(one.quality.cached for one in found)
    assert max(largest_angle(weight.W_OI, one) for weight, one in zip(weights, found, strict=True)) < 1e-4
