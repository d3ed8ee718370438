"""The proof finds what is wrong: in one number of one layer, in the scaling, in what is missing, in the logits."""

import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from spectune.adapter import spectral_modules
from spectune.errors import AdapterError, ExportError
from spectune.export import export_lora, verify_lora
from spectune.export import lora as lora_file
from spectune.export import verify as verify_file
from spectune.export.logits import compare_logits, random_batch

from .models import MODELS, adapted, batch

STEM = "base_model.model.model.layers.1.self_attn.v_proj.lora_"


@pytest.fixture
def exported(tmp_path):
    model = adapted("llama-rank_pattern", target_modules=["q_proj", "v_proj"], rank_pattern={})
    export_lora(model, tmp_path / "out")
    return model, tmp_path / "out"


def edit(folder, change):
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def test_the_proof_lists_every_layer(exported):
    model, folder = exported
    proof = verify_lora(model, "default", folder)
    rows = proof.table()
    assert [row[0] for row in rows] == [f"model.layers.{i}.self_attn.{name}_proj" for i in range(2) for name in "qv"]
    assert all(rank == 4 and 0 < error < 1e-7 and relative < 1e-6 for _, rank, error, relative in rows)
    assert proof.logits.layers_run == 4
    again = json.loads(json.dumps(proof.to_json()))
    assert again["layers"][0]["rank"] == 4
    assert again["logits"]["error"] <= again["logits"]["tolerance"] * again["logits"]["largest"]


def test_the_errors_are_those_of_a_plain_computation(exported):
    model, folder = exported
    edit(folder, lambda tensors: tensors[STEM + "A.weight"].mul_(1 + 3e-8))
    proof = verify_lora(model, "default", folder)
    tensors = load_file(folder / "adapter_model.safetensors")
    layer = model.get_submodule("base_model.model.model.layers.1.self_attn.v_proj")
    module = layer.spectune_adapter["default"]
    S, U, Vh = (tensor.detach().double() for tensor in (module.S_R, module.U_OR, module.Vh_RI))
    A_U, A_Vh = module.A_U.detach().double(), module.A_Vh.detach().double()
    dW = (U + A_U) @ torch.diag(S) @ (Vh + A_Vh) - U @ torch.diag(S) @ Vh
    error = (tensors[STEM + "B.weight"].double() @ tensors[STEM + "A.weight"].double() - dW).abs().max()
    # The method adds Vh + A_Vh in float32, the line above in float64: half a float32 rounding of Vh.
    assert abs(proof.layers[3].error - float(error)) < 3e-8 * float(S.max())
    assert proof.layers[3].largest == pytest.approx(float(dW.abs().max()), rel=1e-6)


def test_blocks_of_rows_give_what_the_whole_gives(exported, monkeypatch):
    model, folder = exported
    whole = verify_lora(model, "default", folder, check_logits=False)
    monkeypatch.setattr(verify_file, "BLOCK_ROWS", 5)
    blocks = verify_lora(model, "default", folder, check_logits=False)
    for one, two in zip(whole.layers, blocks.layers, strict=True):
        assert (one.error, one.largest) == pytest.approx((two.error, two.largest), rel=1e-6)


@pytest.mark.parametrize("side", ["A", "B"])
def test_one_wrong_number_is_found_in_its_layer(exported, side):
    model, folder = exported
    edit(folder, lambda tensors: tensors[f"{STEM}{side}.weight"][-1, -1].add_(1e-4))
    with pytest.raises(ExportError, match=r"layers\.1\.self_attn\.v_proj: the exported factors differ from the update"):
        verify_lora(model, "default", folder)


def test_nan_is_an_error_and_not_a_small_number(exported):
    model, folder = exported
    edit(folder, lambda tensors: tensors[f"{STEM}A.weight"][0, 0].fill_(float("nan")))
    with pytest.raises(ExportError, match="differ from the update by nan"):
        verify_lora(model, "default", folder)


