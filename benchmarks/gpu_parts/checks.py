"""What must hold on any device, as functions: part a of gpu.py calls them, and so does the suite.

Each gets a device and raises AssertionError; what it returns are the figures behind its verdict.
"""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from spectune import METHODS, AdapterBank, SpectralConfig, decompose
from spectune.adapter import spectral_modules
from spectune.algebra import dense

# The smallest form of each method that still has every part.
OPTIONS: dict[str, dict[str, Any]] = {
    "spectral_a": {"r": 3},
    "spectral_r": {"r": 4, "train_singular_values": True},
    "svft": {"pattern": "random", "off_diagonals": 2},
    "specadapt": {"r": 2},
    "one_sided": {"r": 3},
    "svdiff": {},
    "lidb": {"r": 2},
    "orthogonal_adaptation": {"r": 2},
}
FROZEN_FACTORS = ("spectral_r", "svft", "svdiff")
SPECTRAL = tuple(name for name in METHODS if name not in ("lidb", "orthogonal_adaptation"))
TARGETS = ["q_proj", "v_proj", "down_proj"]
# What a basis found by another solver, on another device, may do to an update: the file's sketch turns it back, and
# what is left is the solver's angle (1e-4 asked for).
SAME_UPDATE = 1e-3


def base() -> LlamaForCausalLM:
    """Get the same tiny Llama every time, on the CPU; with ten times the usual deviation, so that its layers matter."""
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
        pad_token_id=0,
        initializer_range=0.2,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForCausalLM(config).eval()


def adapted(device: str, method: str, **more: Any) -> PeftModel:
    """Get the model on the device with a fresh adapter."""
    config = SpectralConfig(method=method, target_modules=TARGETS, **{**OPTIONS[method], **more})
    return get_peft_model(base().to(device), config)


def ids(device: str) -> torch.Tensor:
    return torch.randint(3, 60, (3, 6), generator=torch.Generator().manual_seed(7)).to(device)


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def move(model: nn.Module, seed: int = 0, scale: float = 0.05) -> nn.Module:
    """Stand in for training: the same numbers on every device."""
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in trained(model):
            parameter += scale * torch.randn(parameter.shape, generator=random).to(parameter)
    return model


def loss_of(model: Any, inputs: torch.Tensor) -> torch.Tensor:
    loss: torch.Tensor = model(input_ids=inputs, labels=inputs).loss
    return loss


def updates(model: nn.Module) -> dict[str, torch.Tensor]:
    """Get the dense update of every layer, in float64 on the CPU."""
    with torch.no_grad():
        deltas = {path: module.delta() for path, _, module in spectral_modules(model)}
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            return {path: dense(delta).double().cpu() for path, delta in deltas.items()}


