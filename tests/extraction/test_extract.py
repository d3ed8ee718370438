"""Rules of taking an adapter out of a full fine-tune."""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import BertModel

from spectune import Spectrum, SpectuneError, Weight, decompose
from spectune.checkpoint import TensorFile
from spectune.extraction import drafts, extract_adapter
from spectune.extraction.spectral_fit import fit_spectral_a

from ..experts import fresh, logits
from ..models import MODELS, Tiny, output
from ..tuner.conftest import adapted

pytestmark = pytest.mark.filterwarnings("ignore:.*tie_word_embeddings:UserWarning")


def changed(model: nn.Module, *words: str, scale: float = 0.05) -> nn.Module:
    """Stand in for full fine-tuning: move all parameters, or those with one of these words in their name."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if not words or any(word in name for word in words):
            parameter.data += scale * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
    return model


def pair_of(tiny: Tiny, folder: Path, *words: str, **more: Any) -> tuple[Path, Path, nn.Module]:
    """A base, a tuned copy of it, and the tuned model."""
    tuned = changed(tiny.fresh(), *words, **more)
    tiny.fresh().save_pretrained(folder / "base")
    tuned.save_pretrained(folder / "tuned")
    return folder / "base", folder / "tuned", tuned


def loaded(tiny: Tiny, adapter: Path) -> PeftModel:
    return PeftModel.from_pretrained(tiny.fresh(), adapter).eval()


def updates(model: nn.Module) -> dict[str, torch.Tensor]:
    """Layer -> update in the layout of the base weight, as PEFT computes it."""
    return {
        name.removeprefix("base_model.model."): layer.get_delta_weight("default")
        for name, layer in model.named_modules()
        if hasattr(layer, "get_delta_weight") and getattr(layer, "base_layer", None) is not None
    }


def change_of(tiny: Tiny, tuned: nn.Module, layer: str) -> torch.Tensor:
    return (tuned.get_submodule(layer).weight - tiny.fresh().get_submodule(layer).weight).detach()


@pytest.mark.parametrize(
    ("name", "form"),
    [("llama", "lora"), ("gpt2", "lora"), ("t5", "lora"), ("gpt2", "spectral_a"), ("bert", "spectral_a")],
)
def test_at_full_rank_with_the_rest_saved_the_adapter_is_the_tuned_model(name: str, form: str, tmp_path: Path) -> None:
    tiny = MODELS[name]
    base, tuned_folder, tuned = pair_of(tiny, tmp_path)
    done = extract_adapter(base, tuned_folder, tmp_path / "out", to=form, rank=48, save_rest=True)
    assert not done.left_out and done.kept > 1 - 1e-9 and done.left_out_share == 0
    reached = output(loaded(tiny, tmp_path / "out"), tiny.inputs())
    torch.testing.assert_close(reached, output(tuned, tiny.inputs()), rtol=0, atol=1e-5)
    assert (reached - output(tiny.fresh(), tiny.inputs())).abs().max() > 0.1


def test_a_lora_is_the_best_of_its_rank_and_balanced(tmp_path: Path) -> None:
    tiny = MODELS["gpt2"]  # stores its weights in x out
    base, tuned_folder, tuned = pair_of(tiny, tmp_path)
    done = extract_adapter(base, tuned_folder, tmp_path / "out", rank=3)
    found, stored = updates(loaded(tiny, tmp_path / "out")), load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert {layer.name for layer in done.layers} == set(found) and len(found) == 8
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["fan_in_fan_out"] is True
    for layer in done.layers:
        dW = change_of(tiny, tuned, layer.name)
        U, S, Vh = torch.linalg.svd(dW.double(), full_matrices=False)
        best = (U[:, :3] * S[:3] @ Vh[:3]).float()
        torch.testing.assert_close(found[layer.name], best, rtol=0, atol=1e-5)
        assert layer.lost == pytest.approx(float(S[3:].norm() / S.norm()), rel=1e-4) and layer.rank == 3
        assert layer.kept == pytest.approx(1 - layer.lost**2) and layer.change == pytest.approx(float(S.norm()))
        A, B = (stored[f"base_model.model.{layer.name}.lora_{side}.weight"] for side in "AB")
        torch.testing.assert_close(A @ A.T, torch.diag(S[:3].float()), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(B.T @ B, torch.diag(S[:3].float()), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("limit", "value"), [("energy", 0.9), ("frobenius", 0.3)])
def test_a_share_finds_the_least_rank_of_every_layer(limit: str, value: float, tmp_path: Path) -> None:
    tiny = MODELS["llama"]
    base, tuned_folder, tuned = pair_of(tiny, tmp_path)
    done = extract_adapter(base, tuned_folder, tmp_path / "out", **{limit: value})
    most = 1 - value if limit == "energy" else value**2
    for layer in done.layers:
        squares = torch.linalg.svdvals(change_of(tiny, tuned, layer.name).double()) ** 2
        lost = [float(squares[r:].sum() / squares.sum()) for r in range(len(squares) + 1)]
        assert lost[layer.rank] <= most < lost[layer.rank - 1] and layer.lost**2 <= most * 1.0001
    assert len({layer.rank for layer in done.layers}) > 1
    assert {name: len(m.lora_A["default"].weight) for name, m in loras(loaded(tiny, tmp_path / "out"))} == {
        layer.name: layer.rank for layer in done.layers
    }
    capped = extract_adapter(base, tuned_folder, tmp_path / "capped", **{limit: value}, rank=5)
    assert {layer.rank for layer in capped.layers} == {5}


def loras(model: nn.Module) -> list[tuple[str, Any]]:
    return [(n.removeprefix("base_model.model."), m) for n, m in model.named_modules() if hasattr(m, "lora_A")]


@pytest.mark.parametrize("columns", ["top", "bottom", [1, 4, 2]])
def test_spectral_a_comes_back_from_a_model_that_it_tuned(columns: Any, tmp_path: Path) -> None:
    tiny = MODELS["llama"]
    model = adapted(tiny, "spectral_a", columns=columns)
    trained = updates(model)
    tiny.fresh().save_pretrained(tmp_path / "base")
    model.merge_and_unload().save_pretrained(tmp_path / "tuned")
    done = extract_adapter(
        tmp_path / "base", tmp_path / "tuned", tmp_path / "out", to="spectral_a", rank=3, columns=columns
    )
    found = updates(loaded(tiny, tmp_path / "out"))
    assert set(found) == set(trained) and not done.rest
    for layer, update in trained.items():
        assert (found[layer] - update).norm() < 1e-4 * update.norm(), layer
    assert max(layer.lost for layer in done.layers) < 1e-4
    # Away from the top the directions travel in the file, since a rounded base would give others.
    stored = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert any(name.endswith("U_OR") for name in stored) == (columns != "top")
    lora = extract_adapter(tmp_path / "base", tmp_path / "tuned", tmp_path / "lora", rank=3)
    assert min(layer.lost for layer in lora.layers) > 0.05  # its updates have rank 6


def test_spectral_a_is_as_near_as_its_form_allows_and_zero_for_no_change() -> None:
    generator = torch.Generator().manual_seed(0)
    W_OI, dW_OI = (scale * torch.randn(20, 30, generator=generator) for scale in (1, 0.1))
    spectrum = decompose(Weight("w", W_OI), 4)
    A_U, A_Vh = fit_spectral_a(Weight("w", torch.zeros(20, 30)), spectrum)
    assert A_U.abs().max() < 1e-6 and A_Vh.abs().max() < 1e-6
    A_U, A_Vh = fit_spectral_a(Weight("w", dW_OI), spectrum)
    update_OI = product(spectrum, A_U, A_Vh) - product(spectrum)
    values = torch.linalg.svdvals((dW_OI + product(spectrum)).double())
    assert float((dW_OI - update_OI).norm()) == pytest.approx(float(values[4:].norm()), rel=1e-5)
    weighted = (A_U * spectrum.S_R.sqrt()).norm() ** 2 + (A_Vh * spectrum.S_R.sqrt()[:, None]).norm() ** 2
    for _ in range(20):
        turn = torch.linalg.qr(torch.eye(4) + 0.2 * torch.randn(4, 4, generator=generator)).Q
        turn = turn * turn.diagonal().sign()
        root = spectrum.S_R.sqrt()
        left = ((spectrum.U_OR + A_U) * root) @ turn - spectrum.U_OR * root
        right = turn.T @ (root[:, None] * (spectrum.Vh_RI + A_Vh)) - root[:, None] * spectrum.Vh_RI
        assert weighted < left.norm() ** 2 + right.norm() ** 2


def product(spectrum: Spectrum, A_U: torch.Tensor | float = 0.0, A_Vh: torch.Tensor | float = 0.0) -> torch.Tensor:
    return (spectrum.U_OR + A_U) * spectrum.S_R @ (spectrum.Vh_RI + A_Vh)


def test_layers_are_found_under_the_names_that_transformers_loads_them_by(tmp_path: Path) -> None:
    tiny = MODELS["vit"]  # its files say encoder.layer.0.attention.attention.query, the model layers.0.attention.q_proj
    base, tuned_folder, tuned = pair_of(tiny, tmp_path)
    done = extract_adapter(base, tuned_folder, tmp_path / "out", rank=48, save_rest=True)
    found = updates(loaded(tiny, tmp_path / "out"))
    assert len(found) == 13 and "vit.embeddings.patch_embeddings.projection" in found
    for layer, update in found.items():
        torch.testing.assert_close(update, change_of(tiny, tuned, layer), rtol=0, atol=1e-5)
    # Bare parameters, not modules: nothing in PEFT saves them whole.
    assert {t.name for t in done.left_out} == {"vit.embeddings.cls_token", "vit.embeddings.position_embeddings"}


class Convolved(nn.Module):
    """A model without a config.json: its layers are told by the names of its tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.word_embeddings = nn.Embedding(10, 8)
        self.norm = nn.LayerNorm(8)
        self.lm_head = nn.Linear(8, 10, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.conv(x).mean((2, 3)))


