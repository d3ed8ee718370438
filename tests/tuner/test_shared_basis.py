"""A basis file: found once, shared by adapters that are only cores, and never chosen by an adapter's own file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from spectune import AdapterBank, SpectralConfig, export_lora, prepare
from spectune.checkpoint import read_adapter_folder
from spectune.errors import AdapterError, OptionError
from spectune.spectrum import DataSpectra

from ..models import MODELS
from .conftest import train

TINY = MODELS["llama"]
P = 5


def config(**more: Any) -> SpectralConfig:
    given = {"method": "svft", "pattern": "dense", "basis_rank": P, "directions": "activation"}
    return SpectralConfig(**{**given, "target_modules": list(TINY.targets), **more})


def with_labels() -> dict[str, torch.Tensor]:
    inputs = TINY.inputs()
    return inputs | {"labels": inputs["input_ids"]}


@pytest.fixture
def basis(tmp_path: Path) -> Path:
    prepare(TINY.fresh(), config(), [with_labels()], save=tmp_path)
    (found,) = tmp_path.glob("basis-*.safetensors")
    return found


def trained(basis: Path, folder: Path, scale: float = 1.0) -> torch.Tensor:
    model = get_peft_model(TINY.fresh(), config(basis=str(basis)))
    train(model)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.data *= scale
            assert name.endswith(".M")
    model.eval().save_pretrained(folder)
    return model(**TINY.inputs()).logits.detach()


def test_adapters_of_one_basis_are_cores_that_load_beside_it_and_with_it(tmp_path: Path, basis: Path) -> None:
    logits = trained(basis, tmp_path / "run" / "adapter")
    saved = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    assert {name.rpartition(".")[2] for name in saved} == {"M"}
    again = PeftModel.from_pretrained(TINY.fresh(), tmp_path / "run" / "adapter").eval()
    assert torch.equal(again(**TINY.inputs()).logits, logits)
    away = basis.rename(tmp_path / "run" / "anything.safetensors")
    with pytest.raises(AdapterError, match=f"shares the basis {basis.name}, and the file is not beside it"):
        PeftModel.from_pretrained(TINY.fresh(), tmp_path / "run" / "adapter")
    named = PeftModel.from_pretrained(TINY.fresh(), tmp_path / "run" / "adapter", basis=str(away)).eval()
    assert torch.equal(named(**TINY.inputs()).logits, logits)


def test_they_are_exported_exactly_and_served_together(tmp_path: Path, basis: Path) -> None:
    alone = {name: trained(basis, tmp_path / name, scale) for name, scale in (("anna", 1.0), ("ben", -2.0))}
    TINY.fresh().save_pretrained(tmp_path / "base")
    export_lora(tmp_path / "ben", tmp_path / "lora", base_model=tmp_path / "base")
    as_lora = PeftModel.from_pretrained(TINY.fresh(), tmp_path / "lora").eval()
    assert json.loads((tmp_path / "lora" / "adapter_config.json").read_text())["r"] == P
    torch.testing.assert_close(as_lora(**TINY.inputs()).logits, alone["ben"], atol=1e-4, rtol=1e-4)
    model = PeftModel.from_pretrained(TINY.fresh(), tmp_path / "anna").eval()
    bank = AdapterBank(model)
    for name in alone:
        bank.load(name, tmp_path / name)
    rows = len(TINY.inputs()["input_ids"])
    for name, logits in alone.items():
        with bank([name] * rows):
            torch.testing.assert_close(model(**TINY.inputs()).logits, logits, atol=1e-5, rtol=1e-5)
    other = prepare(TINY.fresh(), config(), [with_labels() | {"labels": with_labels()["labels"].flip(1)}])
    get_peft_model(TINY.fresh(), other).save_pretrained(tmp_path / "other")
    with pytest.raises(AdapterError, match="trained on another base weight|differ by"):
        bank.load("other", tmp_path / "other")


def test_a_file_keeps_the_directions_bit_for_bit_and_is_known_by_them(tmp_path: Path, basis: Path) -> None:
    found = prepare(TINY.fresh(), config(), [with_labels()]).spectra
    read = DataSpectra.read(basis)
    assert (
        found is not None
        and read.identity == found.identity
        and basis.name == f"basis-{read.identity[:16]}.safetensors"
    )
    for layer, one in found.items():
        assert all(torch.equal(getattr(one, name), getattr(read[layer], name)) for name in ("U_OR", "S_R", "Vh_RI"))
    halved = prepare(TINY.fresh(), config(), [with_labels()])
    get_peft_model(TINY.fresh(), halved).save_pretrained(tmp_path / "own")
    kinds = {
        n.rpartition(".")[2]: t.dtype for n, t in load_file(tmp_path / "own" / "adapter_model.safetensors").items()
    }
    assert kinds["U_OR"] == kinds["Vh_RI"] == torch.bfloat16 and kinds["M"] == torch.float32


def test_a_saved_config_names_no_file_and_one_that_does_is_not_obeyed(tmp_path: Path, basis: Path) -> None:
    trained(basis, tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    saved = json.loads(path.read_text())
    assert "basis" not in saved and basis.name.startswith(f"basis-{saved['basis_id'][:16]}")
    secret = basis.rename(tmp_path / "run.safetensors")
    path.write_text(json.dumps(saved | {"basis": str(secret)}))
    with pytest.warns(UserWarning, match="basis=.* is ignored"), pytest.raises(AdapterError, match="is not beside it"):
        PeftModel.from_pretrained(TINY.fresh(), tmp_path / "adapter")
    path.write_text(json.dumps(saved | {"basis_id": "../" * 20 + "x" * 4}))
    with pytest.raises(AdapterError, match="is not 64 hex digits"):
        PeftModel.from_pretrained(TINY.fresh(), tmp_path / "adapter")


def damaged(basis: Path, change: Any) -> None:
    from spectune.checkpoint import TensorFile

    tensors, noted = load_file(basis), TensorFile.open(basis).metadata
    change(tensors)
    save_file(tensors, basis, metadata=noted)


def test_a_wrong_basis_file_is_refused(tmp_path: Path, basis: Path) -> None:
    trained(basis, tmp_path / "adapter")
    first = next(name for name in load_file(basis) if name.endswith("U_OR"))
    with pytest.raises(AdapterError, match="computed on another base weight"):
        get_peft_model(TINY.fresh(seed=1), config(basis=str(basis)))
    with pytest.raises(OptionError, match="needs 3 directions of a .* weight, but the basis has 5"):
        get_peft_model(TINY.fresh(), config(basis=str(basis), basis_rank=3))
    with pytest.raises(OptionError, match="holds directions='activation'"):
        get_peft_model(TINY.fresh(), config(basis=str(basis), directions="gradient"))
    damaged(basis, lambda tensors: tensors[first].neg_())  # orthonormal still, but others
    with pytest.raises(AdapterError, match="shares another basis"):
        PeftModel.from_pretrained(TINY.fresh(), tmp_path / "adapter")
    TINY.fresh().save_pretrained(tmp_path / "base")
    with pytest.raises(AdapterError, match="shares another basis"):
        export_lora(tmp_path / "adapter", tmp_path / "lora", base_model=tmp_path / "base")
    with pytest.raises(AdapterError, match="shares another basis"):  # the road of fuse, inspect and merging
        read_adapter_folder(tmp_path / "adapter").tensor(first)
    damaged(basis, lambda tensors: tensors[first].mul_(2))
    with pytest.raises(AdapterError, match="are not orthonormal"):
        DataSpectra.read(basis)
    with pytest.raises(AdapterError, match="this is not a basis file"):
        DataSpectra.read(tmp_path / "adapter" / "adapter_model.safetensors")


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"directions": "weight"}, "holds directions of data"),
        ({"save_basis": "always"}, "leaves them out"),
    ],
)
def test_options_that_do_not_go_with_a_basis_file_are_refused(more: dict[str, Any], said: str) -> None:
    with pytest.raises(OptionError, match=said):
        config(**{"basis": "b.safetensors", **more})
    with pytest.raises(OptionError, match="holds directions already"):
        prepare(TINY.fresh(), config(basis="b.safetensors"), [with_labels()])


def test_a_folder_to_save_in_is_made_and_a_file_is_named_as_asked(tmp_path: Path) -> None:
    prepare(TINY.fresh(), config(), [with_labels()], save=tmp_path / "new" / "bases")
    (found,) = (tmp_path / "new" / "bases").glob("basis-*.safetensors")
    prepare(TINY.fresh(), config(), [with_labels()], save=tmp_path / "mine.safetensors")
    assert DataSpectra.read(tmp_path / "mine.safetensors").identity == DataSpectra.read(found).identity
