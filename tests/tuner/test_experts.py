"""Experts that a model stores in one parameter, through `target_parameters`: the contract of every method."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

from spectune import METHODS, AdapterBank, SpectralConfig, SpectuneError
from spectune.adapter import spectral_modules
from spectune.algebra import dense
from spectune.tuner.experts import SpectralParameters

from ..experts import IN_X_OUT, MODELS, TARGETS, fresh, logits
from .conftest import OPTIONS, train


@pytest.fixture(params=list(MODELS))
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=list(METHODS))
def method(request: pytest.FixtureRequest) -> str:
    return str(request.param)


# Every method in both layouts.
LAYOUTS = pytest.mark.parametrize("kind", ["mixtral", "gpt-oss"], indirect=True)


def config_for(method: str = "spectral_a", **more: Any) -> SpectralConfig:
    options = {"method": method, "target_modules": [], "target_parameters": TARGETS, **OPTIONS[method], **more}
    return SpectralConfig(**options)


def adapted(kind: str, method: str = "spectral_a", **more: Any) -> PeftModel:
    model = get_peft_model(fresh(kind), config_for(method, **more)).eval()
    train(model)
    return model


def parameters(model: nn.Module) -> dict[str, torch.Tensor]:
    """The experts' parameters of a model without adapters."""
    return {name: tensor for name, tensor in model.state_dict().items() if name.endswith(tuple(TARGETS))}


def test_every_expert_starts_at_the_base_and_trains(kind: str, method: str) -> None:
    model = fresh(kind)
    base = logits(model)
    peft_model = get_peft_model(model, config_for(method)).eval()
    assert torch.equal(logits(peft_model), base), "the untrained adapter changes the output"
    assert len({layer for layer, _, _ in spectral_modules(peft_model)}) == 2 * 2 * 4
    train(peft_model)
    tuned = logits(peft_model)
    assert (tuned - base).abs().max() > 1e-4
    with peft_model.disable_adapter():
        assert torch.equal(logits(peft_model), base)
    assert torch.equal(logits(peft_model), tuned)


@LAYOUTS
def test_forward_is_the_model_with_the_updates_of_each_expert_in_its_parameters(kind: str, method: str) -> None:
    model, plain = adapted(kind, method), fresh(kind)
    for path, _, module in spectral_modules(model):
        name, _, place = path.removeprefix("base_model.model.").rpartition(".")
        dW_OI = dense(module.delta()).detach()
        plain.get_parameter(name).data[int(place)] += dW_OI.T if kind in IN_X_OUT else dW_OI
    torch.testing.assert_close(logits(model), logits(plain), rtol=1e-4, atol=1e-6)


def test_each_expert_has_the_singular_directions_of_its_own_matrix(kind: str) -> None:
    model, stored = get_peft_model(fresh(kind), config_for("svdiff")), parameters(fresh(kind))
    for path, _, module in spectral_modules(model):
        name, _, place = path.removeprefix("base_model.model.").rpartition(".")
        matrix = stored[name][int(place)]
        W_OI = matrix.T if kind in IN_X_OUT else matrix
        assert W_OI.shape == ((48, 16) if "gate_up" in name else (16, 24)), "outputs and inputs are exchanged"
        torch.testing.assert_close(module.U_OR * module.S_R @ module.Vh_RI, W_OI, rtol=0, atol=1e-6)


@LAYOUTS
def test_gradients_reach_every_number_that_the_batch_reaches(kind: str, method: str) -> None:
    model = adapted(kind, method).train()
    model(input_ids=torch.arange(64)[None]).logits.square().mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (".spectune_adapter." in name), name
        assert not parameter.requires_grad or parameter.grad is not None, name
    reached = sum(bool(torch.count_nonzero(p.grad)) for p in model.parameters() if p.grad is not None)
    assert reached > 0.8 * sum(p.grad is not None for p in model.parameters()), "most experts have tokens among 64"


@LAYOUTS
def test_merging_and_unmerging_restore_every_bit(kind: str, method: str) -> None:
    model, before = adapted(kind, method), parameters(fresh(kind))
    held = {path: p for path, p in model.named_parameters() if path.endswith(("gate_up_proj", "down_proj"))}
    tuned = logits(model)
    model.merge_adapter(safe_merge=True)
    torch.testing.assert_close(logits(model), tuned, rtol=1e-4, atol=1e-6)
    model.unmerge_adapter()
    assert torch.equal(logits(model), tuned)
    for path, parameter in held.items():
        assert model.get_parameter(path) is parameter
        name = path.removeprefix("base_model.model.").replace(".base_layer", "")
        assert torch.equal(parameter, before[name]), name


@LAYOUTS
def test_a_merged_model_is_a_plain_one_with_the_same_output(kind: str, method: str) -> None:
    model = adapted(kind, method)
    tuned = logits(model)
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged), tuned, rtol=1e-4, atol=1e-6)
    assert merged.state_dict().keys() == fresh(kind).state_dict().keys()
    untouched = adapted(kind, method).unload()
    assert all(torch.equal(tensor, fresh(kind).state_dict()[name]) for name, tensor in untouched.state_dict().items())


