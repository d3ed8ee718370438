"""Gradient normalisation and singular-guided decay at any optimizer's step."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model

import spectune
from spectune import METHODS, SpectralConfig, SpectuneError
from spectune.adapter import GRADIENT_NORMS, SpectralModule, spectral_modules

from ..models import MODELS
from ..tuner.conftest import OPTIONS, config_for, train
from ..warm import script

TINY = MODELS["mlp"]
SPECTRAL = [name for name in METHODS if name not in ("lidb", "orthogonal_adaptation")]


def model_with(method: str, **more: Any) -> torch.nn.Module:
    model = get_peft_model(TINY.fresh(), config_for(TINY, method, **more))
    train(model)
    return model.train()


def backward(model: torch.nn.Module, scale: float = 1.0) -> None:
    (model(**TINY.inputs()).square().mean() * scale).backward()


def modules(model: torch.nn.Module) -> list[SpectralModule]:
    return [module for _, _, module in spectral_modules(model)]


def trainable(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


@pytest.mark.parametrize("method", list(METHODS))
@pytest.mark.parametrize("kind", list(GRADIENT_NORMS))
@pytest.mark.parametrize("scale", [1.0, 1e-6])
def test_normalised_gradients_have_unit_rms_whatever_their_size(method: str, kind: str, scale: float) -> None:
    model = model_with(method, grad_norm=kind)
    backward(model, scale)
    torch.optim.SGD(trainable(model), lr=0.0).step()
    for module in modules(model):
        for name, axis in module.method.gradient_axes().items():
            gradient = getattr(module, name).grad
            rms = gradient.square().mean(axis).sqrt()
            torch.testing.assert_close(rms, torch.ones_like(rms), rtol=1e-3, atol=1e-3)
            if kind == "layer":
                assert gradient.mean(axis).abs().max() < 1e-3


@pytest.mark.parametrize("method", SPECTRAL)
def test_decay_spares_the_strongest_direction_and_takes_the_tail(method: str) -> None:
    model = model_with(method, singular_decay=0.5)
    before = {id(m): {n: getattr(m, n).detach().clone() for n in m.own_names} for m in modules(model)}
    for p in trainable(model):
        p.grad = torch.zeros_like(p)
    torch.optim.SGD(trainable(model), lr=0.1).step()
    for module in modules(model):
        profile = module.method.decay_profile(module.spectrum, module.frozen)
        assert profile and all(float(p.min()) >= 0 and float(p.max()) <= 1 for p in profile.values())
        for name in module.own_names:
            expected = before[id(module)][name] * (1 - 0.1 * 0.5 * profile[name] if name in profile else 1)
            torch.testing.assert_close(getattr(module, name).detach(), expected)


def test_specadapts_decay_is_the_official_formula() -> None:
    model = model_with("specadapt", singular_decay=0.39)
    module = modules(model)[0]
    A_KR, S_K = module.A.detach().clone(), module.S_R
    for p in trainable(model):
        p.grad = torch.zeros_like(p)
    torch.optim.SGD(trainable(model), lr=0.01).step()
    # The official code: a_i <- a_i (1 - lr e wd (1 - s_i / s_max)), e = 1.3, wd = 0.3.
    expected = torch.stack([a * (1 - 0.01 * 1.3 * 0.3 * (1 - s / S_K[0])) for a, s in zip(A_KR, S_K, strict=True)])
    torch.testing.assert_close(module.A.detach(), expected)
    assert torch.equal(module.A.detach()[0], A_KR[0])


def test_rules_act_once_per_optimizer_step_and_not_per_backward() -> None:
    model = model_with("spectral_a", singular_decay=0.5)
    optimizer = torch.optim.SGD(trainable(model), lr=0.1)
    module = modules(model)[0]
    start = module.A_U.detach().clone()
    for _ in range(4):
        backward(model)
    assert torch.equal(module.A_U.detach(), start)
    optimizer.zero_grad(set_to_none=False)
    optimizer.step()
    weak_R = 1 - module.S_R / module.S_R[0]
    torch.testing.assert_close(module.A_U.detach(), start * (1 - 0.05 * weak_R))


def test_a_step_that_a_scaler_skips_changes_nothing() -> None:
    model = model_with("spectral_a", singular_decay=0.5, grad_norm="rms")
    optimizer = torch.optim.SGD(trainable(model), lr=0.1)
    start = copy.deepcopy([p.detach() for p in trainable(model)])
    scaler = torch.amp.GradScaler("cpu", enabled=True, init_scale=2.0)
    scaler.scale(model(**TINY.inputs()).square().mean()).backward()
    trainable(model)[0].grad[0, 0] = float("inf")
    scaler.step(optimizer)
    scaler.update()
    assert all(torch.equal(a, b) for a, b in zip(start, trainable(model), strict=True))


def test_attach_dynamics_is_the_same_as_the_config() -> None:
    by_config, by_call = (
        model_with("spectral_a", singular_decay=0.3, grad_norm="rms"),
        model_with("spectral_a"),
    )
    for model in (by_config, by_call):
        optimizer = torch.optim.AdamW(trainable(model), lr=0.01, weight_decay=0.0)
        if model is by_call:
            assert spectune.attach_dynamics(optimizer, model, singular_decay=0.3, grad_norm="rms") == 2
        for _ in range(3):
            backward(model)
            optimizer.step()
            optimizer.zero_grad()
    assert all(torch.equal(a, b) for a, b in zip(trainable(by_config), trainable(by_call), strict=True))


def test_a_second_decay_by_the_optimizer_is_refused() -> None:
    model = model_with("spectral_a", singular_decay=0.3)
    backward(model)
    with pytest.raises(SpectuneError, match=r"lin[01]: singular_decay=0.3 and the optimizer's weight_decay=0.01"):
        torch.optim.AdamW(trainable(model), lr=0.01).step()


def test_decay_without_singular_directions_is_refused() -> None:
    model = model_with("lidb", singular_decay=0.3)
    backward(model)
    with pytest.raises(SpectuneError, match="needs singular directions, and lidb has none"):
        torch.optim.SGD(trainable(model), lr=0.01).step()


def test_dynamics_of_a_model_without_adapters_are_refused() -> None:
    model = TINY.fresh()
    with pytest.raises(SpectuneError, match="no spectral adapter"):
        spectune.attach_dynamics(torch.optim.SGD(model.parameters(), lr=0.1), model, grad_norm="rms")


def test_a_copied_model_keeps_its_dynamics() -> None:
    model = copy.deepcopy(model_with("spectral_a", grad_norm="rms"))
    backward(model)
    torch.optim.SGD(trainable(model), lr=0.0).step()
    gradient = modules(model)[0].A_U.grad
    torch.testing.assert_close(gradient.square().mean(0).sqrt(), torch.ones(gradient.shape[1]), rtol=1e-3, atol=1e-3)


HOOKS = "from torch.optim.optimizer import _global_optimizer_pre_hooks as hooks"
ATTACHED = """
import spectune, peft, torch
{hooks}
assert not hooks, "importing"
peft.get_peft_model(torch.nn.Sequential(torch.nn.Linear(4, 4)), spectune.SpectralConfig(r=2, target_modules=["0"]))
assert not hooks, "attaching an adapter that asks for nothing"
for _ in range(2):
    base = torch.nn.Sequential(torch.nn.Linear(4, 4))
    peft.get_peft_model(base, spectune.SpectralConfig(r=2, target_modules=["0"], {option}))
    assert len(hooks) == 1
