"""GGUF files under transformers' names: equal, bit for bit, to what transformers itself loads."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import get_peft_model

from spectune import SpectralConfig, merge_checkpoint
from spectune.checkpoint import open_checkpoint
from spectune.errors import AdapterError, ExportError, MissingExtraError

from ..abilities import needs_gguf
from ..models import MODELS

pytestmark = needs_gguf
gguf = pytest.importorskip("gguf")

NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = MODELS["llama"].fresh()
    config = model.config
    path = tmp_path_factory.mktemp("model") / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    state = model.state_dict()
    writer.add_tensor("token_embd.weight", state["model.embed_tokens.weight"].numpy())
    writer.add_tensor("output_norm.weight", state["model.norm.weight"].numpy())
    writer.add_tensor("output.weight", state["lm_head.weight"].numpy())
    for layer in range(config.num_hidden_layers):
        for theirs, ours in NAMES.items():
            tensor = state[f"model.layers.{layer}.{theirs}.weight"].numpy()
            kind = gguf.GGMLQuantizationType.F16 if ours == "ffn_up" else None
            writer.add_tensor(
                f"blk.{layer}.{ours}.weight", tensor.astype("float16") if kind else tensor, raw_dtype=kind
            )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_every_tensor_is_what_transformers_loads(file: Path) -> None:
    import transformers

    live = transformers.AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name).state_dict()
    for path in (file, file.parent):
        checkpoint = open_checkpoint(path)
        assert set(checkpoint.names) == set(live)
        for name in checkpoint.names:
            assert checkpoint.shapes[name] == tuple(live[name].shape)
            assert torch.equal(checkpoint.tensor(name), live[name]), name


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_what_is_wrong_is_one_line(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(AdapterError, match="Did you mean 'model.norm.weight'"):
        open_checkpoint(file).tensor("model.norms.weight")
    (tmp_path / "cut.gguf").write_bytes(file.read_bytes()[:200])
    (tmp_path / "text.gguf").write_bytes(b"this is no model")
    for name in ("cut.gguf", "text.gguf"):
        with pytest.raises(AdapterError, match="transformers cannot read this GGUF file"):
            open_checkpoint(tmp_path / name)
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(MissingExtraError, match="pip install gguf"):
        open_checkpoint(file)


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_an_adapter_is_not_merged_into_it(file: Path, tmp_path: Path) -> None:
    model = get_peft_model(MODELS["llama"].fresh(), SpectralConfig(target_modules=["q_proj"], r=2))
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ExportError, match="GGUF files can be read but not written"):
        merge_checkpoint(file, tmp_path / "adapter", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