@pytest.mark.parametrize("embeddings", [False, True])
def test_files_without_a_config_are_told_by_names(embeddings: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    base, tuned = Convolved(), Convolved()
    for name, model in (("base", base), ("tuned", tuned)):
        save_file(model.state_dict(), tmp_path / f"{name}.safetensors")
    done = extract_adapter(
        tmp_path / "base.safetensors", tmp_path / "tuned.safetensors", tmp_path / "out", rank=20, embeddings=embeddings
    )
    assert done.told_by == "tensor names"
    expected = {"conv", "word_embeddings", "lm_head"} if embeddings else {"conv"}
    assert {layer.name for layer in done.layers} == expected
    fresh = Convolved()
    fresh.load_state_dict(base.state_dict())
    for layer, update in updates(PeftModel.from_pretrained(fresh, tmp_path / "out")).items():
        change = tuned.get_submodule(layer).weight - base.get_submodule(layer).weight
        torch.testing.assert_close(update, change.detach(), rtol=0, atol=1e-5)
    if not embeddings:
        assert {t.name: t.why for t in done.rest} == {
            "conv.bias": "the bias of a layer",
            "word_embeddings.weight": "embedding",
            "lm_head.weight": "head",
        }


def test_what_changed_elsewhere_is_listed_with_how_much(tmp_path: Path) -> None:
    tiny = MODELS["llama"]
    base, tuned_folder, tuned = pair_of(tiny, tmp_path, "q_proj", "norm", "embed_tokens")
    done = extract_adapter(base, tuned_folder, tmp_path / "out", rank=2)
    assert {t.name for t in done.rest} == {
        "model.embed_tokens.weight", "model.norm.weight",
        *(f"model.layers.{i}.{norm}_layernorm.weight" for i in (0, 1) for norm in ("input", "post_attention")),
    }  # fmt: skip
    norm, before = next(t for t in done.rest if t.name == "model.norm.weight"), tiny.fresh().model.norm.weight.detach()
    assert norm.relative == pytest.approx(float(change_of(tiny, tuned, "model.norm").norm() / before.norm()))
    assert not norm.saved
    whole = sum(
        float((p - q).detach().norm()) ** 2 for p, q in zip(tuned.parameters(), tiny.fresh().parameters(), strict=True)
    )
    left = sum(t.change**2 for t in done.rest)
    assert done.left_out_share == pytest.approx((left / whole) ** 0.5, rel=1e-5)
    assert len(done.unchanged) == 21 - 2 - 6
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["modules_to_save"] is None and config["target_modules"] == ["q_proj"]
    assert json.loads(json.dumps(done.to_json()))["layers"][0]["kept"] == done.layers[0].kept


def test_a_body_alone_is_the_base_of_a_model_with_a_head(tmp_path: Path) -> None:
    tiny = MODELS["bert"]
    base = tiny.fresh()
    body = BertModel(base.config, add_pooling_layer=True)
    body.load_state_dict(base.bert.state_dict())
    body.save_pretrained(tmp_path / "base")
    tuned = changed(tiny.fresh())
    tuned.save_pretrained(tmp_path / "tuned")
    with pytest.raises(
        SpectuneError, match=r"has 2 tensors that .* lacks: classifier\.bias, classifier\.weight\. .*--save-rest"
    ):
        extract_adapter(tmp_path / "base", tmp_path / "tuned", tmp_path / "out")
    done = extract_adapter(tmp_path / "base", tmp_path / "tuned", tmp_path / "out", rank=48, save_rest=True)
    reached = output(loaded(tiny, tmp_path / "out"), tiny.inputs())
    torch.testing.assert_close(reached, output(tuned, tiny.inputs()), rtol=0, atol=1e-5)
    assert next(t for t in done.rest if t.name == "classifier.weight").why == "only the tuned model has it"


def test_half_precision_models_are_subtracted_in_float32(tmp_path: Path) -> None:
    tiny = MODELS["llama"]
    base, tuned = tiny.fresh().bfloat16(), changed(tiny.fresh()).bfloat16()
    base.save_pretrained(tmp_path / "base")
    tuned.save_pretrained(tmp_path / "tuned")
    extract_adapter(tmp_path / "base", tmp_path / "tuned", tmp_path / "out", rank=48)
    for layer, update in updates(loaded(tiny, tmp_path / "out")).items():
        exact = tuned.get_submodule(layer).weight.float() - base.get_submodule(layer).weight.float()
        torch.testing.assert_close(update, exact.detach(), rtol=0, atol=1e-6)
    tiny.fresh().save_pretrained(tmp_path / "float32")
    mixed = extract_adapter(tmp_path / "float32", tmp_path / "tuned", tmp_path / "mixed", rank=48, dtype=torch.bfloat16)
    assert mixed.dtypes == ("float32", "bfloat16")
    # Two factors rounded to 2^-9 of an entry each: some tenths of a percent, and it is measured.
    assert all(5e-4 < layer.lost < 8e-3 and layer.best < 1e-5 for layer in mixed.layers)


def test_one_weight_of_each_model_is_in_memory_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, tuned, _ = pair_of(MODELS["llama"], tmp_path)
    alive: list[weakref.ref[torch.UntypedStorage]] = []
    most = 0

    def reading(read: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def counted(self: TensorFile, name: str, *more: Any) -> torch.Tensor:
            nonlocal most
            tensor = read(self, name, *more)
            if self.path.name == "model.safetensors":
                alive.append(weakref.ref(tensor))  # type: ignore[arg-type]
                most = max(most, sum(ref() is not None for ref in alive))
            return tensor

        return counted

    monkeypatch.setattr(TensorFile, "tensor", reading(TensorFile.tensor))
    for form in ("lora", "spectral_a"):
        extract_adapter(base, tuned, tmp_path / form, to=form, rank=2)
    assert len(alive) > 80 and most <= 4  # the two of a layer, and the two before them until their names are reused


def test_a_file_that_is_not_what_was_found_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, tuned, _ = pair_of(MODELS["llama"], tmp_path)
    save = drafts.save_tensors

    def spoilt(path: Path, tensors: dict[str, torch.Tensor]) -> None:
        save(
            path,
            {name: 1.1 * tensor if name.endswith(("A.weight", "A_U")) else tensor for name, tensor in tensors.items()},
        )

    monkeypatch.setattr(drafts, "save_tensors", spoilt)
    for form in ("lora", "spectral_a"):
        with pytest.raises(SpectuneError, match=r"the written adapter misses .* more than expected"):
            extract_adapter(base, tuned, tmp_path / "out", to=form, rank=16)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "tuned"]


def edited(folder: Path, target: Path, edit: Callable[[dict[str, torch.Tensor]], Any]) -> Path:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    target.mkdir()
    save_file(tensors, target / "model.safetensors")
    return target


def test_models_that_do_not_belong_together_are_refused_by_name(tmp_path: Path) -> None:
    base, tuned, _ = pair_of(MODELS["llama"], tmp_path)
    lacking = edited(tuned, tmp_path / "lacking", lambda tensors: tensors.pop("model.norm.weight"))
    wider = edited(tuned, tmp_path / "wider", lambda t: t.update({"lm_head.weight": torch.zeros(70, 32)}))
    with pytest.raises(SpectuneError, match=r"lacks 1 tensor that .* has: model\.norm\.weight\. .*--exclude"):
        extract_adapter(base, lacking, tmp_path / "out")
    with pytest.raises(SpectuneError, match=r"has 1 tensor that .* lacks: model\.norm\.weight\."):
        extract_adapter(lacking, tuned, tmp_path / "out")
    with pytest.raises(
        SpectuneError, match=r"has 1 tensor in another shape than .*: lm_head\.weight \(64x32 -> 70x32\)"
    ):
        extract_adapter(base, wider, tmp_path / "out")
    with pytest.raises(SpectuneError, match=r"all 21 tensors are equal"):
        extract_adapter(base, base, tmp_path / "out")
    with pytest.raises(SpectuneError, match=r"no tensor has 'nrom' in its name\. Did you mean 'norm'"):
        extract_adapter(base, tuned, tmp_path / "out", exclude=["nrom"])
    done = extract_adapter(base, wider, tmp_path / "out", exclude=["lm_head", "q_proj"])
    assert done.excluded == ("lm_head.weight", *(f"model.layers.{i}.self_attn.q_proj.weight" for i in (0, 1)))
    assert not any("q_proj" in layer.name for layer in done.layers)


def test_a_change_that_no_adapter_can_hold_is_refused(tmp_path: Path) -> None:
    base, tuned, _ = pair_of(MODELS["llama"], tmp_path, "norm")
    with pytest.raises(SpectuneError, match=r"5 tensors changed, but none .*LlamaRMSNorm"):
        extract_adapter(base, tuned, tmp_path / "out", save_rest=True)


def test_an_adapter_on_one_of_two_tied_weights_is_refused(tmp_path: Path) -> None:
    base, tuned, _ = pair_of(MODELS["gpt2"], tmp_path)
    with pytest.raises(SpectuneError, match=r"lm_head and transformer\.wte share one weight"):
        extract_adapter(base, tuned, tmp_path / "out", embeddings=True)


def test_quantised_checkpoints_are_refused(tmp_path: Path) -> None:
    base, tuned, _ = pair_of(MODELS["llama"], tmp_path)
    config = json.loads((base / "config.json").read_text()) | {"quantization_config": {"quant_method": "gptq"}}
    (base / "config.json").write_text(json.dumps(config))
    with pytest.raises(SpectuneError, match="the checkpoint is quantised"):
        extract_adapter(base, tuned, tmp_path / "out")


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"to": "svft"}, "only lora and spectral_a"),
    ({"columns": "top"}, "which only spectral_a uses"),
    ({"to": "spectral_a", "energy": 0.9}, "only go with lora"),
    ({"to": "spectral_a", "dtype": torch.bfloat16}, "only go with lora"),
    ({"dtype": torch.int8}, "a LoRA can only be stored as"),
    ({"rank": 0}, "rank=0 must be at least 1"),
    ({"energy": 1.5}, "above 0 and at most 1"),
    ({"frobenius": 1.0}, "below 1"),
    ({"to": "spectral_a", "rank": 2, "columns": [0, 99]}, "no changed weight has all of these"),
]


