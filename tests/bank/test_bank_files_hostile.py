"""Adapter files from strangers, offered to a bank: each is one error, and the bank is as it was."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from spectune import AdapterBank, SpectralConfig
from spectune.errors import SpectuneError

from ..models import MLP, MODELS, output
from ..tuner.conftest import train

Tensors = dict[str, torch.Tensor]
Change = Callable[[Tensors], None]
KINDS: dict[str, dict[str, Any]] = {
    "r": {"method": "spectral_r", "r": 4},
    "r embedded": {"method": "spectral_r", "r": 4, "save_basis": "always"},
    "scaled": {"method": "spectral_r", "r": 4, "train_singular_values": True},
    "plain": {"method": "svft", "basis_rank": 5},
    "banded": {"method": "svft", "basis_rank": 5, "pattern": "banded"},
    "svdiff": {"method": "svdiff", "basis_rank": 5},
    "top_k": {"method": "svft", "pattern": "top_k", "off_diagonals": 1, "target_modules": ["lin"]},
}


class Square(torch.nn.Module):
    """top_k wants a square weight."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = torch.nn.Linear(10, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lin(x)


def fresh(kind: str, seed: int = 0) -> torch.nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Square() if kind == "top_k" else MLP()


def made(kind: str, folder: Path, seed: int = 0) -> PeftModel:
    model = get_peft_model(fresh(kind, seed), SpectralConfig(**{"target_modules": ["lin0", "lin1"], **KINDS[kind]}))
    train(model)
    model.save_pretrained(folder)
    return model.eval()


def key(tensors: Tensors, name: str) -> str:
    return [found for found in tensors if found.endswith(f".spectune_adapter.{name}")][-1]


def put(name: str, make: Callable[[torch.Tensor], torch.Tensor]) -> Change:
    def change(tensors: Tensors) -> None:
        tensors[key(tensors, name)] = make(tensors[key(tensors, name)])

    return change


def drop(name: str) -> Change:
    return lambda tensors: tensors.__delitem__(key(tensors, name))


def surplus(name: str, like: str) -> Change:
    def change(tensors: Tensors) -> None:
        beside = key(tensors, like)
        tensors[beside.rpartition(".")[0] + f".{name}"] = torch.arange(5)

    return change


def random(tensor: torch.Tensor) -> torch.Tensor:
    return torch.randn(tensor.shape, generator=torch.Generator().manual_seed(8))


def orthonormal(tensor: torch.Tensor) -> torch.Tensor:
    tall = tensor if tensor.shape[0] >= tensor.shape[1] else tensor.T
    found: torch.Tensor = torch.linalg.qr(random(tall)).Q
    return found if tall is tensor else found.T


