"""PEFT's conventions beyond loading and merging."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, convert_to_lora, get_peft_model

from spectune import METHODS, SpectralConfig, SpectuneError
from spectune.adapter import spectral_modules
from spectune.tuner import swap_adapter

from ..abilities import start_compiling
from ..models import MODELS, Tiny, output
from .conftest import adapted, config_for, train

LLAMA = MODELS["llama"]


def with_two_adapters(tiny: Tiny, first: str, second: str) -> PeftModel:
    model = adapted(tiny, first)
    model.add_adapter("second", config_for(tiny, second))
    for _, name, module in spectral_modules(model):
        if name == "second":
            train(module.requires_grad_(True), seed=5)
    return model.eval()


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "t5", "vit"])
def test_every_row_of_a_batch_may_have_its_own_adapter(name: str) -> None:
    tiny = MODELS[name]
    model = with_two_adapters(tiny, "spectral_a", "svft")
    inputs = {key: value[:3] for key, value in tiny.inputs().items()}
    rows = len(next(iter(inputs.values())))
    names = ["second", "__base__", "default"][:rows]
    mixed = output(model, {**inputs, "adapter_names": names})
    for row, adapter in enumerate(names):
        if adapter == "__base__":
            with model.disable_adapter():
                alone = output(model, inputs)
        else:
            model.set_adapter(adapter)
            alone = output(model, inputs)
        torch.testing.assert_close(mixed[row], alone[row], rtol=1e-4, atol=1e-5)


def test_unknown_names_in_a_mixed_batch_are_refused() -> None:
    model = adapted(LLAMA, "spectral_a")
    with pytest.raises(ValueError, match="non-existing adapter"):
        output(model, {**LLAMA.inputs(), "adapter_names": ["defualt"] * 3})


def test_mixed_batches_generate() -> None:
    model = with_two_adapters(LLAMA, "spectral_a", "svft")
    inputs = LLAMA.inputs()["input_ids"]
    mixed = model.generate(
        input_ids=inputs, adapter_names=["default", "second", "__base__"], max_new_tokens=3, do_sample=False
    )
    assert mixed.shape == (3, 9)


def test_strength_moves_from_the_base_to_the_trained_adapter(method: str) -> None:
    model, inputs = adapted(LLAMA, method), LLAMA.inputs()
    tuned, base = output(model, inputs), output(LLAMA.fresh(), inputs)
    model.base_model.set_scale("default", 0.0)
    torch.testing.assert_close(output(model, inputs), base, rtol=0, atol=1e-5)
    model.base_model.set_scale("default", 0.5)
    half = output(model, inputs)
    assert not torch.allclose(half, tuned) and not torch.allclose(half, base)
    model.merge_adapter()
    torch.testing.assert_close(output(model, inputs), half, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="is merged. Call unmerge_adapter first"):
        model.base_model.set_scale("default", 1.0)
    model.unmerge_adapter()
    model.base_model.set_scale("default", 1.0)
    assert torch.equal(output(model, inputs), tuned)


@pytest.mark.parametrize("method", ["svft", "orthogonal_adaptation"])
def test_a_weighted_adapter_is_the_weighted_sum_of_updates(method: str) -> None:
    model = with_two_adapters(LLAMA, method, method)
    layer = next(m for m in model.modules() if hasattr(m, "spectune_adapter"))
    model.base_model.add_weighted_adapter(["default", "second"], [0.7, -0.2], "both")
    expected = 0.7 * layer.get_delta_weight("default") - 0.2 * layer.get_delta_weight("second")
    torch.testing.assert_close(layer.get_delta_weight("both"), expected, rtol=1e-5, atol=1e-6)
    model.base_model.add_weighted_adapter(["default"], [1.0], "same")
    torch.testing.assert_close(layer.get_delta_weight("same"), layer.get_delta_weight("default"), rtol=0, atol=1e-6)


@pytest.mark.parametrize("method", ["spectral_a", "spectral_r", "specadapt", "svdiff", "lidb"])
def test_updates_that_do_not_add_up_are_refused_with_another_way(method: str) -> None:
    model = with_two_adapters(LLAMA, method, method)
    with pytest.raises(SpectuneError, match="weigh them with set_scale"):
        model.base_model.add_weighted_adapter(["default", "second"], [0.5, 0.5], "both")
    assert "both" not in model.peft_config


def test_an_adapter_is_swapped_in_place(method: str, tmp_path: Path) -> None:
    first, second = adapted(LLAMA, method), get_peft_model(LLAMA.fresh(), config_for(LLAMA, method))
    train(second, seed=9)
    second.save_pretrained(tmp_path)
    tensors = [p for p in first.parameters() if ".spectune_" in str(p) or p.requires_grad]
    swap_adapter(first, tmp_path)
    torch.testing.assert_close(output(first, LLAMA.inputs()), output(second.eval(), LLAMA.inputs()), rtol=0, atol=1e-5)
    assert all(a is b for a, b in zip(tensors, [p for p in first.parameters() if p.requires_grad], strict=True))


def test_swapping_in_another_shape_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    model = adapted(LLAMA, "spectral_a")
    tuned = output(model, LLAMA.inputs())
    for i, other in enumerate(({"r": 2}, {"target_modules": ["q_proj"]})):
        config = SpectralConfig(**{"r": 3, "target_modules": list(LLAMA.targets), **other})
        get_peft_model(LLAMA.fresh(), config).save_pretrained(tmp_path / str(i))
        with pytest.raises(SpectuneError, match="cannot swap"):
            swap_adapter(model, tmp_path / str(i))
        assert torch.equal(output(model, LLAMA.inputs()), tuned)


def test_pefts_own_conversion_to_lora_agrees(method: str) -> None:
    model = get_peft_model(LLAMA.fresh(), config_for(LLAMA, method, target_modules=["v_proj"]))
    train(model)
    tuned = output(model.eval(), LLAMA.inputs())
    config, tensors = convert_to_lora(model, rank=16)
    lora = get_peft_model(LLAMA.fresh(), config).eval()
    from peft import set_peft_model_state_dict

    set_peft_model_state_dict(lora, tensors)
    torch.testing.assert_close(output(lora, LLAMA.inputs()), tuned, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("bias", ["all", "spectune_only"])
def test_biases_train_and_travel_where_asked(bias: str, tmp_path: Path) -> None:
    tiny = MODELS["bert"]
    model = get_peft_model(tiny.fresh(), config_for(tiny, "spectral_a", bias=bias))
    trained = {n for n, p in model.named_parameters() if p.requires_grad and n.endswith(".bias")}
    assert trained and all(".query." in n or ".value." in n for n in trained) == (bias == "spectune_only")
    train(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny.fresh(), tmp_path).eval()
    torch.testing.assert_close(output(loaded, tiny.inputs()), output(model.eval(), tiny.inputs()), rtol=0, atol=1e-6)


def test_compiled_models_give_the_same_output(method: str) -> None:
    start_compiling()
    model = adapted(MODELS["mlp"], method)
    x = MODELS["mlp"].inputs()["x"]
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x))


def test_autocast_computes_in_half_precision(method: str) -> None:
    model, inputs = adapted(LLAMA, method), LLAMA.inputs()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = output(model, inputs)
    # bfloat16 has 8 bits: 2^-8 per product, over two layers and logits of up to 4. 0.07 is met; the base is 1 away.
    torch.testing.assert_close(half.float(), output(model, inputs), rtol=0.1, atol=0.2)


def test_a_tied_embedding_is_not_tied_to_its_adapter() -> None:
    """GPT-2 ties its head to wte; the adapter changes the lookup and never the head's weight."""
    tiny = MODELS["gpt2"]
    model = get_peft_model(tiny.fresh(), SpectralConfig(target_modules=["wte"], r=3))
    head = model.base_model.model.lm_head.weight.clone()
    train(model)
    assert torch.equal(model.base_model.model.lm_head.weight, head)
    assert not torch.equal(output(model.eval(), tiny.inputs()), output(tiny.fresh(), tiny.inputs()))


