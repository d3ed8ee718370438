"""Rules of bringing a LoRA to another rank."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from spectune import SpectuneError
from spectune.checkpoint import read_lora
from spectune.extraction import resize, resize_lora
from spectune.extraction.cut import Cut, cut_factors

from ..models import MODELS
from .test_extract import loras, updates


def best_of_rank(dW: torch.Tensor, rank: int) -> torch.Tensor:
    U, S, Vh = torch.linalg.svd(dW.double(), full_matrices=False)
    return U[:, :rank] * S[:rank] @ Vh[:rank]


@settings(max_examples=60)
@given(
    O=st.integers(1, 12), I=st.integers(1, 12), P=st.integers(1, 14), share=st.floats(0.01, 1), seed=st.integers(0, 999)
)
def test_cutting_factors_is_cutting_their_product(O: int, I: int, P: int, share: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    B_OP, A_PI = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((O, P), (P, I)))
    A_PI = A_PI * torch.logspace(0, -2, P, dtype=torch.float64)[:, None]
    S = torch.linalg.svdvals(B_OP @ A_PI)
    for cut in (Cut(rank=1 + seed % P), Cut(energy=share), Cut(frobenius=math.sqrt(1 - share) * 0.999)):
        B_OR, A_RI, lost = cut_factors(B_OP, A_PI, cut)
        rank = len(A_RI)
        tails = [float(S[r:].norm() / S.norm()) for r in range(len(S) + 1)]
        tail = tails[rank] if rank < len(tails) else 0.0
        # Nothing of this rank is nearer. The entries themselves are only as certain as the next two values are apart.
        assert float((B_OP @ A_PI - B_OR @ A_RI).norm() / S.norm()) == pytest.approx(tail, rel=1e-9, abs=1e-12)
        assert lost == pytest.approx(tail, abs=1e-7)
        if cut.allowed is None:
            assert rank == min(1 + seed % P, len(S))
        else:
            assert tail**2 <= cut.allowed + 1e-12 and (rank == 1 or tails[rank - 1] ** 2 > cut.allowed - 1e-12)


RANKS = {"r": 6, "lora_alpha": 12, "rank_pattern": {"v_proj": 4, r"model\.layers\.1\.self_attn\.q_proj": 8}}


def peft_folder(folder: Path, name: str = "llama", dtype: torch.dtype = torch.float32, **more: Any) -> PeftModel:
    """Save a LoRA with random factors; get the live model."""
    torch.manual_seed(3)
    options = {"target_modules": list(MODELS[name].targets), "init_lora_weights": False, **RANKS, **more}
    model = get_peft_model(MODELS[name].fresh(), LoraConfig(**options), autocast_adapter_dtype=False)
    for _, layer in loras(model):
        for factor in (*layer.lora_A.values(), *layer.lora_B.values()):
            factor.to(dtype)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("options", [{}, {"use_rslora": True, "alpha_pattern": {"v_proj": 5}}], ids=["alpha", "rslora"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_peft_loads_the_best_lower_rank(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    options = options if name == "llama" else {**options, "rank_pattern": {}, "alpha_pattern": {}}
    old = updates(peft_folder(tmp_path / "old", name, **options))
    done = resize_lora(tmp_path / "old", tmp_path / "new", rank=3)
    model = PeftModel.from_pretrained(MODELS[name].fresh(), tmp_path / "new")
    for layer, update in updates(model).items():
        torch.testing.assert_close(update.double(), best_of_rank(old[layer].detach(), 3), rtol=0, atol=1e-5)
    assert {m.scaling["default"] for _, m in loras(model)} == {1.0}
    for layer in done.layers:
        S = torch.linalg.svdvals(old[layer.name].detach().double())
        assert layer.lost == pytest.approx(float(S[3:].norm() / S.norm()), abs=1e-5) and layer.rank == 3
    assert done.bytes_after < done.bytes_before and done.at_their_rank == ()


def test_every_layer_gets_the_rank_that_keeps_the_share(tmp_path: Path) -> None:
    old = updates(peft_folder(tmp_path / "old"))
    done = resize_lora(tmp_path / "old", tmp_path / "new", energy=0.8)
    model = PeftModel.from_pretrained(MODELS["llama"].fresh(), tmp_path / "new")
    assert {name: len(m.lora_A["default"].weight) for name, m in loras(model)} == {x.name: x.rank for x in done.layers}
    assert len({layer.rank for layer in done.layers}) > 1
    found = updates(model)
    for layer in done.layers:
        squares = torch.linalg.svdvals(old[layer.name].detach().double()) ** 2
        shares = squares.cumsum(0) / squares.sum()
        assert shares[layer.rank - 1] >= 0.8 > (shares[layer.rank - 2] if layer.rank > 1 else 0)
        torch.testing.assert_close(
            found[layer.name].double(), best_of_rank(old[layer.name].detach(), layer.rank), rtol=0, atol=1e-5
        )


def test_an_energy_of_one_drops_only_what_is_zero(tmp_path: Path) -> None:
    peft_folder(tmp_path / "old", r=6, rank_pattern={})
    tensors = load_file(tmp_path / "old" / "adapter_model.safetensors")
    for name in tensors:
        if "q_proj.lora_B" in name:
            tensors[name][:, 2] = tensors[name][:, 1]  # two equal columns: rank 5
    save_file(tensors, tmp_path / "old" / "adapter_model.safetensors")
    done = resize_lora(tmp_path / "old", tmp_path / "new", energy=1)
    assert {layer.rank for layer in done.layers if "q_proj" in layer.name} == {5}
    assert {layer.rank for layer in done.layers if "q_proj" not in layer.name} == {6}
    assert max(layer.lost for layer in done.layers) < 1e-6


def test_a_higher_rank_leaves_every_number_as_it_is(tmp_path: Path) -> None:
    peft_folder(tmp_path / "old", dtype=torch.bfloat16, lora_alpha=6, alpha_pattern={"v_proj": 4, "q_proj": 8})
    peft_folder(tmp_path / "double", dtype=torch.bfloat16, lora_alpha=12, alpha_pattern={"v_proj": 8, "q_proj": 16})
    for name in ("old", "double"):
        done = resize_lora(tmp_path / name, tmp_path / f"{name}-new", rank=64)
        assert len(done.at_their_rank) == len(done.layers)
        # q_proj of layer 0 has rank 6 and alpha 8 or 16: no power of two, so it is rounded once more.
        rounded = {layer.name for layer in done.layers if layer.lost > 1e-9}
        assert rounded == {"model.layers.0.self_attn.q_proj"}
    before, after = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("old", "old-new"))
    assert all(torch.equal(before[n], after[n]) for n in before if "layers.0.self_attn.q_proj" not in n)


def test_rounding_to_half_precision_is_measured(tmp_path: Path) -> None:
    peft_folder(tmp_path / "old")
    exact = resize_lora(tmp_path / "old", tmp_path / "exact", rank=3)
    done = resize_lora(tmp_path / "old", tmp_path / "half", rank=3, dtype=torch.bfloat16)
    old, new = read_lora(tmp_path / "old"), read_lora(tmp_path / "half")
    for layer, before in zip(done.layers, exact.layers, strict=True):
        B, A = new.factors(layer.name)
        assert B.dtype == A.dtype == torch.bfloat16
        B_old, A_old = (factor.double() for factor in old.factors(layer.name))
        dW = B_old @ A_old * old.layers[layer.name].scaling
        lost = float((dW - B.double() @ A.double()).norm() / dW.norm())
        assert layer.lost == pytest.approx(lost, rel=1e-6) and layer.lost > before.lost
        assert layer.cut == before.cut and 5e-4 < layer.rounding < 8e-3 and before.rounding < 1e-3


def kohya_file(path: Path) -> dict[str, torch.Tensor]:
    """A LoRA as kohya's trainer writes it: a linear layer, a 3x3 convolution, alphas in half precision."""
    generator = torch.Generator().manual_seed(5)
    shapes = {
        "lora_unet_attn_to_q": ((6, 10), (12, 6), 3.0),
        "lora_unet_conv1": ((4, 5, 3, 3), (7, 4, 1, 1), 4.0),
    }
    tensors = {}
    for name, (down, up, alpha) in shapes.items():
        tensors[f"{name}.lora_down.weight"] = torch.randn(down, generator=generator)
        tensors[f"{name}.lora_up.weight"] = torch.randn(up, generator=generator)
        tensors[f"{name}.alpha"] = torch.tensor(alpha, dtype=torch.float16)
    header = {"ss_network_dim": "6", "ss_network_alpha": "3.0", "sshs_model_hash": "old", "ss_sd_model_name": "sd"}
    save_file(tensors, path, metadata=header)
    return tensors


