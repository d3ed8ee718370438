"""What each server makes of an exported folder, by the rules in its sources: the update itself, or a word beforehand.

The rules are restated here from those sources, each with the file that it was read in; none of their code is run but
diffusers', where it is installed.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from spectune import SpectralConfig, export_lora
from spectune.adapter import spectral_modules
from spectune.algebra import dense
from spectune.checkpoint import open_checkpoint, read_adapter_folder
from spectune.export.lora import LoraExport
from spectune.export.readers import refusals, vllm_rank

from ..models import MODELS
from .models import adapted

MIXED = "llama-rank_pattern"
CAUSAL = {"task_type": "CAUSAL_LM"}
# Factors are rounded once to float32.
TOLERANCE = 1e-6


def exported(folder: Path, case: str = MIXED, pad: bool = True, **options: Any) -> tuple[Any, LoraExport]:
    model = adapted(case, **(CAUSAL | options))
    return model, export_lora(model, folder / "lora", pad=pad, check_logits=False)


def updates(model: Any) -> dict[str, torch.Tensor]:
    return {path.removeprefix("base_model.model."): dense(m.delta()).detach() for path, _, m in spectral_modules(model)}


def factors(folder: Path) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    tensors = load_file(folder / "adapter_model.safetensors")
    stems = {name.removesuffix(".lora_A.weight") for name in tensors if name.endswith(".lora_A.weight")}
    return {
        stem.removeprefix("base_model.model."): (tensors[f"{stem}.lora_B.weight"], tensors[f"{stem}.lora_A.weight"])
        for stem in stems
    }


def config(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "adapter_config.json").read_text())
    return found


# How each server scales B A, from the config and the factor B.
SCALES = {
    # src/llama-adapter.h, llama_adapter_lora_weight::get_scale: alpha / b->ne[0], one alpha in the file
    # (convert_lora_to_gguf.py: lparams["lora_alpha"]).
    "llama.cpp": lambda said, B_OP: said["lora_alpha"] / B_OP.shape[1],
    # vllm/lora/peft_helper.py: vllm_lora_scaling_factor = lora_alpha / r, of the config.
    "vLLM": lambda said, B_OP: said["lora_alpha"] / said["r"],
    # python/sglang/srt/lora/lora.py: scaling = config.lora_alpha / config.r.
    "SGLang": lambda said, B_OP: said["lora_alpha"] / said["r"],
}


@pytest.mark.parametrize("reader", list(SCALES))
def test_every_server_computes_the_update_of_every_layer(reader: str, tmp_path: Path) -> None:
    model, done = exported(tmp_path)
    said, expected = config(done.path), updates(model)
    read = factors(done.path)
    assert read.keys() == expected.keys() and reader not in done.refused
    for layer, (B_OP, A_PI) in read.items():
        dW_OI = SCALES[reader](said, B_OP) * B_OP @ A_PI
        torch.testing.assert_close(dW_OI, expected[layer], rtol=0, atol=TOLERANCE * float(expected[layer].abs().max()))


def test_several_ranks_in_one_file_are_wrong_where_one_alpha_is_read(tmp_path: Path) -> None:
    """Why padding is the default: the same adapter without it, by llama.cpp's rule."""
    _, done = exported(tmp_path, pad=False)
    said = config(done.path)
    scales = {SCALES["llama.cpp"](said, B_OP) for B_OP, _ in factors(done.path).values()}
    assert len(scales) == 3 and set(done.refused) == {"vLLM", "SGLang", "llama.cpp"}
    assert done.refused["llama.cpp"] == "ranks 4 to 14 in one file; export without --no-pad"


def test_names_are_those_that_the_converter_of_llama_cpp_and_vllm_take_apart(tmp_path: Path) -> None:
    """convert_lora_to_gguf.py, get_base_tensor_name; vllm/lora/utils.py, parse_fine_tuned_lora_name."""
    MODELS["llama"].fresh().save_pretrained(tmp_path / "base")
    _, done = exported(tmp_path)
    base = open_checkpoint(tmp_path / "base").names
    for name in load_file(done.path / "adapter_model.safetensors"):
        assert name.startswith("base_model.model.") and name.endswith((".lora_A.weight", ".lora_B.weight"))
        stored = name.removeprefix("base_model.model.").replace(".lora_A.weight", ".weight")
        assert stored.replace(".lora_B.weight", ".weight") in base


