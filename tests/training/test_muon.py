"""The spectral optimizer: equal steps in the operator norm, for the matrices of an adapter."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from spectune import METHODS, SpectralConfig
from spectune.adapter import spectral_modules
from spectune.algebra import dense
from spectune.errors import OptionError
from spectune.recipes import parse_config
from spectune.recipes.table import recipe_class
from spectune.runs.building import build
from spectune.training.loop import Plan, looped
from spectune.training.muon import SpectralMuon, muon_groups, orthogonalised
from spectune.training.rates import advice, learning_rate, tuned_by
from spectune.tuner import attach

from ..recipes import tiny

CORE = {"method": "svft", "pattern": "dense", "target_modules": ["query", "value"]}
# Forms whose whole first step is one matrix between factors with singular values near one.
LINEAR: dict[str, dict[str, Any]] = {
    "core of 4": {"method": "svft", "pattern": "dense", "basis_rank": 4},
    "core of 12": {"method": "svft", "pattern": "dense", "basis_rank": 12},
    "core of 12 x 5": {"method": "svft", "pattern": "dense", "core": [12, 5]},
    "one_sided": {"method": "one_sided", "r": 4},
    "one_sided, left": {"method": "one_sided", "r": 4, "side": "left"},
    "orthogonal_adaptation": {"method": "orthogonal_adaptation", "r": 4},
}


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def adapted(options: dict[str, Any], scale: float = 1.0) -> Any:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 16))
    model[0].weight.data *= scale
    return attach(model, SpectralConfig(target_modules=["0"], **options))


def optimizer_of(model: Any, rate: float, decay: float = 0.0) -> SpectralMuon:
    trained = [p for p in model.parameters() if p.requires_grad]
    return SpectralMuon(muon_groups(model, [(trained, rate)], {id(p) for p in trained}, decay, 1e-3))


def stepped(model: Any, rate: float, steps: int = 1, decay: float = 0.0) -> torch.Tensor:
    """The update after some steps of muon."""
    optimizer = optimizer_of(model, rate, decay)
    for step in range(steps):
        (model(normal(32, 20, seed=step)) - normal(32, 16, seed=9)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    ((_, _, module),) = spectral_modules(model)
    return dense(module.delta()).detach()


def test_a_matrix_keeps_its_singular_vectors_and_gets_singular_values_near_one() -> None:
    for shape in ((12, 12), (30, 7), (7, 30)):
        matrix = normal(*shape, dtype=torch.float64)
        U, _, Vh = torch.linalg.svd(matrix, full_matrices=False)
        middle = U.T @ orthogonalised(matrix) @ Vh.T
        assert (middle - torch.diag(middle.diagonal())).abs().max() < 1e-10
        assert 0.6 < middle.diagonal().min() <= middle.diagonal().max() < 1.3
    assert not orthogonalised(torch.zeros(3, 4)).any()


def test_a_step_of_a_core_is_the_step_of_the_projected_gradient() -> None:
    """U msign(U^T G V) V^T = msign(U U^T G V V^T): the core loses nothing but what it cannot reach."""
    U, V = (torch.linalg.qr(normal(size, 6, seed=size, dtype=torch.float64)).Q for size in (20, 16))
    G = normal(20, 16, dtype=torch.float64)
    torch.testing.assert_close(U @ orthogonalised(U.T @ G @ V) @ V.T, orthogonalised(U @ U.T @ G @ V @ V.T))


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch.optim.Muon came with torch 2.9")
@pytest.mark.parametrize("shape", [(12, 12), (7, 30)])
def test_steps_are_those_of_torch_s_muon(shape: tuple[int, int]) -> None:
    mine, theirs = (nn.Parameter(normal(*shape, seed=1)) for _ in range(2))
    one = SpectralMuon([{"params": [mine], "lr": 0.1, "weight_decay": 0.3, "sizes": [1.0]}])
    other = torch.optim.Muon([theirs], lr=0.1, weight_decay=0.3)
    for step in range(6):
        for p, optimizer in ((mine, one), (theirs, other)):
            p.grad = normal(*shape, seed=10 + step)
            optimizer.step()
    moved = torch.linalg.matrix_norm(theirs - normal(*shape, seed=1))
    # torch orthogonalises in bfloat16: 2^-8 at each of fifteen products.
    assert torch.linalg.matrix_norm(mine - theirs) < 15 * 2**-8 * moved


def test_what_is_not_a_matrix_is_trained_by_adamw() -> None:
    mine, theirs = (nn.Parameter(normal(9, seed=1)) for _ in range(2))
    one = SpectralMuon([{"params": [mine], "lr": 0.1, "weight_decay": 0.3}])
    other = torch.optim.AdamW([theirs], lr=0.1, weight_decay=0.3)
    for step in range(6):
        for p, optimizer in ((mine, one), (theirs, other)):
            p.grad = normal(9, seed=10 + step)
            optimizer.step()
    torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("scale", [1.0, 10.0])
@pytest.mark.parametrize("name", list(LINEAR))
def test_one_rate_moves_every_weight_by_the_same_part_of_its_size(name: str, scale: float) -> None:
    model = adapted(LINEAR[name], scale)
    ((_, _, module),) = spectral_modules(model)
    W_OI = model.base_model.model[0].base_layer.weight
    rms = torch.linalg.svdvals(W_OI).square().mean().sqrt().item()
    assert module.weight_size() == pytest.approx(rms, rel=1e-5)
    moved = torch.linalg.matrix_norm(stepped(model, 0.02), ord=2).item()
    assert 0.6 * 0.02 * rms < moved < 1.3 * 0.02 * rms


@pytest.mark.parametrize("method", list(METHODS))
def test_every_method_trains_with_muon_or_is_refused(method: str) -> None:
    model = adapted({"method": method} | ({"r": 4} if "r" in METHODS[method].options() else {}))
    if METHODS[method]().matrix_steps():
        assert stepped(model, 0.02, steps=3).abs().max() > 0
        return
    with pytest.raises(OptionError, match=f"optimizer=muon: {method} with these options trains single numbers"):
        stepped(model, 0.02)


def test_gates_and_biases_take_adamw_at_the_rate_of_the_rest() -> None:
    model = adapted({**LINEAR["core of 4"], "gate": True, "bias": "all"})
    told = optimizer_of(model, 0.02).param_groups
    assert [(len(group["params"]), group["lr"], bool(group["sizes"])) for group in told] == [
        (1, 0.02, True),
        (2, 1e-3, False),
    ]


def test_singular_decay_and_gradient_norms_act_on_muon() -> None:
    plain, rms, decayed = (
        stepped(adapted({**LINEAR["core of 12"], **more}), 0.02, steps=3)
        for more in ({}, {"grad_norm": "layer"}, {"singular_decay": 5.0})
    )
    assert not torch.equal(plain, rms)
    assert torch.linalg.matrix_norm(decayed) < torch.linalg.matrix_norm(plain)
    with pytest.raises(OptionError, match="decay the same numbers twice"):
        stepped(adapted({**LINEAR["core of 12"], "singular_decay": 5.0}), 0.02, decay=0.1)


def test_a_state_that_was_saved_goes_on_to_the_same_bits() -> None:
    model = adapted({**LINEAR["core of 12"], "gate": True})
    optimizer = optimizer_of(model, 0.02)

    def step(model: Any, optimizer: SpectralMuon) -> None:
        (model(normal(32, 20)) - normal(32, 16, seed=9)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    step(model, optimizer)
    copied = copy.deepcopy(model)
    again = optimizer_of(copied, 0.5)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for one, other in ((model, optimizer), (copied, again)):
        step(one, other)
    for one, other in zip(model.parameters(), copied.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_weight_of_zeros_has_no_size() -> None:
    with pytest.raises(OptionError, match="the base weight is all zeros"):
        stepped(adapted(LINEAR["core of 4"], scale=0.0), 0.02)


def test_a_run_tells_muon_its_own_rate_and_the_head_adamw_s(tmp_path: Path) -> None:
    config = parse_config(tiny.text_run(tmp_path) | {"adapter": CORE, "training": {"steps": 2, "optimizer": "muon"}})
    assert tuned_by(config) == "muon"
    assert advice("muon", learning_rate(config)) is None
    assert "muon" in str(advice("muon", 100.0))
    recipe = recipe_class(config.recipe)(config)
    model, plan = build(recipe)
    groups = recipe.trainer(model, plan, tmp_path / "out").create_optimizer().param_groups
    assert [group["lr"] for group in groups if group["sizes"]] == [learning_rate(config)]
    assert all(len(p.shape) == 2 for group in groups if group["sizes"] for p in group["params"])
    head = {id(p) for name, p in model.named_parameters() if p.requires_grad and "classifier" in name}
    assert {id(p) for group in groups if not group["sizes"] for p in group["params"]} == head


@pytest.mark.parametrize(
    ("adapter", "line"),
    [
        ({"method": "svft", "target_modules": ["query"]}, "svft with these options trains single numbers"),
        ({"peft_type": "LORA", "target_modules": ["query"]}, "this run has no adapter of spectune's"),
        ("none", "this run has no adapter of spectune's"),
        ("head", "this run has no adapter of spectune's"),
    ],
)
def test_a_run_without_matrices_is_refused_before_any_step(adapter: Any, line: str, tmp_path: Path) -> None:
    config = parse_config(tiny.text_run(tmp_path) | {"adapter": adapter, "training": {"steps": 2, "optimizer": "muon"}})
    with pytest.raises(OptionError, match=f"training.optimizer=muon: {line}"):
        build(recipe_class(config.recipe)(config))


@pytest.mark.parametrize("engine", ["is_fsdp_enabled", "is_deepspeed_enabled"])
def test_engines_that_cut_matrices_are_refused(engine: str) -> None:
    class Told:
        def __init__(self, **kwargs: Any) -> None:
            self.model = adapted(LINEAR["core of 4"])
            self.is_fsdp_enabled = self.is_deepspeed_enabled = False
            setattr(self, engine, True)

    with pytest.raises(OptionError, match="FSDP and DeepSpeed cut matrices"):
        looped(Told)(plan=Plan([], muon=1e-3))
