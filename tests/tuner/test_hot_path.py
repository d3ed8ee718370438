"""What a training step of a linear layer keeps, makes and reads: the roads of `tuned_product` and their dtype."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from spectune import METHODS, SpectralConfig
from spectune.adapter import SpectralModule, spectral_modules
from spectune.tuner import kinds

from .conftest import OPTIONS, train

N, I, O, R = 96, 64, 48, 4
FULL = {
    "svft": {"method": "svft"},
    "svft banded": {"method": "svft", "pattern": "banded"},
    "svdiff": {"method": "svdiff"},
}
NARROW: dict[str, dict[str, Any]] = {
    "spectral_r": {"method": "spectral_r", "r": R},
    "svft": {"method": "svft", "basis_rank": R},
    "svft banded": {"method": "svft", "basis_rank": R, "pattern": "banded"},
    "svdiff": {"method": "svdiff", "basis_rank": R},
}


class One(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float32, bias: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(I, O, bias=bias, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x)


def one(config: Any, dtype: torch.dtype = torch.float32) -> Any:
    config.target_modules = {"linear"}
    return get_peft_model(One(dtype), config).train()


def only(model: nn.Module) -> SpectralModule:
    ((_, _, module),) = spectral_modules(model)
    return module


def tokens(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(2, N // 2, I, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()


def kept(model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """What autograd keeps of one forward beyond parameters, buffers and the input's own bytes."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    for module in model.modules():
        if isinstance(module, SpectralModule):
            own |= {entry[2].untyped_storage().data_ptr() for entry in module._cast.values()}
    found: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            found[tensor.untyped_storage().data_ptr()] = tensor.detach()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = model(x)
    assert y.requires_grad
    return list(found.values())


def nbytes(tensors: list[torch.Tensor]) -> int:
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", list(NARROW))
def test_frozen_factors_keep_n_times_r_numbers_and_not_the_input(name: str, dtype: torch.dtype) -> None:
    model, x = one(SpectralConfig(**NARROW[name]), dtype), tokens(dtype)
    model(x)  # the rounded basis is made here
    tensors = kept(model, x)
    assert all(tensor.numel() < N * I for tensor in tensors)
    # z on its way to the core and behind it, and little matrices of R x R.
    assert nbytes(tensors) <= 2 * N * R * dtype.itemsize + 40 * R * R * 4
    lora = kept(one(LoraConfig(r=R), dtype), x)
    assert nbytes(tensors) < nbytes(lora) / 4


@pytest.mark.parametrize("method", list(METHODS))
def test_no_method_keeps_more_of_a_token_than_lora_of_its_rank(method: str) -> None:
    options = {"method": method, **({"r": R} if "r" in METHODS[method].options() else {"basis_rank": R})}
    tensors = kept(one(SpectralConfig(**options)), tokens())
    of_tokens = sum(tensor.numel() for tensor in tensors if tensor.numel() % N == 0)
    lora = sum(tensor.numel() for tensor in kept(one(LoraConfig(r=R)), tokens()) if tensor.numel() % N == 0)
    extra = 50 + 100 if method == "lidb" else 3 * R  # lidb works in 50 x 100 directions, spectral_a in 2 r
    assert of_tokens <= lora + N * extra