def apart(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> float:
    """Get the largest relative distance of two sets of tensors, which must have the same names."""
    assert found.keys() == wanted.keys(), f"{sorted(found.keys() ^ wanted.keys())} are only in one"
    norm = torch.linalg.vector_norm
    return max(float(norm(found[name] - wanted[name]) / norm(wanted[name])) for name in wanted)


def holds(figure: float, most: float, what: str) -> dict[str, Any]:
    assert figure <= most, f"{what}: {figure:.3g}, at most {most:.3g} is allowed"
    return {what: figure, "most": most}


def gradients(model: nn.Module, inputs: torch.Tensor, **how: Any) -> dict[str, torch.Tensor]:
    model.zero_grad()
    with torch.autocast(inputs.device.type, enabled=bool(how), **how):
        loss = loss_of(model, inputs)
    loss.backward()
    named = dict(model.named_parameters())
    return {name: p.grad.double().cpu() for name, p in named.items() if p.grad is not None}


def solver_agrees(device: str, solver: str) -> dict[str, Any]:
    """A weight on the device has the directions that the SVD in float64 gives."""
    random = torch.Generator().manual_seed(0)
    left_OK, right_IK = (torch.linalg.qr(torch.randn(n, 300, generator=random)).Q for n in (400, 300))
    W_OI = (left_OK * torch.arange(1, 301) ** -1.0) @ right_IK.T
    found = decompose(W_OI.to(device), 8, solver=solver)
    assert found.U_OR.device.type == torch.device(device).type, f"the directions are on {found.U_OR.device}"
    U_OK, S_K, _ = torch.linalg.svd(W_OI.double(), full_matrices=False)
    U_OR, found_OR = U_OK[:, :8], found.U_OR.double().cpu()
    sines_R = torch.linalg.vector_norm(found_OR - U_OR * (U_OR * found_OR).sum(0), dim=0)
    values = float((found.S_R.double().cpu() - S_K[:8]).abs().max() / S_K[0])
    assert values < 1e-5, f"singular values are {values:.1e} off"
    return holds(float(sines_R.max()), 1e-3, "angle") | {"solver": found.quality.solver}


def saved_adapter_loads_on_the_cpu(device: str, method: str) -> dict[str, Any]:
    """Attach, three steps, save; loaded on the CPU the file gives the same update and the same logits."""
    model, inputs = adapted(device, method), ids(device)
    optimizer = torch.optim.AdamW(trained(model), lr=1e-2, weight_decay=0.0)
    losses = []
    for _ in range(3):
        loss = loss_of(model.train(), inputs)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0], f"three steps did not lower the loss: {losses}"
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        loaded = PeftModel.from_pretrained(base(), folder)
    return holds(apart(updates(loaded), updates(model)), SAME_UPDATE, "update") | {"loss": losses}


def autocast_rounds_once(device: str, method: str, dtype: torch.dtype) -> dict[str, Any]:
    """Under autocast an update is made up in float32 and is that of no autocast, bit for bit; gradients are near."""
    model, inputs = move(adapted(device, method)), ids(device)
    exact = updates(model)
    with torch.autocast(torch.device(device).type, dtype=dtype):
        module = next(module for _, _, module in spectral_modules(model))
        assert module.delta().left_OP.dtype == torch.float32, "an update was made up in half precision"
        assert module.delta_in(dtype).left_OP.dtype == dtype, "an update was not rounded to the inputs' dtype"
        same = updates(model)
    wanted, found = gradients(model, inputs), gradients(model, inputs, dtype=dtype)
    # The network's own rounding: some ten roundings in a row, each of eps, on gradients that partly cancel.
    most = 60 * torch.finfo(dtype).eps
    return holds(apart(same, exact), 1e-6, "update") | holds(apart(found, wanted), most, "gradient")


def grad_scaler_steps(device: str) -> dict[str, Any]:
    """float16 with a GradScaler: unscaled gradients are those of float32, and a step with infinity is skipped."""
    kind = torch.device(device).type
    model, inputs = move(adapted(device, "spectral_r")), ids(device)
    wanted = gradients(model, inputs)
    optimizer = torch.optim.AdamW(trained(model), lr=1e-3)
    scaler = torch.amp.GradScaler(kind, init_scale=2.0**10)
    model.zero_grad()
    with torch.autocast(kind, dtype=torch.float16):
        loss = loss_of(model, inputs)
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    found = {n: p.grad.double().cpu() for n, p in model.named_parameters() if p.grad is not None}
    before = updates(model)
    scaler.step(optimizer)
    scaler.update()
    moved = apart(updates(model), before)
    assert moved > 0, "the step changed nothing"
    before = updates(model)
    trained(model)[0].grad.fill_(float("inf"))  # type: ignore[union-attr]
    scaler.step(optimizer)
    scaler.update()
    assert apart(updates(model), before) == 0, "a step with infinite gradients was not skipped"
    assert scaler.get_scale() < 2.0**10, "the scale was not lowered"
    return holds(apart(found, wanted), 60 * torch.finfo(torch.float16).eps, "gradient") | {"moved": moved}


