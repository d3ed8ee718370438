"""Many adapters on one basis, resident in one model."""

from __future__ import annotations

import copy
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

import spectune
from spectune import AdapterBank
from spectune.errors import AdapterError, OptionError

from ..effort import PATIENCE
from ..models import MODELS, output
from ..tuner.conftest import adapted, config_for, train

LLAMA = MODELS["llama"]
BANKED: dict[str, dict[str, Any]] = {
    "spectral_r": {"method": "spectral_r"},
    "svft plain": {"method": "svft", "pattern": "plain", "off_diagonals": None, "basis_rank": 6},
    "svft banded": {"method": "svft", "pattern": "banded"},
    "svft random": {"method": "svft"},
    "svft dense": {"method": "svft", "pattern": "dense", "off_diagonals": None, "core": [6, 4]},
    "svdiff": {"method": "svdiff"},
}


def saved(tmp_path: Path, name: str, seed: int, options: dict[str, Any], dtype: torch.dtype = torch.float32) -> Path:
    """Save an adapter of the tiny llama with its own numbers."""
    model = adapted(LLAMA, options["method"], **{k: v for k, v in options.items() if k != "method"})
    train(model, seed=seed)
    model.save_pretrained(tmp_path / name)
    return tmp_path / name


def rows_alone(folders: dict[str, Path], names: list[str]) -> torch.Tensor:
    """What each row gives with its adapter loaded by PEFT alone."""
    rows = []
    for row, name in enumerate(names):
        model = LLAMA.fresh()
        if name in folders:
            model = PeftModel.from_pretrained(model, folders[name]).eval()
        rows.append(output(model, LLAMA.inputs())[row])
    return torch.stack(rows)


@pytest.fixture
def folders(tmp_path: Path, request: pytest.FixtureRequest) -> dict[str, Path]:
    options = BANKED[getattr(request, "param", "spectral_r")]
    return {name: saved(tmp_path, name, seed, options) for seed, name in enumerate(["anna", "ben"])}


def banked(folders: dict[str, Path]) -> tuple[PeftModel, AdapterBank]:
    model = PeftModel.from_pretrained(LLAMA.fresh(), folders["anna"]).eval()
    bank = AdapterBank(model)
    for name, folder in folders.items():
        bank.load(name, folder)
    return model, bank


NAMES = ["ben", "__base__", "anna"]


@pytest.mark.parametrize("folders", list(BANKED), indirect=True)
def test_every_row_has_its_own_resident(folders: dict[str, Path]) -> None:
    model, bank = banked(folders)
    with bank(NAMES):
        mixed = output(model, LLAMA.inputs())
    torch.testing.assert_close(mixed, rows_alone(folders, NAMES), rtol=1e-4, atol=1e-5)
    through_peft = output(model, {**LLAMA.inputs(), "adapter_names": NAMES})
    torch.testing.assert_close(through_peft, mixed, rtol=0, atol=1e-6)
    # After the block the active adapter is back.
    alone = rows_alone(folders, ["anna"] * 3)
    torch.testing.assert_close(output(model, LLAMA.inputs()), alone, rtol=1e-4, atol=1e-5)


def test_rows_without_a_resident_are_the_base_bit_for_bit(folders: dict[str, Path]) -> None:
    model, bank = banked(folders)
    with bank(["__base__"] * 3):
        assert torch.equal(output(model, LLAMA.inputs()), output(LLAMA.fresh(), LLAMA.inputs()))


def test_residents_and_live_adapters_mix_in_one_batch(folders: dict[str, Path]) -> None:
    model, bank = banked({"anna": folders["anna"]})
    model.load_adapter(folders["ben"], "live")
    mixed = output(model, {**LLAMA.inputs(), "adapter_names": ["live", "__base__", "anna"]})
    torch.testing.assert_close(mixed, rows_alone(folders, NAMES), rtol=1e-4, atol=1e-5)
    assert bank.names == ("anna",)


