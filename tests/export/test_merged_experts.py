"""Adapters of experts merged into a checkpoint: each matrix in its place, in the layout of the files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel

from spectune import METHODS, SpectralConfig, merge_checkpoint
from spectune.checkpoint import open_checkpoint
from spectune.errors import AdapterError
from spectune.surveys.adapter_source import open_adapter

from ..experts import MODELS, TARGETS, fresh, logits

# Two orders of the same float32 sums; the router's weights amplify a little.
NEAR = {"rtol": 1e-4, "atol": 2e-6}


def saved(kind: str, folder: Path, method: str = "spectral_a", shard: str = "5GB", **options: Any) -> PeftModel:
    """Save a base and an adapter of it that is not zero; get the live model."""
    fresh(kind).save_pretrained(folder / "base", max_shard_size=shard)
    given = {"r": 2} if "r" in METHODS[method].options() else {}
    options = {"target_modules": ["q_proj"], "target_parameters": TARGETS, **given, **options}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = get_peft_model(fresh(kind), SpectralConfig(method=method, init_weights=False, **options)).eval()
    model.save_pretrained(folder / "adapter")
    assert (logits(model) - logits(fresh(kind))).abs().max() > 1e-4
    return model


def merged_logits(kind: str, folder: Path) -> torch.Tensor:
    merge_checkpoint(folder / "base", folder / "adapter", folder / "merged")
    return logits(type(fresh(kind)).from_pretrained(folder / "merged").eval())


@pytest.mark.parametrize("kind", list(MODELS))
def test_experts_are_merged_under_the_names_of_the_files(kind: str, tmp_path: Path) -> None:
    model = saved(kind, tmp_path, shard="30KB")
    torch.testing.assert_close(merged_logits(kind, tmp_path), logits(model), **NEAR)
    base, merged = (open_checkpoint(tmp_path / name) for name in ("base", "merged"))
    assert merged.shapes == base.shapes and merged.dtypes == base.dtypes
    files = [{path.name for path in (tmp_path / name).glob("*.safetensors")} for name in ("base", "merged")]
    assert files[0] == files[1] and len(files[0]) > 1


# Also those that keep no directions, and so nothing that tells in x out from out x in: a square matrix, or one whose
# trained numbers have the same shapes either way.
@pytest.mark.parametrize("method", list(METHODS))
def test_every_method_is_merged_into_experts_that_are_stored_in_x_out(method: str, tmp_path: Path) -> None:
    model = saved("gpt-oss", tmp_path, method, target_parameters=TARGETS[1:], layers_to_transform=[0])
    torch.testing.assert_close(merged_logits("gpt-oss", tmp_path), logits(model), **NEAR)


@pytest.mark.parametrize("method", list(METHODS))
def test_a_square_layer_that_is_stored_in_x_out_is_merged_the_right_way_round(method: str, tmp_path: Path) -> None:
    sizes = {"vocab_size": 64, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32, "initializer_range": 0.2}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        base = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=1, eos_token_id=2)).eval()
        base.save_pretrained(tmp_path / "base")
        plain = logits(base)
        config = SpectralConfig(method=method, target_modules=["attn.c_proj"], init_weights=False)
        model = get_peft_model(base, config).eval()
    model.save_pretrained(tmp_path / "adapter")
    merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    assert (logits(model) - plain).abs().max() > 1e-3
    torch.testing.assert_close(logits(GPT2LMHeadModel.from_pretrained(tmp_path / "merged")), logits(model), **NEAR)


def test_only_the_experts_with_an_adapter_change(tmp_path: Path) -> None:
    options = {"layers_to_transform": [1], "exclude_modules": ["experts.down_proj.2"], "target_modules": []}
    model = saved("gpt-oss", tmp_path, **options)
    torch.testing.assert_close(merged_logits("gpt-oss", tmp_path), logits(model), **NEAR)
    before, after = (open_checkpoint(tmp_path / name) for name in ("base", "merged"))
    stem = "model.layers.1.mlp.experts."
    assert {name for name, tensor in before if not tensor.equal(after.tensor(name))} == {
        stem + "down_proj", stem + "gate_up_proj"
    }  # fmt: skip
    same = [
        a.equal(b) for a, b in zip(before.tensor(stem + "down_proj"), after.tensor(stem + "down_proj"), strict=True)
    ]
    assert same == [False, False, True, False]


def test_a_router_and_experts_of_other_ranks_are_merged_in_half_precision(tmp_path: Path) -> None:
    ranks = {"down_proj": 1, "layers.1.mlp.experts.gate_up_proj": 3}
    saved("mixtral", tmp_path, target_parameters=[*TARGETS, "gate.weight"], rank_pattern=ranks, target_modules=[])
    half = fresh("mixtral").to(torch.bfloat16)
    half.save_pretrained(tmp_path / "half")
    whole, done = (
        merge_checkpoint(tmp_path / base, tmp_path / "adapter", tmp_path / f"merged-{base}")
        for base in ("base", "half")
    )
    assert [tensor.name for tensor in whole.tensors] == [tensor.name for tensor in done.tensors]
    assert {"model.layers.0.mlp.gate.weight.0.weight", "model.layers.1.mlp.experts.down_proj.3.weight"} <= {
        tensor.name for tensor in done.tensors
    }
    assert whole.worst_rounding < 1e-4 < done.worst_rounding and done.dtype == "bfloat16"
    rounded, exact = (open_checkpoint(tmp_path / f"merged-{base}") for base in ("half", "base"))
    for name, tensor in rounded:
        assert tensor.dtype == torch.bfloat16
        # bfloat16 keeps 8 bits: the base is rounded once, the sum once more.
        torch.testing.assert_close(tensor.float(), exact.tensor(name), rtol=2**-7, atol=1e-4)


def test_an_expert_that_the_base_does_not_have_is_refused(tmp_path: Path) -> None:
    saved("mixtral", tmp_path, target_modules=[])
    base = fresh("mixtral")
    base.config.num_local_experts = 3
    smaller = type(base)(base.config)
    smaller.save_pretrained(tmp_path / "base2")
    with pytest.raises(AdapterError, match=r"no tensor for the layer '\S+experts\.\w+\.3'"):
        merge_checkpoint(tmp_path / "base2", tmp_path / "adapter", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("kind", ["mixtral", "gpt-oss"])
def test_experts_are_inspected_one_by_one(kind: str, tmp_path: Path) -> None:
    model = saved(kind, tmp_path)
    found = {update.name: update for update in open_adapter(tmp_path / "adapter", tmp_path / "base").updates()}
    stack = model.base_model.model.model.layers[1].mlp.experts
    assert len(found) == 2 + 2 * 2 * 4
    for attribute in ("gate_up_proj", "down_proj"):
        for place in range(4):
            update = found[f"model.layers.1.mlp.experts.{attribute}.{place}"]
            stored = getattr(stack.base_layer, attribute)[place]
            W_OI = stored.T if kind == "gpt-oss" else stored
            torch.testing.assert_close(update.W_OI, W_OI.detach())
            assert update.delta.shape == tuple(W_OI.shape)