@pytest.mark.parametrize("options", list(FULL.values()), ids=list(FULL))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_roads_give_the_same_output_and_gradients(
    options: dict[str, Any], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = one(SpectralConfig(**options), dtype), tokens(dtype)
    train(model)
    weights = torch.randn(2, N // 2, O, generator=torch.Generator().manual_seed(2))
    found = []
    for wide in (False, True):
        monkeypatch.setattr(kinds, "is_dense_cheaper", lambda *args, wide=wide: wide)
        y = model(x)
        parameter = next(iter(only(model).parameters()))
        found.append((y, *torch.autograd.grad((y.float() * weights).sum(), (x, parameter))))
    # bfloat16 keeps 8 bits: 2^-8 of the largest entry for each of the few roundings on the way.
    close = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 0.05, "atol": 0.05}
    for factored, built in zip(*found, strict=True):
        scale = factored.abs().max()
        torch.testing.assert_close(factored / scale, built / scale, **close)


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", list(METHODS))
def test_every_road_begins_at_the_base_bit_for_bit(
    method: str, dtype: torch.dtype, wide: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kinds, "is_dense_cheaper", lambda *args: wide)
    model = one(SpectralConfig(method=method, **OPTIONS[method]), dtype)
    assert torch.equal(model(tokens(dtype)), One(dtype)(tokens(dtype)))


def test_a_wide_update_is_built_where_that_is_cheaper(monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[bool] = []
    dense = kinds.dense
    monkeypatch.setattr(kinds, "dense", lambda delta: built.append(True) or dense(delta))
    model = one(SpectralConfig(method="svft"))
    model(tokens()[:, :4])
    assert not built  # 8 tokens
    model(tokens())
    assert built  # 96 tokens of 64 numbers


CORES: dict[str, dict[str, Any]] = {
    "svft dense": {"method": "svft", "pattern": "dense", "basis_rank": 10},
    "svft dense, rectangular": {"method": "svft", "pattern": "dense", "core": (10, 7)},
}


@pytest.mark.parametrize("options", list(CORES.values()), ids=list(CORES))
def test_a_core_that_is_built_gives_what_its_factors_give(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = one(SpectralConfig(**options, bias="all")), tokens()
    train(model)
    weights = torch.randn(2, N // 2, O, generator=torch.Generator().manual_seed(2))
    found = []
    for built in (False, True):
        monkeypatch.setattr(kinds, "is_core_built", lambda *args, built=built: built)
        y, wanted = model(x), [x, *(p for p in model.parameters() if p.requires_grad)]
        found.append((y, *torch.autograd.grad((y * weights).sum(), wanted)))
    assert len(found[1]) == 4  # of the input, the core and the bias
    for factored, built in zip(*found, strict=True):
        scale = factored.abs().max()
        torch.testing.assert_close(factored / scale, built / scale, rtol=1e-5, atol=1e-5)


def test_a_core_is_built_for_more_tokens_than_the_weight_is_wide_and_keeps_n_times_q(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    built: list[int] = []
    product = kinds.with_built_core
    monkeypatch.setattr(kinds, "with_built_core", lambda x, *more: built.append(len(x)) or product(x, *more))
    model, x = one(SpectralConfig(method="svft", pattern="dense", basis_rank=16)), tokens()
    model(x[:, :12])
    assert built == []  # 24 tokens of 64 numbers
    assert [tensor.numel() for tensor in kept(model, x)] == [N * 16]
    assert built == [N]
    half = one(SpectralConfig(method="svft", pattern="dense", basis_rank=16), torch.bfloat16)
    half(tokens(torch.bfloat16))
    assert built == [N]  # W + dW would round the update away


def test_training_a_dense_core_is_training_the_band_that_covers_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kinds, "is_core_built", lambda *args: False)
    losses: list[list[float]] = []
    for options in ({"pattern": "banded", "off_diagonals": 9}, {"pattern": "dense"}):
        model = one(SpectralConfig(method="svft", basis_rank=10, grad_norm="rms", singular_decay=0.1, **options))
        optimizer = torch.optim.AdamW(only(model).parameters(), lr=0.01, weight_decay=0.0)
        losses.append([])
        for _ in range(5):
            loss = (model(tokens()) - 1).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[-1].append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)  # the norm adds the same numbers in another order
    assert losses[0][-1] < losses[0][0]


def test_half_precision_is_not_cast_up_and_stays_within_its_rounding() -> None:
    model, x = one(SpectralConfig(method="spectral_r", r=8), torch.bfloat16), tokens(torch.bfloat16)
    train(model, scale=0.5)
    module = only(model)
    # Autograd keeps z_NR in bfloat16; a float32 z would mean that x was cast up.
    assert all(tensor.dtype == torch.bfloat16 for tensor in kept(model, x) if tensor.numel() >= N * 8)
    update = model(x).double() - One(torch.bfloat16)(x).double()
    delta_OI = module.delta().left_OP.double() @ module.delta().core.double() @ module.delta().right_QI.double()
    wanted = x.double() @ delta_OI.T
    # Two outputs rounded to 2^-9 of themselves, and four rounded factors.
    allowed = 2**-8 * model(x).double().abs().max() + 4 * 2**-8 * wanted.abs().max()
    assert (update - wanted).abs().max() <= allowed


def test_the_rounded_basis_is_made_once_and_again_when_the_basis_changes() -> None:
    model, x = one(SpectralConfig(method="spectral_r", r=8), torch.bfloat16), tokens(torch.bfloat16)
    module = only(model)
    model(x)
    first = module.factors_in(torch.bfloat16)[0]
    model(x)
    assert module.factors_in(torch.bfloat16)[0] is first
    module.U_OR.copy_(-module.U_OR)
    assert torch.equal(module.factors_in(torch.bfloat16)[0], -first)
    module.U_OR = -module.U_OR
    assert torch.equal(module.factors_in(torch.bfloat16)[0], first)


def test_a_wide_basis_is_not_kept_twice() -> None:
    model = one(SpectralConfig(method="svft"), torch.bfloat16)
    model(tokens(torch.bfloat16))
    assert not only(model)._cast


@pytest.mark.parametrize("method", list(METHODS))
def test_numbers_written_past_autograd_count_in_the_next_forward(method: str) -> None:
    # DeepSpeed and averaging of weights write through `.data`, which no version counter notices.
    model, x = one(SpectralConfig(method=method, **OPTIONS[method])), tokens()
    before = model(x)
    for parameter in only(model).parameters():
        parameter.data.add_(0.1)
    assert not torch.equal(model(x), before)


def test_hooks_on_the_base_layer_still_see_it() -> None:
    model = one(SpectralConfig(method="spectral_r", r=R))
    train(model)
    x, seen = tokens(), []
    plain = model(x)
    base = model.base_model.model.linear.base_layer
    handle = base.register_forward_hook(lambda module, inputs, output: seen.append(output.shape))
    torch.testing.assert_close(model(x), plain)
    assert seen == [torch.Size([2, N // 2, O])]
    handle.remove()
    base.forward = lambda value: 2 * nn.Linear.forward(base, value)  # as accelerate's hooks do
    torch.testing.assert_close(model(x), plain + One()(x))


def test_an_output_that_the_base_keeps_is_never_written_into() -> None:
    class Keeping(nn.Linear):
        def forward(self, value: torch.Tensor) -> torch.Tensor:
            self.kept = super().forward(value)
            return self.kept

    base = One()
    base.linear.__class__ = Keeping
    model = get_peft_model(base, SpectralConfig(method="spectral_r", r=R, target_modules=["linear"]))
    train(model)
    y = model(tokens())
    assert not torch.equal(base.linear.base_layer.kept, y)
    assert torch.equal(base.linear.base_layer.kept, One()(tokens()))


@pytest.mark.parametrize("shape", [(I,), (0, I), (3, I), (2, 3, 4, I)])
def test_inputs_of_every_shape_keep_their_axes(shape: tuple[int, ...]) -> None:
    model = one(SpectralConfig(method="spectral_r", r=R))
    assert model(torch.ones(shape)).shape == (*shape[:-1], O)


def test_autocast_casts_the_input_once_for_base_and_adapter() -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    casts: list[int] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            if func is torch.ops.aten._to_copy.default and result.numel() == N * I:
                casts.append(1)
            return result

    model, x = one(SpectralConfig(method="spectral_r", r=R)), tokens()
    with torch.autocast("cpu", dtype=torch.bfloat16), Watch():
        assert model(x).dtype == torch.bfloat16
    assert len(casts) == 1