def test_residents_generate(folders: dict[str, Path]) -> None:
    model, bank = banked(folders)
    asked = {"input_ids": LLAMA.inputs()["input_ids"], "max_new_tokens": 3, "do_sample": False, "num_beams": 2}
    with bank(NAMES):
        inside = model.generate(**asked)
    assert torch.equal(inside, model.generate(**asked, adapter_names=NAMES))


def test_unloading_and_replacing_change_only_that_resident(folders: dict[str, Path]) -> None:
    model, bank = banked(folders)
    bank.unload("ben")
    assert bank.names == ("anna",)
    with pytest.raises(AdapterError, match="'ben' is not resident"), bank(NAMES):
        pass
    bank.load("carl", folders["ben"])  # in ben's old seat
    bank.load("anna", folders["ben"])  # another adapter under a name that is resident
    with bank(["carl", "__base__", "anna"]):
        mixed = output(model, LLAMA.inputs())
    torch.testing.assert_close(mixed, rows_alone(folders, ["ben", "", "ben"]), rtol=1e-4, atol=1e-5)


def test_a_forward_that_has_begun_keeps_its_residents(folders: dict[str, Path]) -> None:
    model, bank = banked(folders)
    with bank(NAMES):
        before = output(model, LLAMA.inputs())
        for _ in range(5):
            bank.load("ben", folders["anna"])
        assert torch.equal(output(model, LLAMA.inputs()), before)
    with bank(NAMES):
        assert not torch.allclose(output(model, LLAMA.inputs()), before)