def test_merging_a_tied_embedding_leaves_the_head(tmp_path: Path) -> None:
    tiny = MODELS["gpt2"]
    model = get_peft_model(tiny.fresh(), SpectralConfig(target_modules=["wte"], r=3))
    train(model)
    tuned = output(model.eval(), tiny.inputs())
    model.merge_adapter()
    torch.testing.assert_close(output(model, tiny.inputs()), tuned, rtol=0, atol=1e-5)
    model.unmerge_adapter()
    assert model.base_model.model.transformer.wte.base_layer.weight is model.base_model.model.lm_head.weight
    with pytest.warns(UserWarning, match="no longer tied after merging"):
        plain = model.merge_and_unload()
    plain.save_pretrained(tmp_path)
    torch.testing.assert_close(output(type(plain).from_pretrained(tmp_path), tiny.inputs()), tuned, rtol=0, atol=1e-5)


def test_columns_of_the_spectrum_are_chosen(tmp_path: Path) -> None:
    for columns, expected in (("bottom", (13, 14, 15)), (4, (4, 5, 6)), ([9, 0, 2], (9, 0, 2))):
        config = SpectralConfig(r=3, columns=columns, target_modules=["v_proj"])
        model = get_peft_model(LLAMA.fresh(), config)
        assert next(spectral_modules(model))[2].columns == expected
        train(model)
        model.save_pretrained(tmp_path / str(columns))
        loaded = PeftModel.from_pretrained(LLAMA.fresh(), tmp_path / str(columns)).eval()
        torch.testing.assert_close(
            output(loaded, LLAMA.inputs()), output(model.eval(), LLAMA.inputs()), rtol=0, atol=1e-6
        )