def checkpointing_changes_nothing(device: str, method: str) -> dict[str, Any]:
    """Gradient checkpointing gives the gradients of the plain backward."""
    model, inputs = move(adapted(device, method)).train(), ids(device)
    wanted = gradients(model, inputs)
    model.enable_input_require_grads()
    model.base_model.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert model.base_model.model.is_gradient_checkpointing
    return holds(apart(gradients(model, inputs), wanted), 1e-5, "gradient")


def compiled_agrees(device: str, method: str, backend: str) -> dict[str, Any]:
    """torch.compile in one graph, forward and backward, gives what eager gives."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(96, 80), nn.ReLU(), nn.Linear(80, 64)).to(device)
    model = move(get_peft_model(net, SpectralConfig(method=method, target_modules=["0", "2"], **OPTIONS[method])))
    x = torch.randn(5, 96, generator=torch.Generator().manual_seed(1)).to(device)

    def outcome(run: Any) -> dict[str, torch.Tensor]:
        model.zero_grad()
        y = run(x)
        y.square().mean().backward()
        found = {n: p.grad.double().cpu() for n, p in model.named_parameters() if p.grad is not None}
        return found | {"output": y.detach().double().cpu()}

    wanted = outcome(model)
    found = outcome(torch.compile(model, backend=backend, fullgraph=True))
    return holds(apart(found, wanted), 1e-4, "output and gradients") | {"backend": backend}


def bank_serves_each_row(device: str, method: str) -> dict[str, Any]:
    """Every row of a mixed batch is what its adapter gives alone; a row without one is the base, bit for bit."""
    options = {"pattern": "plain", "off_diagonals": None, "basis_rank": 6} if method == "svft" else {}
    models = {name: move(adapted(device, method, **options), seed).eval() for seed, name in enumerate("ab")}
    inputs = ids(device)
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        alone = {name: model(input_ids=inputs).logits for name, model in models.items()}
        bare = base().to(device)(input_ids=inputs).logits
        bank = AdapterBank(models["a"])
        for name, model in models.items():
            model.save_pretrained(f"{folder}/{name}")
            bank.load(f"{name}{name}", f"{folder}/{name}")
        with bank(["bb", "__base__", "aa"]):
            mixed = models["a"](input_ids=inputs).logits
    assert torch.equal(mixed[1], bare[1]), "a row without an adapter is not the base bit for bit"
    rows = {"bb": mixed[0].double().cpu(), "aa": mixed[2].double().cpu()}
    wanted = {"bb": alone["b"][0].double().cpu(), "aa": alone["a"][2].double().cpu()}
    return holds(apart(rows, wanted), SAME_UPDATE, "logits")


def dynamics_act(device: str, method: str) -> dict[str, Any]:
    """`grad_norm` gives gradients of unit size before the step, `singular_decay` takes what the CPU's takes."""
    model = move(adapted(device, method, grad_norm="rms"))
    loss_of(model, ids(device)).backward()
    torch.optim.SGD(trained(model), lr=0.0).step()
    off = 0.0
    for _, _, module in spectral_modules(model):
        for name, axis in module.method.gradient_axes().items():
            off = max(off, float((getattr(module, name).grad.square().mean(axis).sqrt() - 1).abs().max()))
    if method not in SPECTRAL:
        return holds(off, 1e-3, "size")
    decayed = {}
    for where in (device, "cpu"):
        model = move(adapted(where, method, singular_decay=0.5))
        before = {name: p.detach().double().cpu() for name, p in model.named_parameters() if p.requires_grad}
        for parameter in trained(model):
            parameter.grad = torch.zeros_like(parameter)
        torch.optim.SGD(trained(model), lr=0.1).step()
        decayed[where] = {name: p.detach().double().cpu() for name, p in model.named_parameters() if name in before}
        assert apart(decayed[where], before) > 0, f"singular_decay took nothing on {where}"
    return holds(off, 1e-3, "size") | holds(apart(decayed[device], decayed["cpu"]), 1e-4, "decay")