def test_wrong_shapes_scaling_and_missing_layers_are_found(exported):
    model, folder = exported
    config = json.loads((folder / "adapter_config.json").read_text())
    for wrong in ({"lora_alpha": 8}, {"alpha_pattern": {"q_proj": 2}}, {"use_rslora": True}):
        (folder / "adapter_config.json").write_text(json.dumps(config | wrong))
        with pytest.raises(ExportError, match="must have scaling 1"):
            verify_lora(model, "default", folder)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    edit(folder, lambda tensors: tensors.update({STEM + "A.weight": torch.ones(4, 31)}))
    with pytest.raises(ExportError, match=r"the factors are \(16, 4\) and \(4, 31\)"):
        verify_lora(model, "default", folder)
    edit(folder, lambda tensors: tensors.pop(STEM + "A.weight"))
    with pytest.raises(ExportError, match="it lacks"):
        verify_lora(model, "default", folder)
    edit(folder, lambda tensors: tensors.update({STEM + "A.weight": torch.ones(1), "x.lora_A.weight": torch.ones(1)}))
    with pytest.raises(ExportError, match="it also has"):
        verify_lora(model, "default", folder)


def test_a_spectral_folder_is_not_taken_for_a_lora(exported, tmp_path):
    model, _ = exported
    model.save_pretrained(tmp_path / "spectral")
    with pytest.raises(AdapterError, match="a LORA adapter is needed, but this is a SPECTUNE one"):
        verify_lora(model, "default", tmp_path / "spectral")


def test_an_export_whose_proof_fails_leaves_no_folder(tmp_path, monkeypatch):
    factors = lora_file.lora_factors

    def wrong(*args):
        B_OP, A_PI = factors(*args)
        return B_OP, A_PI * 1.001

    monkeypatch.setattr(lora_file, "lora_factors", wrong)
    with pytest.raises(ExportError, match="differ from the update"):
        export_lora(adapted("llama-spectral_a"), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def wrong_by(model, factor):
    """Get factors of every layer, as the comparison of logits takes them, all wrong by a factor."""
    result = {}
    for _, _, module in spectral_modules(model):
        delta = module.delta()
        result[module] = (delta.left_OP * delta.core, delta.right_QI * factor)
    return result


def test_the_logits_are_compared_and_not_only_the_layers():
    model = adapted("llama-spectral_a")
    proof = compare_logits(model, "default", wrong_by(model, 1.0), batch("llama"))
    assert proof.error <= proof.tolerance * proof.largest / 4
    with pytest.raises(ExportError, match="logits: the exported LoRA differs"):
        compare_logits(model, "default", wrong_by(model, 1.05), batch("llama"))


def test_a_disabled_or_inactive_adapter_is_compared_all_the_same():
    model = adapted("llama-spectral_a")
    with model.disable_adapter(), pytest.raises(ExportError, match="differs"):
        compare_logits(model, "default", wrong_by(model, 1.05), None)


@pytest.mark.parametrize("name", MODELS)
def test_a_random_batch_is_built_from_the_config(name):
    model = MODELS[name]()
    state = torch.get_rng_state()
    one, two = random_batch(model), random_batch(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(one[key], two[key]) for key in one)
    model(**one)


def test_what_cannot_be_measured_is_said(exported):
    model, folder = exported
    assert verify_lora(model, "default", folder, check_logits=False).logits.skipped == "check_logits is off"
    plain = model.get_base_model().model.layers[0].self_attn
    assert "no random batch can be made for LlamaAttention" in random_batch(plain)
    vit = MODELS["vit"]()
    vit.config = SimpleNamespace()
    assert "does not give the image size" in random_batch(vit)
    bert = MODELS["bert"]()
    bert.config = SimpleNamespace()
    assert "does not give the vocabulary size" in random_batch(bert)


def test_a_model_that_cannot_run_is_skipped_on_our_batch_but_fails_on_the_users(exported):
    model, folder = exported
    model.get_base_model().config.vocab_size = 10_000
    assert "does not run on a random batch" in verify_lora(model, "default", folder).logits.skipped
    with pytest.raises(IndexError):
        verify_lora(model, "default", folder, {"input_ids": torch.tensor([[10_000]])})


def test_layers_that_the_batch_never_reached_are_no_proof(exported):
    model, folder = exported

    def ignore(input_ids, **kwargs):
        return torch.zeros(1)

    model.forward = ignore
    assert "did not reach any adapted layer" in verify_lora(model, "default", folder).logits.skipped