def test_the_basis_is_embedded_when_asked_or_when_it_is_not_determined(tmp_path: Path) -> None:
    class Identity(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin = torch.nn.Linear(6, 6, bias=False)
            self.lin.weight.data = torch.eye(6)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.lin(x)

    def saved(save_basis: str) -> dict[str, Any]:
        from safetensors.torch import load_file

        model = get_peft_model(Identity(), SpectralConfig(r=2, target_modules=["lin"], save_basis=save_basis))
        train(model)
        folder = tmp_path / save_basis
        model.save_pretrained(folder)
        loaded = PeftModel.from_pretrained(Identity(), folder)
        x = torch.eye(6)
        torch.testing.assert_close(loaded.eval()(x), model.eval()(x), rtol=0, atol=1e-6)
        return {name.rpartition(".")[2] for name in load_file(folder / "adapter_model.safetensors")}

    assert saved("auto") == saved("always") == {"A_U", "A_Vh", "U_OR", "S_R", "Vh_RI"}
    assert saved("never") == {"A_U", "A_Vh", "sketch"}


def test_an_embedded_thin_basis_is_completed_to_the_full_one_on_load(tmp_path: Path) -> None:
    options = {"pattern": "banded", "off_diagonals": 9, "full_basis": True, "save_basis": "always"}
    model = adapted(LLAMA, "svft", **options)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(LLAMA.fresh(), tmp_path).eval()
    torch.testing.assert_close(output(loaded, LLAMA.inputs()), output(model, LLAMA.inputs()), rtol=0, atol=1e-4)


@pytest.mark.parametrize("options", [{"save_basis": "always"}, {"columns": "bottom"}, {"columns": [3, 7, 1]}])
def test_an_embedded_basis_of_another_base_is_refused(options: dict[str, Any], tmp_path: Path) -> None:
    adapted(LLAMA, "spectral_a", **options).save_pretrained(tmp_path)
    PeftModel.from_pretrained(LLAMA.fresh().to(torch.bfloat16), tmp_path)
    with pytest.raises(SpectuneError, match="trained on another base weight: its singular vectors leave a residual"):
        PeftModel.from_pretrained(LLAMA.fresh(seed=1), tmp_path)


@pytest.mark.parametrize("method", [m for m in METHODS if m not in ("lidb", "orthogonal_adaptation")])
def test_an_embedded_basis_needs_no_decomposition_on_load(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = adapted(LLAMA, method, save_basis="always")
    model.save_pretrained(tmp_path)
    monkeypatch.setattr("spectune.tuner.bases.obtain", lambda *a, **k: pytest.fail("decomposed again"))
    loaded = PeftModel.from_pretrained(LLAMA.fresh(), tmp_path).eval()
    torch.testing.assert_close(output(loaded, LLAMA.inputs()), output(model, LLAMA.inputs()), rtol=0, atol=1e-5)