def test_the_config_has_what_servers_read_from_it(tmp_path: Path) -> None:
    _, done = exported(tmp_path)
    said = config(done.path)
    # vllm/lora/peft_helper.py: r, lora_alpha and target_modules are required; bias, modules_to_save and DoRA refused.
    assert said["r"] == said["lora_alpha"] == 14 and said["bias"] == "none" and not said["modules_to_save"]
    assert not said["use_dora"] and not said["use_rslora"] and said["rank_pattern"] == said["alpha_pattern"] == {}
    # python/sglang/srt/lora/lora_config.py and lora.py: a list of names, and peft_type "lora" in any case.
    assert isinstance(said["target_modules"], list) and said["peft_type"].lower() == "lora"


@pytest.mark.parametrize(("rank", "allowed"), [(1, 1), (2, 8), (16, 16), (17, 32), (257, 320), (512, 512), (513, None)])
def test_vllm_takes_certain_ranks_only(rank: int, allowed: int | None) -> None:
    """vllm/config/lora.py: MaxLoRARanks; 16 is the default of --max-lora-rank."""
    assert vllm_rank(rank) == allowed


def test_a_head_that_was_trained_in_full_is_said_to_be_refused(tmp_path: Path) -> None:
    """PEFTHelper: "vLLM only supports modules_to_save being None"; the converter stops at tensors of another kind."""
    _, done = exported(tmp_path, "bert-classifier", task_type="SEQ_CLS")
    assert done.refused["vLLM"] == done.refused["llama.cpp"] == "classifier was trained in full"


def test_conv1d_layers_are_turned_around_by_llama_cpp(tmp_path: Path) -> None:
    """convert_hf_to_gguf.py transposes c_attn, c_proj and c_fc of GPT-2; PEFT's factors are out x in already."""
    _, done = exported(tmp_path, "gpt2-conv1d")
    assert "Conv1D" in done.refused["llama.cpp"] and "vLLM" not in done.refused


def edited(folder: Path, rank: int | None = None, **values: Any) -> dict[str, str]:
    """What servers would say of the folder with other values in its config, or factors of another rank."""
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    if rank is not None:
        tensors = load_file(folder / "adapter_model.safetensors")
        for name, tensor in tensors.items():
            missing = rank - min(tensor.shape)
            pads = (0, 0, 0, missing) if ".lora_A." in name else (0, missing)
            tensors[name] = torch.nn.functional.pad(tensor, pads)
        save_file(tensors, folder / "adapter_model.safetensors")
    return refusals(read_adapter_folder(folder))


def test_what_a_server_does_not_read_is_said(tmp_path: Path) -> None:
    _, done = exported(tmp_path)
    assert edited(done.path) == {}
    assert edited(done.path, target_modules=r".*\.q_proj").keys() == {"SGLang"}
    assert edited(done.path, target_modules=["q_proj"], task_type="SEQ_2_SEQ_LM").keys() == {"llama.cpp"}
    assert "more than it serves (512)" in edited(done.path, rank=600, r=600, lora_alpha=600)["vLLM"]


def test_diffusers_gives_every_layer_the_scaling_one(tmp_path: Path) -> None:
    """diffusers/utils/peft_utils.py, get_peft_kwargs: without alphas, alpha is the rank of the first layer (older
    releases) or each layer's own: one rank for all is right for both."""
    peft_utils = pytest.importorskip("diffusers.utils.peft_utils")
    model = adapted(MIXED)
    export_lora(model, tmp_path / "lora", diffusers="text_encoder", check_logits=False)
    tensors = load_file(tmp_path / "lora" / "pytorch_lora_weights.safetensors")
    assert all(name.startswith("text_encoder.") for name in tensors)
    ranks = {name: tensor.shape[1] for name, tensor in tensors.items() if "lora_B" in name}
    said = peft_utils.get_peft_kwargs(ranks, network_alpha_dict=None, peft_state_dict=tensors)
    assert set(ranks.values()) == {14} and said["r"] == said["lora_alpha"] == 14
    assert said["rank_pattern"] == said["alpha_pattern"] == {} and not said["lora_bias"] and not said["use_dora"]


def test_mixed_methods_of_one_model_are_padded_each_by_itself(tmp_path: Path) -> None:
    model = adapted("llama-svft-rectangular", **CAUSAL)
    model.add_adapter("second", SpectralConfig(r=2, target_modules=["q_proj"], init_weights=False, **CAUSAL))
    first = export_lora(model, tmp_path / "first", adapter_name="default", check_logits=False)
    second = export_lora(model, tmp_path / "second", adapter_name="second", check_logits=False)
    assert set(first.ranks.values()) == {32} and min(first.exact_ranks.values()) == 16
    assert set(second.ranks.values()) == {4} and not first.refused and not second.refused