@pytest.mark.parametrize("save_basis", ["auto", "always", "never"])
def test_a_saved_adapter_loads_to_the_same_output(kind: str, save_basis: str, tmp_path: Path) -> None:
    model = adapted(kind, save_basis=save_basis)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(fresh(kind), tmp_path).eval()
    torch.testing.assert_close(logits(loaded), logits(model), rtol=0, atol=1e-6)
    by_transformers = fresh(kind)
    by_transformers.load_adapter(str(tmp_path))
    torch.testing.assert_close(logits(by_transformers), logits(model), rtol=0, atol=1e-6)


def test_every_method_comes_back_from_its_file(method: str, tmp_path: Path) -> None:
    model = adapted("gpt-oss", method)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(fresh("gpt-oss"), tmp_path, low_cpu_mem_usage=True).eval()
    torch.testing.assert_close(logits(loaded), logits(model), rtol=0, atol=1e-6)


def test_several_adapters_of_other_methods_and_parameters_live_together(kind: str) -> None:
    model = adapted(kind)
    alone = logits(model)
    model.add_adapter("other", config_for("svft", target_parameters=TARGETS[:1], target_modules=["q_proj"]))
    assert torch.equal(logits(model), alone), "a new adapter is not active"
    model.set_adapter("other")
    train(model, seed=1)
    other = logits(model)
    assert (other - alone).abs().max() > 1e-4
    model.base_model.set_adapter(["default", "other"])
    both = logits(model)
    assert (both - alone).abs().max() > 1e-4 and (both - other).abs().max() > 1e-4
    model.delete_adapter("other")
    torch.testing.assert_close(logits(model), alone, rtol=0, atol=0)
    assert {name for _, name, _ in spectral_modules(model)} == {"default"}


def test_the_delta_weight_is_in_the_layout_of_the_parameter(kind: str) -> None:
    model, base = adapted(kind), parameters(fresh(kind))
    merged = parameters(adapted(kind).merge_and_unload())
    wrappers = {path: m for path, m in model.named_modules() if isinstance(m, SpectralParameters)}
    assert len(wrappers) == 2
    for path, wrapper in wrappers.items():
        with pytest.raises(ValueError, match=r"Name one of \['down_proj', 'gate_up_proj'\]"):
            wrapper.get_delta_weight("default")
        for attribute in ("gate_up_proj", "down_proj"):
            name = f"{path.removeprefix('base_model.model.')}.{attribute}"
            delta = wrapper.get_delta_weight("default", attribute)
            torch.testing.assert_close(base[name] + delta, merged[name], rtol=0, atol=1e-6)


def test_a_half_precision_base_is_rounded_once(kind: str) -> None:
    base = fresh(kind).to(torch.bfloat16)
    plain = logits(base)
    model = get_peft_model(base, config_for()).eval()
    assert torch.equal(logits(model), plain)
    train(model)
    tuned = logits(model)
    assert tuned.dtype == torch.bfloat16 and not torch.equal(tuned, plain)
    assert all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad)
    merged = model.merge_and_unload()
    assert torch.equal(logits(merged), tuned), "live and merged are the same rounding of W + dW"


def test_gradients_are_those_without_checkpointing(kind: str) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = adapted(kind).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.enable_input_require_grads()
        model(input_ids=torch.arange(12)[None]).logits.square().mean().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-7)


def test_a_copied_model_has_experts_of_its_own() -> None:
    model = adapted("mixtral")
    twin, tuned = copy.deepcopy(model), logits(model)
    train(twin, seed=5)
    assert (logits(twin) - tuned).abs().max() > 1e-4
    twin.merge_adapter()
    assert torch.equal(logits(model), tuned)


def test_ranks_by_pattern_belong_to_a_parameter_and_come_back(tmp_path: Path) -> None:
    model = adapted("mixtral", rank_pattern={"down_proj": 1, "layers.1.mlp.experts.gate_up_proj": 2})
    ranks = {path.removeprefix("base_model.model."): len(module.columns) for path, _, module in spectral_modules(model)}
    assert {ranks[f"model.layers.0.mlp.experts.down_proj.{place}"] for place in range(4)} == {1}
    assert {ranks[f"model.layers.1.mlp.experts.gate_up_proj.{place}"] for place in range(4)} == {2}
    assert {ranks[f"model.layers.0.mlp.experts.gate_up_proj.{place}"] for place in range(4)} == {3}
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(logits(PeftModel.from_pretrained(fresh("mixtral"), tmp_path).eval()), logits(model))


def test_layers_to_transform_and_exclude_modules_hold_for_parameters() -> None:
    model = get_peft_model(fresh("mixtral"), config_for(layers_to_transform=[1], exclude_modules=["experts.down_proj"]))
    layers = {path.rpartition(".")[0] for path, _, _ in spectral_modules(model)}
    assert layers == {"base_model.model.model.layers.1.mlp.experts.gate_up_proj"}


