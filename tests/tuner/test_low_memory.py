"""`low_cpu_mem_usage=True`: whatever a file brings waits on the meta device, and arrives as in an ordinary load."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import (
    PeftModel,
    convert_to_lora,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)

from spectune import METHODS
from spectune.adapter import spectral_modules

from ..models import MODELS, output
from .conftest import adapted, config_for, train

LLAMA = MODELS["llama"]


@pytest.mark.parametrize("save_basis", ["auto", "always"])
@pytest.mark.parametrize("method", list(METHODS))
def test_every_tensor_of_the_adapter_waits_on_meta_and_then_loads(method: str, save_basis: str) -> None:
    trained = adapted(LLAMA, method, save_basis=save_basis)
    tensors = {
        name.removeprefix("base_model.model."): tensor.clone()
        for name, tensor in get_peft_model_state_dict(trained).items()
    }
    model = inject_adapter_in_model(
        config_for(LLAMA, method, save_basis=save_basis), LLAMA.fresh(), low_cpu_mem_usage=True
    )
    waiting = get_peft_model_state_dict(model)
    assert waiting.keys() == tensors.keys()
    assert {tensor.device.type for tensor in waiting.values()} == {"meta"}
    set_peft_model_state_dict(model, tensors, low_cpu_mem_usage=True)
    assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    torch.testing.assert_close(output(model, LLAMA.inputs()), output(trained, LLAMA.inputs()), rtol=1e-5, atol=1e-6)


def test_a_file_that_brings_its_basis_fits_an_adapter_that_waits_for_a_sketch(tmp_path: Path) -> None:
    """What is needed at injection is only known once the file is read: `auto` waits for one, the file has the other."""
    for waits_for, file_has in (("auto", "always"), ("always", "auto")):
        trained = adapted(LLAMA, "spectral_a", save_basis=file_has)
        tensors = {n.removeprefix("base_model.model."): t for n, t in get_peft_model_state_dict(trained).items()}
        config = config_for(LLAMA, "spectral_a", save_basis=waits_for)
        model = inject_adapter_in_model(config, LLAMA.fresh(), low_cpu_mem_usage=True)
        set_peft_model_state_dict(model, tensors, low_cpu_mem_usage=True)
        found = output(model, LLAMA.inputs())
        torch.testing.assert_close(found, output(trained, LLAMA.inputs()), rtol=1e-5, atol=1e-6)


def test_a_second_adapter_is_loaded_so_beside_the_first(tmp_path: Path) -> None:
    trained = adapted(LLAMA, "svft")
    trained.save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(LLAMA.fresh(), tmp_path, low_cpu_mem_usage=True)
    model.load_adapter(tmp_path, adapter_name="other", low_cpu_mem_usage=True)
    model.set_adapter("other")
    assert {module.S_R.device.type for _, _, module in spectral_modules(model)} == {"cpu"}
    torch.testing.assert_close(output(model, LLAMA.inputs()), output(trained, LLAMA.inputs()), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_peft_s_conversion_to_lora_keeps_the_dtype_of_the_adapter(dtype: torch.dtype) -> None:
    model = get_peft_model(LLAMA.fresh().to(dtype), config_for(LLAMA, "spectral_a"), autocast_adapter_dtype=False)
    train(model)
    _, tensors = convert_to_lora(model, rank=6)
    assert {tensor.dtype for tensor in tensors.values()} == {dtype}


def test_a_half_precision_adapter_is_merged_without_rounding_its_update_first() -> None:
    model = get_peft_model(LLAMA.fresh().bfloat16(), config_for(LLAMA, "spectral_a"), autocast_adapter_dtype=False)
    train(model)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    module = layer.module("default")
    exact = (
        layer.base_layer.weight.float()
        + module.delta().left_OP @ torch.diag(module.delta().core) @ module.delta().right_QI
    )
    model.merge_adapter()
    assert torch.equal(layer.base_layer.weight, exact.bfloat16())