@pytest.mark.parametrize(("options", "line"), WRONG, ids=[line for _, line in WRONG])
def test_wrong_options_are_refused(options: dict[str, Any], line: str, tmp_path: Path) -> None:
    base, tuned, _ = pair_of(MODELS["llama"], tmp_path)
    with pytest.raises(SpectuneError, match=line):
        extract_adapter(base, tuned, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("kind", "why", "saved"),
    [("mixtral", "transformers joins or splits it", False), ("gpt-oss", "GptOssExperts", True)],
)
def test_changed_experts_are_listed_and_saved_where_the_live_model_has_them(
    kind: str, why: str, saved: bool, tmp_path: Path
) -> None:
    fresh(kind).save_pretrained(tmp_path / "base")
    tuned = fresh(kind)
    for parameter in tuned.parameters():
        parameter.data += 0.01 * torch.ones_like(parameter)
    tuned.save_pretrained(tmp_path / "tuned")
    found = extract_adapter(tmp_path / "base", tmp_path / "tuned", tmp_path / "out", rank=1, save_rest=True)
    experts = [left for left in found.rest if "experts" in left.name]
    assert experts and all(left.why.startswith(why) and left.saved is saved for left in experts)
    # No tensor in the file is without a place in the model, which PEFT would pass over in silence.
    names = {name for name, _ in fresh(kind).named_parameters()}
    whole = [n for n in TensorFile.open(tmp_path / "out" / "adapter_model.safetensors").shapes if "lora_" not in n]
    assert whole and {n.removeprefix("base_model.model.").replace(".base_layer", "") for n in whole} <= names
    loaded = logits(PeftModel.from_pretrained(fresh(kind), tmp_path / "out").eval())
    if saved:  # routers amplify the rounding of the factors, 1e-7 of logits of .1
        torch.testing.assert_close(loaded, logits(tuned.eval()), rtol=0, atol=1e-3)