def test_a_router_is_a_stack_of_one_matrix(tmp_path: Path) -> None:
    model = adapted("mixtral", "svdiff", target_parameters=["gate.weight"])
    base, tuned = logits(fresh("mixtral")), logits(model)
    assert (tuned - base).abs().max() > 1e-5
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(logits(PeftModel.from_pretrained(fresh("mixtral"), tmp_path).eval()), tuned)
    torch.testing.assert_close(logits(model.merge_and_unload()), tuned)


def test_without_target_modules_the_usual_layers_are_tuned_too_as_with_lora() -> None:
    model = get_peft_model(fresh("mixtral"), config_for(target_modules=None))
    leaves = {path.split(".")[-1] for path, _, _ in spectral_modules(model)}
    assert {"q_proj", "v_proj"} <= leaves
    # PEFT's table has no usual layers of this one.
    only = get_peft_model(fresh("gpt-oss"), config_for(target_modules=None))
    assert all(".experts." in path for path, _, _ in spectral_modules(only))


def test_all_linear_says_that_it_leaves_the_experts_out(kind: str) -> None:
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        model = get_peft_model(fresh(kind), SpectralConfig(r=2, target_modules="all-linear"))
    assert not any(".experts." in path for path, _, _ in spectral_modules(model))
    ours = [str(warning.message) for warning in said if "leaves out the experts" in str(warning.message)]
    assert len(ours) == 1 and "target_parameters=['experts.down_proj', 'experts.gate_up_proj']" in ours[0]


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "unknown": ({"target_parameters": ["experts.gate_proj"]}, r"no parameter of MixtralFor.* is called 'experts.gate_"),
    "layer": ({"target_parameters": ["q_proj.weight"]}, "q_proj.weight is the weight of a Linear.*target_modules"),
    "vector": ({"target_parameters": ["input_layernorm.weight"]}, "a parameter with 1 axes is not a matrix"),
    "bias": ({"bias": "spectune_only"}, "bias='spectune_only' cannot be used with target_parameters"),
    "text": ({"target_parameters": "experts.gate_up_proj"}, "target_parameters='experts.gate_up_proj'"),
    "nothing": ({"target_parameters": []}, "target_modules=.*contains no layer"),
}


@pytest.mark.parametrize("case", list(REFUSED))
def test_what_cannot_be_adapted_is_refused_in_one_line(case: str) -> None:
    model, (options, message) = fresh("mixtral"), REFUSED[case]
    before = [name for name, _ in model.named_modules()]
    with pytest.raises(SpectuneError, match=message) as refusal:
        get_peft_model(model, config_for(**options))
    assert "\n" not in str(refusal.value)
    assert [name for name, _ in model.named_modules()] == before


def test_quantised_stacks_are_refused_with_their_name() -> None:
    model = fresh("mixtral")
    experts = model.model.layers[1].mlp.experts
    experts.down_proj = nn.Parameter(experts.down_proj.data.to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(SpectuneError, match=r"layers.1.mlp.experts.down_proj: a stack of quantised weights .*float8"):
        get_peft_model(model, config_for())
    assert not any(isinstance(module, SpectralParameters) for module in model.modules())


def test_a_failed_attachment_leaves_the_model_as_it_was() -> None:
    model = fresh("mixtral")
    model.model.layers[1].mlp.experts.down_proj.data[2, 0, 0] = float("nan")
    before = [name for name, _ in model.named_modules()]
    with pytest.raises(SpectuneError, match=r"layers.1.mlp.experts.down_proj.2: .*NaN"):
        get_peft_model(model, config_for())
    assert [name for name, _ in model.named_modules()] == before


def test_an_expert_without_anything_to_train_is_left_out(kind: str, tmp_path: Path) -> None:
    def with_a_dead_expert() -> nn.Module:
        model = fresh(kind)
        next(p for name, p in model.named_parameters() if name.endswith("experts.down_proj")).data[0] = 0
        return model

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        model = get_peft_model(with_a_dead_expert(), config_for()).eval()
    assert [w for w in said if "left out of the adapter" in str(w.message) and "down_proj.0" in str(w.message)]
    train(model)
    tuned = logits(model)
    assert len(list(spectral_modules(model))) == 15
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(logits(PeftModel.from_pretrained(with_a_dead_expert(), tmp_path).eval()), tuned)
    model.merge_adapter()
    torch.testing.assert_close(logits(model), tuned, rtol=1e-4, atol=1e-6)
    model.unmerge_adapter()
    assert torch.equal(logits(model), tuned)
    torch.testing.assert_close(logits(model.merge_and_unload()), tuned, rtol=1e-4, atol=1e-6)


def test_rows_with_other_adapters_and_banks_are_refused() -> None:
    model = adapted("mixtral", "spectral_r")
    with pytest.raises(SpectuneError, match="adapter_names cannot be used in a model with target_parameters"):
        model(input_ids=torch.zeros(2, 3, dtype=torch.long), adapter_names=["default", "__base__"])
    with pytest.raises(SpectuneError, match=r"AdapterBank: .*experts.gate_up_proj.0 is not a linear layer"):
        AdapterBank(model)
