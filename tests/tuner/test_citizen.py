"""What every PEFT user takes for granted, for every method on every tiny model."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model

from spectune import METHODS, SpectralConfig
from spectune.adapter import spectral_modules
from spectune.tuner import SpectralLayer

from ..models import MODELS, Tiny, output
from .conftest import adapted, config_for, train

# Merging rounds W + dW once in float32; logits of these tiny models are of order one, 3e-6 is met.
MERGE_TOLERANCE = 2e-5


def test_the_untrained_model_is_the_base_bit_for_bit(tiny: Tiny, method: str) -> None:
    base = output(tiny.fresh(), tiny.inputs())
    assert torch.equal(output(get_peft_model(tiny.fresh(), config_for(tiny, method)).eval(), tiny.inputs()), base)


def test_base_weights_are_the_same_tensors_before_and_after(tiny: Tiny, method: str) -> None:
    model = tiny.fresh()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    train(get_peft_model(model, config_for(tiny, method)))
    after = {name.replace(".base_layer", ""): t for name, t in model.state_dict().items() if ".spectune_" not in name}
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_disabling_gives_the_base_back_bit_for_bit(tiny: Tiny, method: str) -> None:
    model, base = adapted(tiny, method), output(tiny.fresh(), tiny.inputs())
    tuned = output(model, tiny.inputs())
    assert (tuned - base).abs().max() > 1e-3
    with model.disable_adapter():
        assert torch.equal(output(model, tiny.inputs()), base)
    assert torch.equal(output(model, tiny.inputs()), tuned)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_a_saved_adapter_loads_to_the_same_bits(
    tiny: Tiny, method: str, low_cpu_mem_usage: bool, tmp_path: Path
) -> None:
    model = adapted(tiny, method)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny.fresh(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage).eval()
    assert torch.equal(output(loaded, tiny.inputs()), output(model, tiny.inputs()))


@pytest.mark.parametrize("safe_merge", [False, True])
def test_merging_agrees_with_the_forward_and_unmerging_restores_every_bit(
    tiny: Tiny, method: str, safe_merge: bool
) -> None:
    model = adapted(tiny, method)
    tuned = output(model, tiny.inputs())
    weights = {name: layer.base_layer.weight.clone() for name, layer in layers(model)}
    model.merge_adapter(safe_merge=safe_merge)
    torch.testing.assert_close(output(model, tiny.inputs()), tuned, rtol=0, atol=MERGE_TOLERANCE)
    assert any(not torch.equal(layer.base_layer.weight, weights[name]) for name, layer in layers(model))
    model.unmerge_adapter()
    assert all(torch.equal(layer.base_layer.weight, weights[name]) for name, layer in layers(model))
    assert torch.equal(output(model, tiny.inputs()), tuned)


def layers(model: torch.nn.Module) -> list[tuple[str, SpectralLayer]]:
    return [(name, m) for name, m in model.named_modules() if isinstance(m, SpectralLayer)]


def test_merge_and_unload_leaves_a_plain_model(tiny: Tiny, method: str) -> None:
    model = adapted(tiny, method)
    tuned = output(model, tiny.inputs())
    plain = model.merge_and_unload()
    assert not layers(plain) and type(plain) is type(tiny.fresh())
    torch.testing.assert_close(output(plain, tiny.inputs()), tuned, rtol=0, atol=MERGE_TOLERANCE)


def test_unload_gives_the_base_back(tiny: Tiny, method: str) -> None:
    plain = adapted(tiny, method).unload()
    assert torch.equal(output(plain, tiny.inputs()), output(tiny.fresh(), tiny.inputs()))


def test_a_training_step_moves_only_the_adapter(tiny: Tiny, method: str) -> None:
    model = get_peft_model(tiny.fresh(), config_for(tiny, method)).train()
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trainable and all(".spectune_adapter.default." in name for name in trainable)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(2):
        result = model(**tiny.inputs())
        loss = (result if isinstance(result, torch.Tensor) else result.logits).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert not torch.equal(output(model.eval(), tiny.inputs()), output(tiny.fresh(), tiny.inputs()))


def test_copies_and_pickles_give_the_same_output(tiny: Tiny, method: str) -> None:
    model = adapted(tiny, method)
    tuned = output(model, tiny.inputs())
    assert torch.equal(output(copy.deepcopy(model), tiny.inputs()), tuned)
    assert torch.equal(output(pickle.loads(pickle.dumps(model)), tiny.inputs()), tuned)


def test_delta_weight_is_the_change_of_the_base_weight(tiny: Tiny, method: str) -> None:
    model = adapted(tiny, method)
    for _, layer in layers(model):
        before = layer.base_layer.weight.clone()
        delta = layer.get_delta_weight("default")
        assert delta.shape == before.shape
        layer.merge()
        torch.testing.assert_close(layer.base_layer.weight, before + delta)


def test_adapters_of_different_methods_live_side_by_side(tiny: Tiny) -> None:
    model = tiny.fresh()
    peft_model = get_peft_model(model, config_for(tiny, "spectral_a"), adapter_name="spectral_a")
    for name in list(METHODS)[1:]:
        peft_model.add_adapter(name, config_for(tiny, name))
    for _, name, module in spectral_modules(peft_model):
        module.requires_grad_(True)
        train(module, seed=len(name))
    for name in METHODS:
        peft_model.set_adapter(name)
        alone = get_peft_model(tiny.fresh(), config_for(tiny, name))
        for _, _, module in spectral_modules(alone):
            train(module, seed=len(name))
        assert torch.equal(output(peft_model.eval(), tiny.inputs()), output(alone.eval(), tiny.inputs())), name


def test_several_active_adapters_add_up_and_merge_in_any_order(tiny: Tiny) -> None:
    model = adapted(tiny, "spectral_a")
    model.add_adapter("other", config_for(tiny, "svft"))
    for _, name, module in spectral_modules(model):
        if name == "other":
            train(module.requires_grad_(True), seed=3)
    model.base_model.set_adapter(["default", "other"])
    both = output(model.eval(), tiny.inputs())
    for order in (["default", "other"], ["other", "default"]):
        model.merge_adapter(adapter_names=order)
        torch.testing.assert_close(output(model, tiny.inputs()), both, rtol=0, atol=MERGE_TOLERANCE)
        model.unmerge_adapter()
    assert torch.equal(output(model, tiny.inputs()), both)


def test_an_adapter_added_while_another_is_merged_is_built_on_the_original_weight(tiny: Tiny) -> None:
    alone = get_peft_model(tiny.fresh(), config_for(tiny, "svft"), adapter_name="second")
    model = adapted(tiny, "spectral_a")
    model.merge_adapter()
    model.add_adapter("second", config_for(tiny, "svft"))
    theirs = {layer: module.U_OR for layer, name, module in spectral_modules(model) if name == "second"}
    for layer, _, module in spectral_modules(alone):
        assert torch.equal(theirs[layer], module.U_OR)


def test_deleting_an_adapter_leaves_the_others(tiny: Tiny) -> None:
    model = adapted(tiny, "spectral_a")
    model.add_adapter("other", config_for(tiny, "svdiff"))
    model.delete_adapter("default")
    assert {name for _, name, _ in spectral_modules(model)} == {"other"}
    assert torch.equal(output(model.eval(), tiny.inputs()), output(tiny.fresh(), tiny.inputs()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_bases_do_not_drift_at_zero(tiny: Tiny, method: str, dtype: torch.dtype) -> None:
    base = tiny.fresh().to(dtype)
    inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in tiny.inputs().items()}
    expected = output(base, inputs)
    model = get_peft_model(base, config_for(tiny, method)).eval()
    assert torch.equal(output(model, inputs), expected)
    assert all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad)
    assert all(m.S_R.dtype == torch.float32 for _, _, m in spectral_modules(model))
    train(model)
    assert output(model, inputs).dtype == dtype
    model.merge_adapter()
    assert all(layer.base_layer.weight.dtype == dtype for _, layer in layers(model))


def test_adapters_keep_the_base_dtype_without_autocast(method: str) -> None:
    tiny = MODELS["llama"]
    model = get_peft_model(tiny.fresh().to(torch.bfloat16), config_for(tiny, method), autocast_adapter_dtype=False)
    assert all(p.dtype == torch.bfloat16 for p in model.parameters() if p.requires_grad)
    assert output(model.eval(), tiny.inputs()).dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "t5", "vit"])
def test_transformers_loads_an_adapter_natively(name: str, method: str, tmp_path: Path) -> None:
    tiny = MODELS[name]
    model = adapted(tiny, method)
    model.save_pretrained(tmp_path)
    native = tiny.fresh()
    native.load_adapter(str(tmp_path), adapter_name="mine")
    torch.testing.assert_close(output(native, tiny.inputs()), output(model, tiny.inputs()), rtol=0, atol=1e-6)
    native.disable_adapters()
    assert torch.equal(output(native, tiny.inputs()), output(tiny.fresh(), tiny.inputs()))
    native.enable_adapters()
    native.delete_adapter("mine")
    assert torch.equal(output(native, tiny.inputs()), output(tiny.fresh(), tiny.inputs()))


def test_auto_classes_find_base_and_adapter(method: str, tmp_path: Path) -> None:
    tiny = MODELS["llama"]
    tiny.fresh().save_pretrained(tmp_path / "base")
    base = type(tiny.fresh()).from_pretrained(tmp_path / "base")
    model = get_peft_model(base, config_for(tiny, method, task_type="CAUSAL_LM"))
    train(model)
    model.save_pretrained(tmp_path / "adapter")
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    torch.testing.assert_close(output(loaded, tiny.inputs()), output(model.eval(), tiny.inputs()), rtol=0, atol=1e-6)


def test_modules_to_save_travel_with_the_adapter(method: str, tmp_path: Path) -> None:
    tiny = MODELS["bert"]
    model = adapted(tiny, method, modules_to_save=["classifier"])
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny.fresh(), tmp_path).eval()
    torch.testing.assert_close(output(loaded, tiny.inputs()), output(model, tiny.inputs()), rtol=0, atol=1e-6)


def test_all_linear_adapts_every_linear_layer_but_the_head_twice_in_a_row() -> None:
    tiny = MODELS["llama"]
    model = get_peft_model(tiny.fresh(), SpectralConfig(target_modules="all-linear", r=2))
    first = [name for name, _ in layers(model)]
    assert len(first) == 14 and not any("lm_head" in name for name in first)
    model.add_adapter("second", SpectralConfig(method="svft", target_modules="all-linear"))
    assert [layer for layer, name, _ in spectral_modules(model) if name == "second"] == first


def test_targets_have_defaults_for_known_architectures() -> None:
    model = get_peft_model(MODELS["llama"].fresh(), SpectralConfig())
    assert {name.rpartition(".")[2] for name, _ in layers(model)} == {"q_proj", "v_proj"}


def test_rank_pattern_and_layers_to_transform_choose_per_layer(tmp_path: Path) -> None:
    tiny = MODELS["llama"]
    config = SpectralConfig(
        r=2,
        rank_pattern={"v_proj": 5},
        target_modules=["q_proj", "v_proj"],
        layers_to_transform=[0],
        layers_pattern="layers",
    )
    model = get_peft_model(tiny.fresh(), config)
    found = {layer.removeprefix("base_model.model.model."): len(m.columns) for layer, _, m in spectral_modules(model)}
    assert found == {"layers.0.self_attn.q_proj": 2, "layers.0.self_attn.v_proj": 5}
    train(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny.fresh(), tmp_path).eval()
    torch.testing.assert_close(output(loaded, tiny.inputs()), output(model.eval(), tiny.inputs()), rtol=0, atol=1e-6)


def test_layer_status_names_the_layers(method: str) -> None:
    model = adapted(MODELS["llama"], method)
    status = model.get_layer_status()
    assert {s.module_type for s in status} == {"spectune.SpectralLinear"}
    assert model.get_model_status().peft_types == {"default": "SPECTUNE"}


def test_gradient_checkpointing_gives_the_same_gradients(method: str) -> None:
    tiny = MODELS["llama"]
    grads = []
    for checkpointing in (False, True):
        model = adapted(tiny, method).train()
        if checkpointing:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable()
        model(**tiny.inputs(), labels=tiny.inputs()["input_ids"]).loss.backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None and ".spectune_" in n})
    assert grads[0].keys() == grads[1].keys() and grads[0]
    for name, gradient in grads[0].items():
        torch.testing.assert_close(grads[1][name], gradient)