def test_threads_have_their_own_rows(folders: dict[str, Path]) -> None:
    model, bank = banked(folders)
    seen: dict[str, torch.Tensor] = {}
    meeting = threading.Barrier(2)

    def serve(name: str) -> None:
        with bank([name] * 3):
            meeting.wait(PATIENCE)
            seen[name] = output(model, LLAMA.inputs())

    threads = [threading.Thread(target=serve, args=(name,)) for name in ("anna", "ben")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for name, found in seen.items():
        torch.testing.assert_close(found, rows_alone(folders, [name] * 3), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("folders", ["spectral_r", "svft plain", "svft banded"], indirect=True)
def test_an_adapter_of_another_solver_is_turned_onto_the_banks_basis(folders: dict[str, Path]) -> None:
    model, bank = banked({"anna": folders["anna"]})
    # Another LAPACK would return other signs: turn the bank's basis as one might have found it.
    for module in bank.modules.values():
        signs_R = torch.where(torch.arange(len(module.S_R)) % 2 == 0, 1.0, -1.0)
        module.U_OR, module.Vh_RI = module.U_OR * signs_R, module.Vh_RI * signs_R[:, None]
        module.sketch.mul_(signs_R[:, None])
    bank.load("ben", folders["ben"])
    with bank(["ben"] * 3):
        mixed = output(model, LLAMA.inputs())
    torch.testing.assert_close(mixed, rows_alone(folders, ["ben"] * 3), rtol=1e-3, atol=1e-4)


def test_a_core_that_the_bank_cannot_keep_is_refused(tmp_path: Path) -> None:
    folder = saved(tmp_path, "anna", 0, BANKED["svft plain"])
    _, bank = banked({"anna": folder})
    module = next(iter(bank.modules.values()))
    turn_RR, _ = torch.linalg.qr(torch.eye(6) + 0.02 * torch.randn(6, 6, generator=torch.Generator().manual_seed(0)))
    # A turn by so little is what rounding does among close singular values; a diagonal core does not survive it.
    S_R = torch.full_like(module.S_R, float(module.S_R.mean()))
    module.U_OR, module.Vh_RI, module.S_R = module.U_OR @ turn_RR, turn_RR.T @ module.Vh_RI, S_R
    module.sketch = turn_RR.T @ module.sketch
    module._settled_on = module.sketch
    with pytest.raises(AdapterError, match="rotated basis"):
        bank.load("ben", folder)


def test_an_adapter_of_another_base_is_refused(folders: dict[str, Path]) -> None:
    other = PeftModel.from_pretrained(LLAMA.fresh(), folders["anna"])
    bank = AdapterBank(other)
    foreign = adapted(LLAMA, "spectral_r")
    foreign = spectune_on_another_base(foreign)
    foreign.save_pretrained(folders["ben"])
    with pytest.raises(AdapterError, match="another base weight"):
        bank.load("ben", folders["ben"])
    assert bank.names == ()


def spectune_on_another_base(model: PeftModel) -> PeftModel:
    from peft import get_peft_model

    return get_peft_model(LLAMA.fresh(seed=1), copy.deepcopy(model.peft_config["default"]))


@pytest.mark.parametrize(
    ("options", "line"),
    [({"r": 3}, "the bank has"), ({"target_modules": ["q_proj"]}, "the bank adapts 6 layers and the file 2")],
)
def test_other_options_or_layers_are_refused(
    options: dict[str, Any], line: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    _, bank = banked(folders)
    with pytest.raises(AdapterError, match=line):
        bank.load("other", saved(tmp_path, "other", 3, {"method": "spectral_r", **options}))
    assert bank.names == ("anna", "ben")


@pytest.mark.parametrize("method", ["spectral_a", "specadapt", "lidb"])
def test_methods_that_train_their_factors_have_no_bank(method: str) -> None:
    with pytest.raises(OptionError, match="A bank takes spectral_r, svft and svdiff"):
        AdapterBank(adapted(LLAMA, method))


def test_a_bank_needs_an_adapter_on_linear_layers_and_free_names(folders: dict[str, Path]) -> None:
    with pytest.raises(OptionError, match="no spectral adapter 'defualt'"):
        AdapterBank(adapted(LLAMA, "spectral_r"), "defualt")
    _, bank = banked(folders)
    with pytest.raises(OptionError, match="name of the base or of a live adapter"):
        bank.load("default", folders["ben"])


def test_a_closed_bank_leaves_the_model(folders: dict[str, Path]) -> None:
    model, bank = banked(folders)
    bank.close()
    with pytest.raises(ValueError, match="non-existing adapter"):
        output(model, {**LLAMA.inputs(), "adapter_names": NAMES})


def test_a_banked_model_may_be_copied(folders: dict[str, Path]) -> None:
    model, bank = banked(folders)
    with bank(NAMES):
        here = output(model, LLAMA.inputs())
    copied = copy.deepcopy(model)
    bank.unload("ben")
    assert torch.equal(output(copied, {**LLAMA.inputs(), "adapter_names": NAMES}), here)


def test_live_adapters_on_one_basis_are_served_together(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = PeftModel.from_pretrained(LLAMA.fresh(), folders["anna"], adapter_name="anna").eval()
    model.load_adapter(folders["ben"], "ben")
    model.add_adapter("other", config_for(LLAMA, "spectral_a"))
    from spectune.tuner import kinds

    together: list[int] = []
    found = kinds.stacked_cores
    monkeypatch.setattr(kinds, "stacked_cores", lambda modules: together.append(len(modules)) or found(modules))
    mixed = output(model, {**LLAMA.inputs(), "adapter_names": NAMES})
    assert together == [2] * 6
    torch.testing.assert_close(mixed, rows_alone(folders, NAMES), rtol=1e-4, atol=1e-5)
    # A partial strength of one adapter takes it out of the group; nothing is served with another's strength.
    model.base_model.set_scale("ben", 0.5)
    half = output(model, {**LLAMA.inputs(), "adapter_names": NAMES})
    assert together == [2] * 6
    torch.testing.assert_close(half[1:], mixed[1:], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(half[0], mixed[0])


def test_the_bank_is_a_public_name() -> None:
    assert spectune.AdapterBank is AdapterBank