def one(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def make(tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.clone()
        tensor.view(-1)[0] = value
        return tensor

    return make


NAN = one(float("nan"))
BAD: dict[str, tuple[str, Change, str]] = {
    "NaN in the numbers": ("r", put("skew_U", NAN), "'skew_U' contains NaN"),
    "infinity in the numbers": ("plain", put("M", one(float("-inf"))), "'M' contains NaN or infinity"),
    "NaN in the sketch": ("r", put("sketch", NAN), "'sketch' contains NaN"),
    "NaN in the basis": ("r embedded", put("Vh_RI", NAN), "'Vh_RI' contains NaN"),
    "numbers beyond float32": ("plain", put("M", lambda t: t.double() * 1e300), "'M' contains NaN or infinity"),
    "no numbers": ("r", drop("skew_U"), "no tensor 'skew_U'"),
    "no sketch": ("r", drop("sketch"), "no tensor 'sketch'"),
    "no U": ("r embedded", drop("U_OR"), "'S_R'"),
    "no S": ("r embedded", drop("S_R"), "no tensor 'S_R'"),
    "no Vh": ("r embedded", drop("Vh_RI"), "no tensor 'Vh_RI'"),
    "no places": ("top_k", drop("rows"), "no tensor 'rows'"),
    "places where there are none": ("plain", surplus("rows", "M"), "unexpected tensor 'rows'"),
    "places that are found again": ("banded", surplus("cols", "M"), "unexpected tensor 'cols'"),
    "a tensor too many": ("svdiff", surplus("extra", "shift"), "unexpected tensor 'extra'"),
    "a sketch beside a basis": ("r embedded", surplus("sketch", "U_OR"), "unexpected tensor 'sketch'"),
    "U of a narrower basis": (
        "r embedded",
        put("U_OR", lambda t: t[:, :3]),
        "'U_OR' is 12x3, but the config needs 12x4",
    ),
    "U of another weight": ("r embedded", put("U_OR", lambda t: t[:-1]), "'U_OR' is 11x4"),
    "U of a wider basis": ("r embedded", put("U_OR", lambda t: t.repeat(1, 2)[:, :7]), "'U_OR' is 12x7"),
    "S of another length": ("r embedded", put("S_R", lambda t: t[:1]), "'S_R' is 1, but the config needs 4"),
    "a flat Vh": ("r embedded", put("Vh_RI", torch.flatten), "'Vh_RI' is 80"),
    "a narrow sketch": ("r", put("sketch", lambda t: t[:2]), "stored sketch is 2x"),
    "an odd sketch": ("r", put("sketch", lambda t: t[:, :-1]), "stored sketch is 4x"),
    "a flat sketch": ("r", put("sketch", torch.flatten), "stored sketch is"),
    "a zero sketch": ("r", put("sketch", torch.zeros_like), "stored sketch of the .* directions is all zeros"),
    "too few numbers": ("plain", put("M", lambda t: t[1:]), "'M' is 4, but the config needs 5"),
    "a single number": ("plain", put("M", lambda t: t[0].clone()), "'M' is a single number"),
    "fewer places": ("top_k", put("rows", lambda t: t[1:]), "file's pattern differs from the bank's"),
    "other places": ("top_k", put("cols", lambda t: (t + 1) % 10), "file's pattern differs from the bank's"),
    "places outside": ("top_k", put("rows", lambda t: t + 10_000), "file's pattern differs from the bank's"),
    "integer numbers": ("plain", put("M", lambda t: t.long()), "'M' is int64, but it must hold real numbers"),
    "complex numbers": ("plain", put("M", lambda t: t.to(torch.complex64)), "C64|'M' is complex64"),
    "boolean numbers": ("svdiff", put("shift", lambda t: t > 0), "'shift' is bool"),
    "an integer sketch": ("r", put("sketch", lambda t: t.long()), "'sketch' is int64"),
    "an integer basis": ("r embedded", put("U_OR", lambda t: t.int()), "'U_OR' is int32"),
    "real places": ("top_k", put("rows", lambda t: t.float()), "'rows' is float32, but it must hold integers"),
    "boolean places": ("top_k", put("rows", lambda t: t > 0), "'rows' is bool"),
    "a foreign sketch": ("r", put("sketch", random), "another base weight"),
    "a foreign U": ("r embedded", put("U_OR", orthonormal), "another base weight"),
    "a foreign Vh": ("r embedded", put("Vh_RI", orthonormal), "another base weight"),
    "Vh with other signs than U": ("r embedded", put("Vh_RI", lambda t: -t), "another base weight"),
    "foreign singular values": ("r embedded", put("S_R", lambda t: t * 3), "another base weight"),
    "no singular values": ("r embedded", put("S_R", torch.zeros_like), "another base weight"),
}


def changed(folder: Path, change: Change) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "adapter_model.safetensors")


def refused(bank: AdapterBank, folder: Path, words: str | None = None) -> None:
    """Offer a file under the name of a resident and under a new one; both stay as they were."""
    layers = list(bank._layers.values())
    before = [layer.cores.clone() for layer in layers], dict(bank._seats.of), list(bank._free), bank._count
    for name in ("resident", "new"):
        with pytest.raises(SpectuneError, match=words) as raised:
            bank.load(name, folder)
        assert "\n" not in str(raised.value)
    after = [layer.cores for layer in layers], dict(bank._seats.of), list(bank._free), bank._count
    assert after[1:] == before[1:]
    assert all(torch.equal(a, b) for a, b in zip(before[0], after[0], strict=True))


@pytest.mark.parametrize("bad", BAD)
def test_a_bad_file_is_refused_and_the_bank_is_as_it_was(bad: str, tmp_path: Path) -> None:
    kind, change, words = BAD[bad]
    bank = AdapterBank(made(kind, tmp_path))
    bank.load("resident", tmp_path)
    changed(tmp_path, change)
    refused(bank, tmp_path, words)


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_of_another_base_is_refused(kind: str, tmp_path: Path) -> None:
    bank = AdapterBank(made(kind, tmp_path / "mine"))
    bank.load("resident", tmp_path / "mine")
    made(kind, tmp_path / "theirs", seed=1)
    refused(bank, tmp_path / "theirs", "another base weight|file's pattern differs from the bank's")


@pytest.mark.parametrize("kind", KINDS)
def test_a_good_file_is_taken(kind: str, tmp_path: Path) -> None:
    model = made(kind, tmp_path)
    bank, inputs = AdapterBank(model), MODELS["mlp"].inputs()
    bank.load("resident", tmp_path)
    alone = output(model, inputs)
    with bank(["resident"] * 5):
        torch.testing.assert_close(output(model, inputs), alone, rtol=1e-5, atol=1e-6)


def test_an_embedded_basis_that_is_turned_is_taken(tmp_path: Path) -> None:
    model = made("r embedded", tmp_path)
    bank, inputs = AdapterBank(model), MODELS["mlp"].inputs()
    bank.load("as it is", tmp_path)

    def turn(tensors: Tensors) -> None:  # other signs, in U and in Vh, as another LAPACK returns them
        signs_R = torch.tensor([1.0, -1.0, 1.0, -1.0])
        put("U_OR", lambda U_OR: U_OR * signs_R)(tensors)
        put("Vh_RI", lambda Vh_RI: Vh_RI * signs_R[:, None])(tensors)

    changed(tmp_path, turn)
    bank.load("turned", tmp_path)
    turned = PeftModel.from_pretrained(fresh("r embedded"), tmp_path).eval()
    with bank(["turned"] * 5):
        torch.testing.assert_close(output(model, inputs), output(turned, inputs), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("change", [{"method": "svft"}, {"r": "4"}, {"r": 10**9}, {"rank_pattern": ["lin0"]}])
def test_a_bad_config_is_refused(change: dict[str, Any], tmp_path: Path) -> None:
    bank = AdapterBank(made("r", tmp_path))
    bank.load("resident", tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    refused(bank, tmp_path)


@pytest.mark.parametrize("content", [b"", b"\xff" * 8 + b"{}", b"nonsense"])
def test_a_file_that_is_no_safetensors_is_refused(content: bytes, tmp_path: Path) -> None:
    bank = AdapterBank(made("r", tmp_path))
    bank.load("resident", tmp_path)
    (tmp_path / "adapter_model.safetensors").write_bytes(content)
    refused(bank, tmp_path)
