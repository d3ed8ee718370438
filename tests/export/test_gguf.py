"""GGUF files for llama.cpp, read back with the package gguf, with another writer, and with transformers' own tables."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from peft import get_peft_model
from typer.testing import CliRunner

from spectune import SpectralConfig, export_gguf
from spectune.cli.app import app
from spectune.errors import ExportError, MissingExtraError, SpectuneError

from ..abilities import needs_gguf
from ..gguf_model import write_gguf
from ..models import INIT, MODELS, ids
from .words import tokenizer

gguf = pytest.importorskip("gguf")
pytestmark = [needs_gguf, pytest.mark.filterwarnings("ignore::ResourceWarning")]
SIZES: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64,
    "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": INIT,
    "max_position_embeddings": 64,
}  # fmt: skip
LLAMA3 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3["original_max_position_embeddings"] = 16
CONFIGS: dict[str, Any] = {
    "llama-tied": lambda: tf.LlamaConfig(**SIZES, tie_word_embeddings=True),
    "llama-3.1": lambda: tf.LlamaConfig(**SIZES, rope_parameters=LLAMA3),
    "qwen2": lambda: tf.Qwen2Config(**SIZES),
    "gemma2": lambda: tf.Gemma2Config(**SIZES, head_dim=8, query_pre_attn_scalar=8, sliding_window=4),
    "gpt2": lambda: tf.GPT2Config(
        n_embd=32, n_layer=2, n_head=4, vocab_size=64, n_positions=64, initializer_range=INIT
    ),
}
LINEAR = ["q_proj", "k_proj", "o_proj", "down_proj"]


def saved(model: Any, folder: Path, **options: Any) -> Any:
    """Save a base and an adapter of random numbers on it; get the live model."""
    model.save_pretrained(folder / "base")
    given = {"r": 2, "rank_pattern": {"q_proj": 5}, "target_modules": LINEAR, "init_weights": False, **options}
    live: Any = get_peft_model(model, SpectralConfig(task_type="CAUSAL_LM", **given)).eval()
    live.peft_config["default"].base_model_name_or_path = str(folder / "base")
    live.save_pretrained(folder / "adapter")
    return live


def fresh(name: str) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return tf.AutoModelForCausalLM.from_config(CONFIGS[name]()).eval()


def tensors(file: Path) -> dict[str, torch.Tensor]:
    found = {part.name: gguf.dequantize(part.data, part.tensor_type) for part in gguf.GGUFReader(file).tensors}
    return {name: torch.from_numpy(part.copy()).double() for name, part in found.items()}


def said(file: Path, key: str) -> Any:
    return gguf.GGUFReader(file).get_field(key).contents()


def changed(base: Path, lora: Path) -> dict[str, torch.Tensor]:
    """Get the weights of a base with a LoRA as llama.cpp computes them: W + (alpha / the tensor's rank) b a."""
    weights, parts, alpha = tensors(base), tensors(lora), said(lora, "adapter.lora.alpha")
    for name in {name.removesuffix(".lora_a") for name in parts if name.endswith(".lora_a")}:
        a, b = parts[f"{name}.lora_a"], parts[f"{name}.lora_b"]
        weights[name] = weights[name] + (alpha / len(a)) * (b @ a)
    return weights


@pytest.mark.parametrize("pad", [True, False])
def test_a_lora_changes_the_weights_of_a_llama_as_merging_does(pad: bool, tmp_path: Path) -> None:
    live = saved(MODELS["llama"].fresh(), tmp_path)
    base = write_gguf(live.unload(), tmp_path / "base.gguf")
    live = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    live.load_adapter(str(tmp_path / "adapter"))
    done = export_gguf(tmp_path / "adapter", tmp_path / "out", pad=pad)
    assert (said(done.path, "general.type"), said(done.path, "adapter.type")) == ("adapter", "lora")
    ranks = {len(part) for name, part in tensors(done.path).items() if name.endswith("lora_a")}
    assert ranks == ({10} if pad else {4, 10}) and done.lora is not None and done.lora.max_rank == 10
    got = changed(base, done.path)
    wanted = tensors(write_gguf(merged(live), tmp_path / "merged.gguf"))
    x = torch.randn(3, 32, dtype=torch.float64)
    moved = 0
    for name, weight in wanted.items():
        if name.endswith(("attn_q.weight", "attn_k.weight", "attn_output.weight")):
            torch.testing.assert_close(x @ got[name].T, x @ weight.T, rtol=0, atol=2e-5)
            moved += float((weight - tensors(base)[name]).abs().max()) > 1e-2
    assert moved == 6


def merged(live: Any) -> Any:
    """Get a plain model of a live one's weights with the update, without Spectune's own merging of files."""
    from spectune.adapter import spectral_modules
    from spectune.algebra import dense

    plain = MODELS["llama"].fresh()
    with torch.no_grad():
        for path, _, module in spectral_modules(live):
            plain.get_submodule(path).weight.add_(dense(module.delta()))
    return plain


@pytest.mark.parametrize("name", ["qwen2", "gpt2"])
def test_rows_stay_where_llama_cpp_rotates_as_transformers_does(name: str, tmp_path: Path) -> None:
    targets = {"target_modules": ["c_attn", "c_fc"], "rank_pattern": {}} if name == "gpt2" else {}
    saved(fresh(name), tmp_path, **targets)
    lora = export_gguf(tmp_path / "adapter", tmp_path / "lora").path
    whole = export_gguf(tmp_path / "adapter", tmp_path / "merged", merged=True)
    plain = export_gguf(tmp_path / "zero", tmp_path / "plain", merged=True) if zero(tmp_path, name) else whole
    got, wanted = changed(plain.path, lora), tensors(whole.path)
    assert said(lora, "general.architecture") == name == whole.architecture
    for tensor in wanted:
        torch.testing.assert_close(got[tensor], wanted[tensor], rtol=0, atol=2e-5)


def zero(folder: Path, name: str) -> bool:
    """Save an adapter beside that changes nothing."""
    leaf = "c_attn" if name == "gpt2" else "q_proj"
    live: Any = get_peft_model(fresh(name), SpectralConfig(r=1, target_modules=[leaf], task_type="CAUSAL_LM"))
    live.peft_config["default"].base_model_name_or_path = str(folder / "base")
    live.save_pretrained(folder / "zero")
    return True


@pytest.mark.parametrize("name", list(CONFIGS))
def test_a_merged_file_computes_what_the_adapter_computes(name: str, tmp_path: Path) -> None:
    targets = ["c_attn", "c_fc", "c_proj"] if name == "gpt2" else LINEAR
    live = saved(fresh(name), tmp_path, target_modules=targets, rank_pattern={})
    done = export_gguf(tmp_path / "adapter", tmp_path / "out", merged=True)
    assert done.merged is not None and done.dtype == "F32" and "no tokenizer" in done.notes[-1]
    names = set(tensors(done.path))
    assert ("output.weight" in names) != live.config.tie_word_embeddings
    assert ("rope_freqs.weight" in names) == (name == "llama-3.1")
    if name == "llama-3.1":  # transformers reads no rope_freqs; its own class has them as inv_freq
        slowed = live.base_model.model.model.rotary_emb.inv_freq.double()
        plain = 1e4 ** -(torch.arange(0, 8, 2, dtype=torch.float64) / 8)
        torch.testing.assert_close(plain / tensors(done.path)["rope_freqs.weight"], slowed, rtol=1e-6, atol=0)
        return
    again = tf.AutoModelForCausalLM.from_pretrained(
        done.path.parent, gguf_file=done.path.name, config=CONFIGS[name]()
    ).eval()
    with torch.no_grad():
        torch.testing.assert_close(again(ids()).logits, live(ids()).logits, rtol=0, atol=1e-4)


def test_half_precision_rounds_matrices_once_and_leaves_vectors(tmp_path: Path) -> None:
    saved(MODELS["llama"].fresh(), tmp_path)
    exact = tensors(export_gguf(tmp_path / "adapter", tmp_path / "exact", merged=True).path)
    done = export_gguf(tmp_path / "adapter", tmp_path / "half", merged=True, dtype=torch.bfloat16)
    assert done.merged is not None and 0 < done.merged.worst_rounding < 0.1
    for name, part in tensors(done.path).items():
        assert torch.equal(part, exact[name].to(torch.bfloat16).double() if part.ndim > 1 else exact[name])


@pytest.mark.parametrize("kind", ["llama", "gpt-2"])
def test_the_tokenizer_goes_along(kind: str, tmp_path: Path) -> None:
    words = tokenizer(kind)
    model = tf.LlamaForCausalLM(tf.LlamaConfig(**{**SIZES, "vocab_size": 352}))
    saved(model, tmp_path)
    words.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    words.save_pretrained(tmp_path / "adapter")
    done = export_gguf(tmp_path / "adapter", tmp_path / "out", merged=True)
    file = done.path
    assert done.notes == ()
    tokens = said(file, "tokenizer.ggml.tokens")
    known = words.get_vocab()
    assert len(tokens) == 352 and tokens[351] == "[PAD351]"
    assert all(tokens[place] == word for word, place in known.items())
    assert said(file, "tokenizer.ggml.model") == ("llama" if kind == "llama" else "gpt2")
    assert said(file, "tokenizer.ggml.pre") == ("default" if kind == "llama" else "gpt-2")
    assert (said(file, "tokenizer.ggml.bos_token_id"), said(file, "tokenizer.ggml.add_bos_token")) == (1, False)
    assert said(file, "tokenizer.chat_template") == words.chat_template
    kinds = said(file, "tokenizer.ggml.token_type")
    assert kinds[1] == gguf.TokenType.CONTROL and kinds[351] == gguf.TokenType.UNUSED
    if kind == "llama":  # a pair that is merged earlier scores higher
        scores = said(file, "tokenizer.ggml.scores")
        first, last = (json.loads(words.backend_tokenizer.to_str())["model"]["merges"][i] for i in (0, -1))
        assert scores[known["".join(first)]] > scores[known["".join(last)]] > -1e6
    else:
        assert said(file, "tokenizer.ggml.merges")[0].count(" ") == 1


def test_what_cannot_become_gguf_is_one_line_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(match: str, kind: type[Exception] = ExportError, **options: Any) -> None:
        with pytest.raises(kind, match=match):
            export_gguf(tmp_path / "adapter", tmp_path / "out", **options)
        assert not (tmp_path / "out").exists()

    for spoiler in ("spectune.export.gguf.export_lora", "spectune.export.gguf.merge_checkpoint"):
        monkeypatch.setattr(spoiler, lambda *words, **options: pytest.fail("work was done"))
    saved(fresh("llama-tied"), tmp_path, target_modules=["lm_head"], rank_pattern={})
    refused("lm_head is an embedding or shares its weight with one")
    saved(MODELS["llama"].fresh(), tmp_path, modules_to_save=["embed_tokens"])
    refused("embed_tokens.* was trained in full")
    refused("GGUF matrices are float32, float16 or bfloat16", dtype=torch.float64)
    tf.BertConfig(vocab_size=64).save_pretrained(tmp_path / "base")
    refused("how llama.cpp stores a bert model is not known here. Choose from: gemma")
    (tmp_path / "adapter" / "adapter_config.json").unlink()
    saved(fresh("qwen2"), tmp_path)
    (tmp_path / "base" / "tokenizer.json").write_text('{"model": {"type": "Unigram", "vocab": []}}')
    refused(r"how llama.cpp cuts the text of this tokenizer \(Unigram\) is not known", merged=True)
    odd = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}
    tf.Qwen2Config(**SIZES, rope_parameters=odd).save_pretrained(tmp_path / "base")
    refused("its config has rope_type yarn, which llama.cpp computes otherwise", merged=True)
    tf.Qwen2Config(**{**SIZES, "vocab_size": 2**31}).save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "tokenizer.json").unlink()
    refused("its config says vocab_size=2147483648, but the embedding has 64 rows", merged=True)
    tf.Qwen2Config(**{**SIZES, "num_hidden_layers": 2}).save_pretrained(tmp_path / "base")
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    (tmp_path / "base" / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 10**7}))
    refused("num_hidden_layers=1e\\+07 is more than any model has", SpectuneError)
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    refused(r"pip install 'spectune\[gguf\]'", MissingExtraError)


def test_the_command_writes_both_kinds_and_says_how_they_are_used(tmp_path: Path) -> None:
    saved(MODELS["llama"].fresh(), tmp_path)
    words = ["export", str(tmp_path / "adapter"), "--to", "gguf", "-o", str(tmp_path / "out")]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0 and "llama-cli -m BASE.gguf --lora" in done.stdout, done.output
    assert [path.name for path in (tmp_path / "out").glob("*.gguf")] == ["adapter.gguf"]
    merged = CliRunner().invoke(app, [*words, "--merged", "--dtype", "float16", "--json", "--overwrite"])
    found = json.loads(merged.stdout)
    assert (found["dtype"], found["lora"], len(found["merged"]["tensors"])) == ("F16", None, 8)
    assert [path.name for path in (tmp_path / "out").glob("*.gguf")] == ["model.gguf"]
    for wrong in (["--to", "lora", "--merged"], ["--merged", "--max-rank", "2"], ["--pad-to", "8"]):
        with pytest.raises(SpectuneError, match="Leave"):
            CliRunner().invoke(app, [*words, *wrong, "--overwrite"], catch_exceptions=False)
