"""FSDP2 shards an adapted model, its bases with it, and trains what one process trains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import nn

from spectune import SpectralConfig
from spectune.adapter import bases_as_parameters, spectral_modules
from spectune.errors import AdapterError
from spectune.training.sharded import refuse_other_basis, trained_tensors

from ..abilities import needs_fsdp2_on_a_cpu
from ..models import MODELS
from .test_bases import together

LLAMA = MODELS["llama"]
TARGETS = ["q_proj", "up_proj", "down_proj"]
METHODS: dict[str, dict[str, Any]] = {
    "spectral_a": {"method": "spectral_a", "r": 4},
    "spectral_a with dynamics": {"method": "spectral_a", "r": 4, "singular_decay": 5.0, "grad_norm": "rms"},
    "spectral_r": {"method": "spectral_r", "r": 4},
    "svft": {"method": "svft", "pattern": "banded"},
    "svft, full basis": {"method": "svft", "pattern": "banded", "full_basis": True},
    "svdiff": {"method": "svdiff"},
    "specadapt": {"method": "specadapt", "r": 4, "shared_core": False},
    "lidb": {"method": "lidb"},
    "orthogonal_adaptation": {"method": "orthogonal_adaptation", "r": 4},
}
STEPS = 3
BASES = ("U_OR", "Vh_RI", "U_rest", "Vh_rest")


def adapted(name: str, **more: Any) -> PeftModel:
    return get_peft_model(LLAMA.fresh(), SpectralConfig(target_modules=TARGETS, **METHODS[name], **more)).train()


def shard(model: PeftModel) -> PeftModel:
    from torch.distributed.fsdp import fully_shard

    bases_as_parameters(model)
    for layer in model.base_model.model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    return model


def trained(model: PeftModel) -> dict[str, torch.Tensor]:
    """The adapter after some steps, whole on every process."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)
    for _ in range(STEPS):
        optimizer.zero_grad()
        model(**LLAMA.inputs()).logits.float().square().mean().backward()
        optimizer.step()
    return {n: getattr(t, "full_tensor", t.clone)() for n, t in get_peft_model_state_dict(model).items()}


def bytes_here(model: nn.Module, names: tuple[str, ...]) -> int:
    """The bytes of tensors of these names that this process holds."""
    found = [getattr(module, name, None) for _, _, module in spectral_modules(model) for name in names]
    local = [t.to_local() if hasattr(t, "to_local") else t for t in found if t is not None]
    return sum(t.numel() * t.element_size() for t in local)


def _every_method(rank: int) -> Any:
    found = {}
    for name in METHODS:
        model = shard(adapted(name))
        held = bytes_here(model, BASES)
        numbers = trained(model)
        found[name] = (held, numbers, bytes_here(model, BASES))
    return found


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return together(_every_method, tmp_path_factory.mktemp("sharded"))


@needs_fsdp2_on_a_cpu
@pytest.mark.parametrize("name", list(METHODS))
def test_a_sharded_model_trains_what_a_whole_one_trains(name: str, sharded: list[dict[str, Any]]) -> None:
    model = adapted(name)
    whole = bytes_here(model, BASES)
    expected = trained(model)
    for process in sharded:
        before, numbers, after = process[name]
        assert before == after and before == pytest.approx(whole / 2, rel=0.02)
        assert numbers.keys() == expected.keys()
        for key, tensor in expected.items():
            # The gradients are means over two equal processes: a roundoff, which Adam's division makes larger.
            torch.testing.assert_close(numbers[key], tensor, atol=1e-5, rtol=1e-5)


def test_bases_as_parameters_change_neither_output_nor_file() -> None:
    first, second = adapted("svft"), adapted("svft")
    assert bases_as_parameters(second) == len(list(spectral_modules(first)))
    inputs = LLAMA.inputs()
    assert torch.equal(first(**inputs).logits, second(**inputs).logits)
    file = get_peft_model_state_dict(first)
    assert file.keys() == get_peft_model_state_dict(second).keys() and not any(n.endswith(BASES) for n in file)
    assert [n for n, p in first.named_parameters() if p.requires_grad] == [
        n for n, p in second.named_parameters() if p.requires_grad
    ]
    with torch.no_grad():
        for parameter in first.parameters():
            parameter += 0.01 * parameter.requires_grad
    set_peft_model_state_dict(second, get_peft_model_state_dict(first))
    assert torch.equal(first(**inputs).logits, second(**inputs).logits)


@pytest.mark.parametrize("change", ["set_adapter", "set_requires_grad", "enable"])
def test_bases_as_parameters_stay_frozen(change: str) -> None:
    model = adapted("svft")
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    bases_as_parameters(model)
    if change == "enable":
        model.base_model.disable_adapter_layers()
        model.base_model.enable_adapter_layers()
    else:
        getattr(model.base_model, change)("default")
    assert trained == [name for name, p in model.named_parameters() if p.requires_grad]


def test_a_sharded_run_does_not_continue_on_another_basis() -> None:
    here = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    refuse_other_basis(here, here.to(torch.float64) * (1 + 1e-6), "checkpoint-2: layer.sketch")
    refuse_other_basis(torch.tensor([3, 5], dtype=torch.int32), torch.tensor([3, 5]), "checkpoint-2: layer.rows")
    for one, other in ((here, -here), (here, here[:1]), (torch.tensor([3, 5]), torch.tensor([3, 6]))):
        with pytest.raises(
            AdapterError, match="checkpoint-2: layer.x: the singular vectors differ from those that the"
        ):
            refuse_other_basis(one, other, "checkpoint-2: layer.x")


@pytest.mark.parametrize("save_basis", ["auto", "always"])
def test_a_checkpoint_of_another_basis_is_refused(save_basis: str, tmp_path: Path) -> None:
    model = adapted("svft", save_basis=save_basis)
    model.save_pretrained(tmp_path)
    bases_as_parameters(model)
    assert trained_tensors(model, tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    for name in [name for name in tensors if name.endswith(("sketch", "Vh_RI"))]:
        save_file(tensors | {name: tensors[name].flip(0).contiguous()}, file)
        with pytest.raises(AdapterError, match=f"{name}: the singular vectors differ"):
            trained_tensors(model, tmp_path)


def test_numbers_shared_by_all_layers_are_refused() -> None:
    config = SpectralConfig(method="specadapt", r=4, target_modules=TARGETS)
    with pytest.raises(AdapterError, match="FSDP2 and ZeRO-3 shard each layer for itself. Set shared_core to false"):
        bases_as_parameters(get_peft_model(LLAMA.fresh(), config))
