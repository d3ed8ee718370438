"""Autocast rounds a finished update and nothing on the way to it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from torch import nn

from spectune import METHODS, SpectralConfig
from spectune.adapter import SpectralModule, spectral_modules
from spectune.records import Delta
from tests.abilities import start_compiling
from tests.models import MODELS, output
from tests.tuner.conftest import OPTIONS, adapted, config_for, train

LLAMA = MODELS["llama"]
DTYPES = [torch.bfloat16, torch.float16]


def one(method: str) -> tuple[nn.Module, SpectralModule]:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(96, 80))
    model = get_peft_model(base, SpectralConfig(method=method, target_modules=["0"], **OPTIONS[method]))
    ((_, _, module),) = spectral_modules(model)
    return model, module


def parts(delta: Delta) -> list[torch.Tensor]:
    return [delta.left_OP, delta.core_matrix(), delta.right_QI]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("method", list(METHODS))
def test_an_update_is_made_up_in_full_and_rounded_once(method: str, dtype: torch.dtype) -> None:
    model, module = one(method)
    train(model, scale=0.05)
    exact = parts(module.delta())
    with torch.autocast("cpu", dtype=dtype):
        for mine, wanted in zip(parts(module.delta()), exact, strict=True):
            assert mine.dtype == torch.float32 and torch.equal(mine, wanted)
        for mine, wanted in zip(parts(module.delta_in(dtype)), exact, strict=True):
            assert mine.dtype == dtype and torch.equal(mine, wanted.to(dtype))
        assert torch.is_autocast_enabled("cpu")
        dense_OI = model.base_model.model[0].get_delta_weight("default")
    torch.testing.assert_close(dense_OI, exact[0] @ exact[1] @ exact[2], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", ["spectral_r", "specadapt", "lidb"])
def test_small_rotations_survive_autocast(method: str) -> None:
    """R_U S R_V^T - S cancels: with bfloat16 factors the core of a small turn was off by 2%."""
    model, module = one(method)
    train(model, scale=0.01)
    exact_PQ = module.delta().core_matrix().detach()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        core_PQ = module.delta_in(torch.bfloat16).core_matrix().detach().float()
    assert torch.linalg.vector_norm(core_PQ - exact_PQ) <= 2**-9 * torch.linalg.vector_norm(exact_PQ)


def test_gradients_of_a_core_are_not_rounded_on_their_way() -> None:
    model, module = one("spectral_r")
    train(model, scale=0.01)

    def gradient(autocast: bool) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            core_RR = module.delta().core_matrix()
        (found,) = torch.autograd.grad((core_RR * torch.arange(16.0).view(4, 4)).sum(), module.skew_U)
        return found

    assert torch.equal(gradient(autocast=True), gradient(autocast=False))


def test_a_basis_that_is_turned_inside_of_autocast_stays_in_full(tmp_path: Path) -> None:
    """transformers fills the modules itself, and the first forward turns the basis."""
    model = adapted(LLAMA, "spectral_r")
    model.save_pretrained(tmp_path)
    loaded = LLAMA.fresh()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loaded.load_adapter(str(tmp_path))
        output(loaded, LLAMA.inputs())
    for _, _, module in spectral_modules(loaded):
        assert module.U_OR.dtype == module.Vh_RI.dtype == torch.float32
    torch.testing.assert_close(output(loaded, LLAMA.inputs()), output(model, LLAMA.inputs()), rtol=0, atol=1e-4)


def test_adapters_served_together_are_made_up_in_full(monkeypatch: pytest.MonkeyPatch) -> None:
    from spectune.tuner import kinds

    model = adapted(LLAMA, "spectral_r")
    model.add_adapter("ben", config_for(LLAMA, "spectral_r"))
    train(model, seed=4)
    modules = [[m for _, name, m in spectral_modules(model) if name == adapter] for adapter in ("default", "ben")]
    pair = [modules[0][0], modules[1][0]]
    exact, _ = kinds.stacked_cores(pair)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cores, _ = kinds.stacked_cores(pair)
    assert cores.dtype == torch.float32 and torch.equal(cores, exact)


@pytest.mark.parametrize("method", list(METHODS))
def test_a_layer_compiles_in_one_graph_under_autocast(method: str) -> None:
    start_compiling()
    model, _ = one(method)
    train(model)
    compiled, x = torch.compile(model, backend="eager", fullgraph=True), torch.randn(3, 96)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(compiled(x), model(x))
