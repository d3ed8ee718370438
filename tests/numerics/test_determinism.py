"""Same seed, same bits: on a CPU, whatever else ran before, with any number of processes that load data."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model, get_peft_model_state_dict
from torch.utils.data import DataLoader, TensorDataset

from spectune import SpectralConfig
from spectune.methods import METHODS
from tests.models import MODELS
from tests.numerics.test_precision import METHOD_OPTIONS, loss_of, trained


def run(method: str, workers: int = 0, noise: int = 0) -> dict[str, torch.Tensor]:
    """Train ten steps on shuffled batches; `noise` numbers are drawn from the global generator before."""
    tiny = MODELS["mlp"]
    torch.manual_seed(noise)
    torch.rand(noise)
    config = SpectralConfig(method=method, target_modules=list(tiny.targets), **METHOD_OPTIONS[method])
    model = get_peft_model(tiny.fresh(), config).train()
    data = torch.randn(40, 10, generator=torch.Generator().manual_seed(1))
    loader = DataLoader(
        TensorDataset(data), 4, shuffle=True, generator=torch.Generator().manual_seed(2), num_workers=workers
    )
    optimizer = torch.optim.AdamW(trained(model), lr=1e-2)
    for (x,) in loader:
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return get_peft_model_state_dict(model)


def same_bits(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("method", METHODS)
def test_the_same_seed_gives_the_same_bits(method: str) -> None:
    """The global generator plays no part: bases, starts and patterns draw from their own."""
    assert same_bits(run(method), run(method, noise=7))


@pytest.mark.parametrize("workers", [1, 3])
def test_processes_that_load_data_change_nothing(workers: int) -> None:
    assert same_bits(run("spectral_a"), run("spectral_a", workers))


def test_another_seed_gives_other_bits() -> None:
    """Else the tests above would compare constants: the order of the data matters."""
    one = run("spectral_a")
    torch.manual_seed(0)
    tiny = MODELS["mlp"]
    other = get_peft_model(tiny.fresh(1), SpectralConfig(r=4, target_modules=list(tiny.targets)))
    assert not same_bits(one, get_peft_model_state_dict(other))


def test_attaching_leaves_the_global_generator_alone() -> None:
    tiny = MODELS["llama"]
    for method in METHODS:
        torch.manual_seed(4)
        wanted = torch.rand(3)
        torch.manual_seed(4)
        config = SpectralConfig(method=method, target_modules=list(tiny.targets), **METHOD_OPTIONS[method])
        loss_of(get_peft_model(tiny.fresh(), config))
        assert torch.equal(torch.rand(3), wanted), method