"""
UNPICKLED = """
import pickle, sys
{hooks}
module = pickle.load(open({path!r}, "rb"))
assert len(hooks) == 1 and "peft" not in sys.modules
"""


def in_a_fresh_process(code: str) -> None:
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_optimizers_are_watched_once_and_only_when_a_config_asks() -> None:
    in_a_fresh_process(ATTACHED.format(hooks=HOOKS, option="grad_norm='rms'"))
    # Forked from a process that has imported spectune and its command line.
    warm = script(ATTACHED.format(hooks=HOOKS, option="singular_decay=0.1"))
    assert warm.returncode == 0, warm.stderr


def test_an_adapter_that_another_process_unpickles_is_watched_there(tmp_path: Path) -> None:
    module = modules(model_with("spectral_a", grad_norm="rms"))[0]
    module.base_matrix = None
    (tmp_path / "module").write_bytes(pickle.dumps(module))
    in_a_fresh_process(UNPICKLED.format(hooks=HOOKS, path=str(tmp_path / "module")))


def test_trainer_applies_the_config_through_accelerate_and_accumulation(tmp_path: Any) -> None:
    from transformers import Trainer, TrainingArguments

    tiny = MODELS["bert"]
    rows = [
        {"input_ids": ids.tolist(), "labels": i % 3} for i, ids in enumerate(tiny.inputs()["input_ids"].repeat(4, 1))
    ]
    norms: list[float] = []

    def watch(optimizer: Any, args: Any, kwargs: Any) -> None:
        module = modules(model)[0]
        norms.append(float(module.A_U.grad.square().mean().sqrt()))

    model = get_peft_model(
        tiny.fresh(), config_for(tiny, "spectral_a", grad_norm="rms", modules_to_save=["classifier"])
    )
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=2, gradient_accumulation_steps=2,
        report_to=[], save_strategy="no", use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(model=model, args=arguments, train_dataset=rows)
    trainer.create_optimizer()
    trainer.optimizer.register_step_post_hook(watch)
    trainer.train()
    assert norms == pytest.approx([1.0, 1.0], rel=1e-2)


def test_weight_dropout_disturbs_training_only_and_keeps_the_mean() -> None:
    model = get_peft_model(
        TINY.fresh(), SpectralConfig(method="specadapt", r=2, weight_dropout=0.5, target_modules=["lin1"])
    )
    train(model, 0.5)
    module, x = modules(model)[0], torch.randn(4, 20)
    module.eval()
    steady = module(x)
    assert torch.equal(module(x), steady)
    module.train()
    torch.manual_seed(0)
    draws = torch.stack([module(x).detach() for _ in range(4000)])
    assert not torch.equal(draws[0], draws[1])
    torch.testing.assert_close(draws.mean(0), steady.detach(), rtol=0.1, atol=0.1)
    layer = next(m for m in model.modules() if hasattr(m, "spectune_adapter"))
    assert torch.equal(layer.get_delta_weight("default"), layer.get_delta_weight("default"))


def test_the_shared_core_is_one_tensor_for_the_whole_model() -> None:
    model = model_with("specadapt")
    first, second = modules(model)
    assert "H" in dict(first.named_parameters()) and "H" not in dict(second.named_parameters())
    before = second(torch.ones(1, 20))
    first.H.data.mul_(2)
    torch.testing.assert_close(second(torch.ones(1, 20)), 2 * before)
    assert OPTIONS["specadapt"]["r"] == 2