def kohya_update(tensors: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    down, up = (tensors[f"{name}.lora_{side}.weight"].double().flatten(1) for side in ("down", "up"))
    return float(tensors[f"{name}.alpha"]) / len(down) * up @ down


def header_of(path: Path) -> dict[str, str]:
    with safe_open(path, framework="pt") as file:
        return dict(file.metadata())


def test_a_file_of_kohya_keeps_its_names_and_has_true_alphas(tmp_path: Path) -> None:
    old = kohya_file(tmp_path / "old.safetensors")
    resize_lora(tmp_path / "old.safetensors", tmp_path / "new.safetensors", rank=2)
    new = load_file(tmp_path / "new.safetensors")
    assert set(new) == set(old)
    assert new["lora_unet_conv1.lora_down.weight"].shape == (2, 5, 3, 3)
    assert new["lora_unet_conv1.lora_up.weight"].shape == (7, 2, 1, 1)
    for name in ("lora_unet_attn_to_q", "lora_unet_conv1"):
        expected = best_of_rank(kohya_update(old, name), 2)
        torch.testing.assert_close(kohya_update(new, name), expected, rtol=0, atol=1e-5)
        assert new[f"{name}.alpha"].dtype == torch.float16 and new[f"{name}.alpha"].shape == ()
    header = header_of(tmp_path / "new.safetensors")
    assert header["ss_network_dim"] == header["ss_network_alpha"] == "2" and header["ss_sd_model_name"] == "sd"
    assert "sshs_model_hash" not in header
    resize_lora(tmp_path / "old.safetensors", tmp_path / "each.safetensors", rank=5)
    assert header_of(tmp_path / "each.safetensors")["ss_network_dim"] == "Dynamic"  # 5 and 4


def test_a_file_of_diffusers_has_a_true_header(tmp_path: Path) -> None:
    torch.manual_seed(0)
    stems = {"unet.a.to_q": 6, "unet.b.to_q": 4}
    tensors = {f"{stem}.lora_A.weight": torch.randn(r, 8) for stem, r in stems.items()}
    tensors |= {f"{stem}.lora_B.weight": torch.randn(9, r) for stem, r in stems.items()}
    options = {"unet.r": 6, "unet.lora_alpha": 12, "unet.rank_pattern": {"b.to_q": 4}, "unet.target_modules": ["to_q"]}
    save_file(tensors, tmp_path / "old.safetensors", metadata={"lora_adapter_metadata": json.dumps(options)})
    resize_lora(tmp_path / "old.safetensors", tmp_path / "new.safetensors", rank=5)
    written = json.loads(header_of(tmp_path / "new.safetensors")["lora_adapter_metadata"])
    config = LoraConfig(**{key.removeprefix("unet."): value for key, value in written.items()})

    class Unet(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = (nn.ModuleDict({"to_q": nn.Linear(8, 9)}) for _ in range(2))

    model = get_peft_model(Unet(), config)
    ranks = {name: (len(m.lora_A["default"].weight), m.scaling["default"]) for name, m in loras(model)}
    assert ranks == {"a.to_q": (5, 1.0), "b.to_q": (4, 1.0)} and written["unet.target_modules"] == ["to_q"]
    old, new = read_lora(tmp_path / "old.safetensors"), read_lora(tmp_path / "new.safetensors")
    B, A = old.factors("unet.b.to_q")
    B_new, A_new = new.factors("unet.b.to_q")
    torch.testing.assert_close(B_new @ A_new, B @ A * 3.0)  # alpha 12 over rank 4


def test_modules_trained_in_full_and_other_files_are_copied(tmp_path: Path) -> None:
    peft_folder(tmp_path / "old", "bert", modules_to_save=["classifier"], rank_pattern={})
    (tmp_path / "old" / "tokenizer.json").write_text("{}")
    (tmp_path / "old" / "optimizer.pt").write_bytes(b"state of the old factors")
    done = resize_lora(tmp_path / "old", tmp_path / "new", rank=2)
    before, after = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("old", "new"))
    assert len(done.carried) == 2 and all(torch.equal(before[name], after[name]) for name in done.carried)
    names = {path.name for path in (tmp_path / "new").iterdir()}
    assert "tokenizer.json" in names and "optimizer.pt" not in names
    configs = [json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in ("old", "new")]
    changed = {key for key in configs[0] if configs[0][key] != configs[1][key]}
    assert changed == {"r", "lora_alpha"} and configs[1]["modules_to_save"] == ["classifier"]


def break_it(folder: Path, edit: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")


def test_what_cannot_be_resized_is_refused_and_nothing_is_left(tmp_path: Path) -> None:
    peft_folder(tmp_path / "old")
    kohya_file(tmp_path / "kohya.safetensors")
    for output, line in (
        ("new", r"Give a name that ends in \.safetensors"),
        ("kohya.safetensors", "this file already exists"),
        ("no/new.safetensors", "the folder .* does not exist"),
    ):
        with pytest.raises(SpectuneError, match=line):
            resize_lora(tmp_path / "kohya.safetensors", tmp_path / output, rank=2)
    with pytest.raises(SpectuneError, match="nothing says how much to keep"):
        resize_lora(tmp_path / "old", tmp_path / "new")
    with pytest.raises(SpectuneError, match="a LoRA can only be stored as"):
        resize_lora(tmp_path / "old", tmp_path / "new", rank=2, dtype=torch.int8)
    break_it(tmp_path / "old", lambda tensors: next(iter(tensors.values())).fill_(1e6))
    with pytest.raises(SpectuneError, match=r"too large for torch\.float16"):
        resize_lora(tmp_path / "old", tmp_path / "new", rank=64, dtype=torch.float16)
    break_it(tmp_path / "old", lambda tensors: next(iter(tensors.values())).fill_(math.nan))
    with pytest.raises(SpectuneError, match="the factors contain NaN"):
        resize_lora(tmp_path / "old", tmp_path / "new", rank=2)
    config = json.loads((tmp_path / "old" / "adapter_config.json").read_text())
    (tmp_path / "old" / "adapter_config.json").write_text(json.dumps(config | {"use_qalora": True}))
    with pytest.raises(SpectuneError, match="with use_qalora, the update is not B A"):
        resize_lora(tmp_path / "old", tmp_path / "new", rank=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kohya.safetensors", "old"]


def test_the_loss_is_that_of_the_file_and_not_of_the_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kohya_file(tmp_path / "old.safetensors")
    save = resize.save_tensors

    def spoilt(path: Path, tensors: dict[str, torch.Tensor], header: dict[str, str]) -> None:
        save(path, {name: 2 * tensor if "lora_up" in name else tensor for name, tensor in tensors.items()}, header)

    monkeypatch.setattr(resize, "save_tensors", spoilt)
    done = resize_lora(tmp_path / "old.safetensors", tmp_path / "new.safetensors", rank=64)
    assert all(layer.cut == 0 and layer.lost == pytest.approx(1.0) for layer in done.layers)


def test_an_update_of_zero_stays_one(tmp_path: Path) -> None:
    peft_folder(tmp_path / "old")
    break_it(tmp_path / "old", lambda tensors: [t.zero_() for name, t in tensors.items() if "lora_B" in name])
    done = resize_lora(tmp_path / "old", tmp_path / "new", energy=0.9)
    assert {(layer.rank, layer.lost) for layer in done.layers} == {(1, 0.0)}
