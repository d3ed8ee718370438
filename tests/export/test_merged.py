"""Rules of merging a whole checkpoint, and of cutting a LoRA to a rank."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from spectune import METHODS, SpectralConfig, SpectuneError, export_lora, merge_checkpoint
from spectune.adapter import spectral_modules
from spectune.algebra import truncate
from spectune.checkpoint import open_checkpoint
from spectune.errors import AdapterError, ExportError, OutputError

from ..models import MODELS, Tiny, output
from ..tuner.conftest import adapted, config_for, train
from .words import tokenizer


def saved_base(tiny: Tiny, folder: Path, dtype: torch.dtype = torch.float32, shard: str = "5GB") -> Path:
    tiny.fresh().to(dtype).save_pretrained(folder, max_shard_size=shard)
    return folder


def reopened(tiny: Tiny, folder: Path) -> torch.nn.Module:
    return type(tiny.fresh()).from_pretrained(folder).eval()


@pytest.mark.parametrize("method", list(METHODS))
@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "t5"])
def test_a_merged_checkpoint_computes_what_the_adapter_computes(name: str, method: str, tmp_path: Path) -> None:
    tiny = MODELS[name]
    base, model = saved_base(tiny, tmp_path / "base"), adapted(tiny, method)
    model.save_pretrained(tmp_path / "adapter")
    done = merge_checkpoint(base, tmp_path / "adapter", tmp_path / "merged")
    merged = reopened(tiny, tmp_path / "merged")
    torch.testing.assert_close(output(merged, tiny.inputs()), output(model, tiny.inputs()), rtol=0, atol=2e-5)
    assert len(done.tensors) == len(list(spectral_modules(model))) and done.worst_rounding < 1e-5


def test_shards_index_and_other_files_stand_where_they_stood(tmp_path: Path) -> None:
    tiny = MODELS["llama"]
    base = saved_base(tiny, tmp_path / "base", shard="20KB")
    (base / "tokenizer.json").write_text("{}")
    model = adapted(tiny, "spectral_a")
    model.save_pretrained(tmp_path / "adapter")
    merge_checkpoint(base, tmp_path / "adapter", tmp_path / "merged")
    files = {folder: {p.name for p in folder.iterdir()} for folder in (base, tmp_path / "merged")}
    assert files[tmp_path / "merged"] == files[base] | {"README.md"}
    assert len(list(base.glob("*.safetensors"))) > 2
    torch.testing.assert_close(
        output(reopened(tiny, tmp_path / "merged"), tiny.inputs()), output(model, tiny.inputs()), rtol=0, atol=2e-5
    )


def test_a_half_precision_checkpoint_is_rounded_once_and_the_loss_is_told(tmp_path: Path) -> None:
    tiny = MODELS["llama"]
    base = saved_base(tiny, tmp_path / "base", torch.bfloat16)
    model = adapted(tiny, "spectral_a")
    model.save_pretrained(tmp_path / "adapter")
    done = merge_checkpoint(base, tmp_path / "adapter", tmp_path / "merged")
    stored = load_file(tmp_path / "merged" / "model.safetensors")
    for layer, _, module in spectral_modules(model):
        name = f"{layer.removeprefix('base_model.model.')}.weight"
        half = model.get_submodule(layer).base_layer.weight.to(torch.bfloat16)
        exact = half.float() + (module.delta().left_OP * module.delta().core) @ module.delta().right_QI
        # Within one unit of bfloat16 (2^-8) of the exact sum, entry by entry, and the alignment's 1e-2 of the update.
        assert ((stored[name].float() - exact).abs() <= exact.abs() * 2**-8 + 2e-2 * exact.abs().max()).all()
    assert 1e-4 < done.worst_rounding < 0.2


def test_modules_trained_in_full_are_merged_too(tmp_path: Path) -> None:
    tiny = MODELS["bert"]
    base, model = saved_base(tiny, tmp_path / "base"), adapted(tiny, "svft", modules_to_save=["classifier"])
    model.save_pretrained(tmp_path / "adapter")
    done = merge_checkpoint(base, tmp_path / "adapter", tmp_path / "merged")
    assert done.copied == ("classifier",)
    merged = reopened(tiny, tmp_path / "merged")
    torch.testing.assert_close(output(merged, tiny.inputs()), output(model, tiny.inputs()), rtol=0, atol=2e-5)


@pytest.mark.parametrize("bias", ["all", "spectune_only"])
@pytest.mark.parametrize("name", ["gpt2", "bert"])
def test_trained_biases_are_merged_too(name: str, bias: str, tmp_path: Path) -> None:
    tiny = MODELS[name]
    base, model = saved_base(tiny, tmp_path / "base"), adapted(tiny, "spectral_a", bias=bias)
    model.save_pretrained(tmp_path / "adapter")
    merge_checkpoint(base, tmp_path / "adapter", tmp_path / "merged")
    trained = output(model, tiny.inputs())
    merged = reopened(tiny, tmp_path / "merged")
    assert open_checkpoint(tmp_path / "merged").names == open_checkpoint(base).names
    torch.testing.assert_close(output(merged, tiny.inputs()), trained, rtol=0, atol=2e-5)
    torch.testing.assert_close(output(model.merge_and_unload(), tiny.inputs()), trained, rtol=0, atol=2e-5)


def test_shards_of_equal_names_in_folders_of_their_own_stay_apart(tmp_path: Path) -> None:
    tiny = MODELS["llama"]
    base = saved_base(tiny, tmp_path / "base")
    whole = load_file(base / "model.safetensors")
    (base / "model.safetensors").unlink()
    weight_map = {}
    for place, name in enumerate(sorted(whole)):
        shard = f"part{place % 2}/model.safetensors"
        weight_map[name] = shard
    for shard in set(weight_map.values()):
        (base / shard).parent.mkdir()
        save_file({name: whole[name] for name in whole if weight_map[name] == shard}, base / shard, {"format": "pt"})
    (base / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    model = adapted(tiny, "spectral_a")
    model.save_pretrained(tmp_path / "adapter")
    merge_checkpoint(base, tmp_path / "adapter", tmp_path / "merged")
    merged = open_checkpoint(tmp_path / "merged")
    assert {name: str(file.path.relative_to(tmp_path / "merged")) for name, file in merged.files.items()} == weight_map
    live = model.merge_and_unload().state_dict()
    for name in whole:
        torch.testing.assert_close(merged.tensor(name), live[name], rtol=0, atol=1e-6)


def test_a_base_checkpoint_without_the_bodys_name_is_understood(tmp_path: Path) -> None:
    tiny = MODELS["bert"]
    model = adapted(tiny, "spectral_a")
    model.save_pretrained(tmp_path / "adapter")
    tiny.fresh().bert.save_pretrained(tmp_path / "body")
    done = merge_checkpoint(tmp_path / "body", tmp_path / "adapter", tmp_path / "merged")
    assert all(t.name.startswith("encoder.layer.") for t in done.tensors)


def test_another_base_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    tiny = MODELS["llama"]
    adapted(tiny, "spectral_a").save_pretrained(tmp_path / "adapter")
    tiny.fresh(seed=1).save_pretrained(tmp_path / "other")
    with pytest.raises(SpectuneError, match="trained on another base weight"):
        merge_checkpoint(tmp_path / "other", tmp_path / "adapter", tmp_path / "merged")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "other"]


def test_a_quantised_base_is_refused_before_any_work(tmp_path: Path) -> None:
    tiny = MODELS["llama"]
    base = saved_base(tiny, tmp_path / "base")
    adapted(tiny, "spectral_a").save_pretrained(tmp_path / "adapter")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "bitsandbytes"}}))
    with pytest.raises(SpectuneError, match=r"the base is quantised \(bitsandbytes\)"):
        merge_checkpoint(base, tmp_path / "adapter", tmp_path / "merged")


def test_an_incomplete_adapter_is_refused(tmp_path: Path) -> None:
    tiny = MODELS["llama"]
    base = saved_base(tiny, tmp_path / "base")
    adapted(tiny, "spectral_a").save_pretrained(tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors.pop(next(name for name in tensors if name.endswith("A_U")))
    save_file(tensors, path)
    with pytest.raises(SpectuneError, match="has no tensor 'A_U'"):
        merge_checkpoint(base, tmp_path / "adapter", tmp_path / "merged")


def test_a_new_head_stands_in_the_index_so_that_a_second_merge_keeps_it(tmp_path: Path) -> None:
    tiny = MODELS["bert"]
    tiny.fresh().bert.save_pretrained(tmp_path / "body", max_shard_size="20KB")
    model = adapted(tiny, "spectral_a", modules_to_save=["classifier"])
    model.save_pretrained(tmp_path / "adapter")
    merge_checkpoint(tmp_path / "body", tmp_path / "adapter", tmp_path / "merged")
    merged = open_checkpoint(tmp_path / "merged")
    head = model.base_model.model.classifier.modules_to_save["default"]
    assert torch.equal(merged.tensor("classifier.weight"), head.weight)
    told = json.loads((tmp_path / "merged" / "model.safetensors.index.json").read_text())["metadata"]
    before = json.loads((tmp_path / "body" / "model.safetensors.index.json").read_text())["metadata"]
    more = head.weight.numel() + head.bias.numel()
    assert told == {key: told[key] for key in before} and told["total_size"] == before["total_size"] + 4 * more
    assert told.get("total_parameters", more) == before.get("total_parameters", 0) + more
    (tmp_path / "merged" / "config.json").unlink()  # of the body alone
    tiny.fresh().config.save_pretrained(tmp_path / "merged")
    again = reopened(tiny, tmp_path / "merged").to(torch.float32)
    torch.testing.assert_close(output(again, tiny.inputs()), output(model, tiny.inputs()), rtol=0, atol=2e-5)
    second = get_peft_model(again, config_for(tiny, "spectral_a"))
    train(second)
    second.save_pretrained(tmp_path / "second")
    merge_checkpoint(tmp_path / "merged", tmp_path / "second", tmp_path / "twice")
    assert open_checkpoint(tmp_path / "twice").names == merged.names


def test_a_module_trained_in_full_replaces_the_one_of_the_longest_equal_name(tmp_path: Path) -> None:
    tiny = MODELS["bert"]
    model = adapted(tiny, "spectral_a", modules_to_save=["pooler"])
    model.save_pretrained(tmp_path / "adapter")
    pooler = model.base_model.model.bert.pooler.modules_to_save["default"].dense
    tiny.fresh().bert.save_pretrained(tmp_path / "body")
    path = tmp_path / "body" / "model.safetensors"
    save_file({**load_file(path), "dense.weight": torch.ones(32, 32)}, path, {"format": "pt"})
    merge_checkpoint(tmp_path / "body", tmp_path / "adapter", tmp_path / "merged")
    merged = open_checkpoint(tmp_path / "merged")
    assert torch.equal(merged.tensor("dense.weight"), torch.ones(32, 32))
    assert torch.equal(merged.tensor("pooler.dense.weight"), pooler.weight)


def test_a_body_that_was_trained_alone_replaces_what_the_whole_model_calls_otherwise(tmp_path: Path) -> None:
    tiny = MODELS["bert"]
    base = saved_base(tiny, tmp_path / "base")
    model = get_peft_model(tiny.fresh().bert, config_for(tiny, "spectral_a", modules_to_save=["pooler"]))
    train(model)
    model.save_pretrained(tmp_path / "adapter")
    merge_checkpoint(base, tmp_path / "adapter", tmp_path / "merged")
    merged = open_checkpoint(tmp_path / "merged")
    pooler = model.base_model.model.pooler.modules_to_save["default"].dense
    assert torch.equal(merged.tensor("bert.pooler.dense.weight"), pooler.weight)
    assert merged.names == open_checkpoint(base).names


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_nan_in_a_module_trained_in_full_is_not_merged(number: float, tmp_path: Path) -> None:
    tiny = MODELS["bert"]
    base = saved_base(tiny, tmp_path / "base")
    adapted(tiny, "svft", modules_to_save=["classifier"]).save_pretrained(tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors["base_model.model.classifier.bias"][1] = number
    save_file(tensors, path)
    with pytest.raises(AdapterError, match=r"'base_model.model.classifier.bias' contains NaN or infinity"):
        merge_checkpoint(base, tmp_path / "adapter", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("what", ["classifier", "query"])
def test_numbers_beyond_the_dtype_of_the_base_are_refused(what: str, tmp_path: Path) -> None:
    tiny = MODELS["bert"]
    base = saved_base(tiny, tmp_path / "base", torch.float16)
    model = adapted(tiny, "spectral_a", modules_to_save=["classifier"])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name if what == "classifier" else f"0.attention.self.{what}" in name:
                parameter.mul_(1e8)
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ExportError, match=rf"{what}.*too large for the base's float16"):
        merge_checkpoint(base, tmp_path / "adapter", tmp_path / "merged")


@pytest.mark.parametrize("output", ["base", "link", "base/../base", "blobs", "adapter", "."])
def test_neither_base_nor_adapter_is_ever_replaced(output: str, tmp_path: Path) -> None:
    tiny = MODELS["llama"]
    base = saved_base(tiny, tmp_path / "base")
    (tmp_path / "blobs").mkdir()
    (base / "model.safetensors").rename(tmp_path / "blobs" / "weights")
    (base / "model.safetensors").symlink_to(tmp_path / "blobs" / "weights")
    (tmp_path / "link").symlink_to(base)
    adapted(tiny, "spectral_a").save_pretrained(tmp_path / "adapter")
    before = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*"))
    with pytest.raises(OutputError, match="the output would replace .*, a source. Choose another folder"):
        merge_checkpoint(base, tmp_path / "adapter", tmp_path / output, overwrite=True)
    assert sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*")) == before
    open_checkpoint(base)


def test_weights_that_were_not_merged_stay_behind(tmp_path: Path) -> None:
    tiny = MODELS["llama"]
    base = saved_base(tiny, tmp_path / "base")
    for name in ("consolidated.safetensors", "pytorch_model.bin", "pytorch_model.bin.index.json", "tokenizer.json"):
        (base / name).write_bytes(b"{}")
    adapted(tiny, "spectral_a").save_pretrained(tmp_path / "adapter")
    merge_checkpoint(base, tmp_path / "adapter", tmp_path / "merged")
    found = {path.name for path in (tmp_path / "merged").iterdir()}
    assert found == {"README.md", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json"}


def test_truncation_is_the_best_of_its_rank() -> None:
    B_OP, A_PI = torch.randn(9, 5, dtype=torch.float64), torch.randn(5, 7, dtype=torch.float64)
    U, S, Vh = torch.linalg.svd(B_OP @ A_PI)
    for rank in range(1, 6):
        B, A, lost = truncate(B_OP, A_PI, rank)
        torch.testing.assert_close(B @ A, U[:, :rank] * S[:rank] @ Vh[:rank], rtol=1e-9, atol=1e-9)
        assert lost == pytest.approx(float(S[rank:].norm() / S.norm()), abs=1e-12)


def test_a_lower_rank_must_be_allowed_and_its_loss_is_told(tmp_path: Path) -> None:
    model = adapted(MODELS["llama"], "spectral_a")
    with pytest.raises(SpectuneError, match=r"cutting to rank 4 loses .*%.*--allow-lossy"):
        export_lora(model, tmp_path / "lora", max_rank=4)
    assert list(tmp_path.iterdir()) == []
    done = export_lora(model, tmp_path / "lora", max_rank=4, allow_lossy=True)
    assert done.max_rank == 4 and all(0 < lost < 1 for lost in done.lost.values())
    exact = export_lora(model, tmp_path / "exact", max_rank=6)
    assert not any(exact.lost.values()) and exact.proof.max_relative_error < 1e-6


@pytest.mark.parametrize("pad_to", [8, 16])
def test_padding_reaches_the_ranks_that_servers_take(pad_to: int, tmp_path: Path) -> None:
    tiny = MODELS["llama"]
    model = get_peft_model(tiny.fresh(), config_for(tiny, "spectral_a"))
    train(model)
    done = export_lora(model, tmp_path / "lora", pad_to=pad_to)
    assert set(done.ranks.values()) == {pad_to} and done.vllm_max_lora_rank == pad_to
    lora: Any = PeftModel.from_pretrained(tiny.fresh(), tmp_path / "lora").eval()
    torch.testing.assert_close(output(lora, tiny.inputs()), output(model.eval(), tiny.inputs()), rtol=0, atol=1e-5)


def test_rank_pattern_survives_the_merge(tmp_path: Path) -> None:
    tiny = MODELS["llama"]
    base = saved_base(tiny, tmp_path / "base")
    config = SpectralConfig(r=2, rank_pattern={"v_proj": 5}, target_modules=["q_proj", "v_proj"])
    model = get_peft_model(tiny.fresh(), config)
    train(model)
    model.save_pretrained(tmp_path / "adapter")
    merge_checkpoint(base, tmp_path / "adapter", tmp_path / "merged")
    merged = reopened(tiny, tmp_path / "merged")
    torch.testing.assert_close(output(merged, tiny.inputs()), output(model.eval(), tiny.inputs()), rtol=0, atol=2e-5)


@pytest.mark.parametrize("base_says", [None, {"eos_token_id": 7, "temperature": 0.5}])
def test_a_merged_model_ends_its_answers_where_training_did(base_says: dict[str, Any] | None, tmp_path: Path) -> None:
    tiny = MODELS["llama"]
    base = saved_base(tiny, tmp_path / "base")
    (base / "generation_config.json").unlink()
    if base_says:
        (base / "generation_config.json").write_text(json.dumps(base_says))
    adapted(tiny, "spectral_a").save_pretrained(tmp_path / "adapter")
    words = tokenizer("gpt-2")
    words.chat_template = "{{ messages[0].content }}"
    words.save_pretrained(tmp_path / "adapter")
    done = merge_checkpoint(base, tmp_path / "adapter", tmp_path / "merged")
    said = json.loads((tmp_path / "merged" / "generation_config.json").read_text())
    assert words.eos_token_id == 2 and "an answer ends at '</s>'" in done.generation
    assert said["eos_token_id"] == ([2, 7] if base_says else 2)
    assert said.get("temperature") == (0.5 if base_says else None)
    assert (tmp_path / "merged" / "chat_template.jinja").read_text() == words.chat_template
    assert reopened(tiny, tmp_path / "merged").generation_config.eos_token_id == said["eos_token_id"]
