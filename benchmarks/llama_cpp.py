"""Compare llama.cpp on our GGUF files with transformers: `python benchmarks/llama_cpp.py [words]`.

It needs llama.cpp's Python bindings xllamacpp, which need not be in the environment: PYTHONPATH finds them elsewhere.
Tiny models of every family, all weights and norms random, so that a wrong order of rows would show everywhere.
"""

from __future__ import annotations

import json
import sys
import tempfile
import warnings
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import transformers as tf
import xllamacpp as cpp
from peft import get_peft_model
from provenance import provenance

from spectune import SpectralConfig, export_gguf

OUT = Path(__file__).parent / "results" / "llama_cpp.json"
WORDS, TOKENS = 512, 20
SIZES: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": WORDS, "max_position_embeddings": 256, "initializer_range": 0.2,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
GRANITE = {"attention_multiplier": 0.2, "embedding_multiplier": 3.0, "residual_multiplier": 0.5, "logits_scaling": 2.0}
GEMMA = {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 8}
MODELS: dict[str, Any] = {
    "llama": tf.LlamaConfig(**SIZES),
    "llama, tied, biases": tf.LlamaConfig(**SIZES, tie_word_embeddings=True, attention_bias=True),
    "llama, rope of 3.1": tf.LlamaConfig(**SIZES, rope_parameters={**LLAMA3, "original_max_position_embeddings": 32}),
    "llama, linear rope": tf.LlamaConfig(
        **SIZES, rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
    ),
    "mistral": tf.MistralConfig(**SIZES, sliding_window=None),
    "qwen2": tf.Qwen2Config(**SIZES),
    "qwen3": tf.Qwen3Config(**SIZES, head_dim=32),
    "gemma": tf.GemmaConfig(**SIZES, head_dim=16),
    "gemma2": tf.Gemma2Config(**SIZES, **GEMMA),
    "gemma3_text": tf.Gemma3TextConfig(**{**SIZES, "num_hidden_layers": 7}, **GEMMA),
    "phi3": tf.Phi3Config(**SIZES, sliding_window=None),
    "starcoder2": tf.Starcoder2Config(**SIZES),
    "granite": tf.GraniteConfig(**SIZES, **GRANITE),
    "smollm3": tf.SmolLM3Config(**SIZES),
    "olmo2": tf.Olmo2Config(**SIZES),
    "gpt2": tf.GPT2Config(n_embd=64, n_layer=3, n_head=4, vocab_size=WORDS, n_positions=256, initializer_range=0.2),
}
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TARGETS = {
    "gpt2": ["c_attn", "c_fc", "c_proj"],
    "phi3": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"],
    "starcoder2": ["q_proj", "k_proj", "v_proj", "o_proj", "c_fc", "c_proj"],
}


def server(model: Path, lora: Path | None = None) -> Any:
    """Start llama.cpp on a file, in float32 on one thread."""
    options = cpp.CommonParams()
    options.model.path, options.n_ctx, options.n_parallel = str(model), 256, 1
    options.cpuparams.n_threads = options.cpuparams_batch.n_threads = 1
    options.warmup, options.fit_params, options.verbosity = False, False, 0
    options.cache_type_k = options.cache_type_v = cpp.ggml_type.GGML_TYPE_F32
    options.flash_attn_type = cpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    if lora is not None:
        options.lora_adapters = [cpp.CommonAdapterLoraInfo(str(lora), 1.0)]
    return cpp.Server(options)


def of_llama_cpp(running: Any, ids: list[int]) -> torch.Tensor | None:
    """Get the log-probabilities of every next token; None where the end is the likeliest, which has none."""
    asked = {"prompt": ids, "n_predict": 1, "n_probs": WORDS, "temperature": 0, "cache_prompt": False, "samplers": []}
    answer = running.handle_completions(asked)
    said = (answer if isinstance(answer, dict) else json.loads(answer))["choices"][0]["logprobs"]
    if not said:
        return None
    found = torch.zeros(WORDS, dtype=torch.float64)
    for token in said["content"][0]["top_logprobs"]:
        found[token["id"]] = token["logprob"]
    return found


def difference(live: Any, running: Any) -> float:
    """Get the largest difference of a log-probability over four prompts."""
    worst, compared = 0.0, 0
    for seed in range(40):
        ids = torch.randint(3, WORDS, (1, TOKENS), generator=torch.Generator().manual_seed(seed))
        found = of_llama_cpp(running, ids[0].tolist())
        if found is None or compared == 4:
            continue
        with torch.no_grad():
            wanted = torch.log_softmax(live(ids).logits[0, -1].double(), -1)
        worst, compared = max(worst, float((found - wanted).abs().max())), compared + 1
    return worst if compared == 4 else float("nan")


def words(folder: Path) -> None:
    """Give a model the smallest tokenizer that llama.cpp loads: one letter of bytes a token."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    known = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁"]
    model = models.BPE({word: i for i, word in enumerate(known)}, [], byte_fallback=True, unk_token="<unk>")
    made = Tokenizer(model)
    made.normalizer = normalizers.Replace(" ", "▁")
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    made.add_special_tokens(known[:3])
    tf.PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>").save_pretrained(folder)


def measured(name: str, config: Any, folder: Path) -> dict[str, Any]:
    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    base = folder / "base"
    model.save_pretrained(base)
    words(base)
    targets = TARGETS.get(config.model_type, PROJECTIONS)
    files: dict[str, Path] = {}
    nothing = get_peft_model(model, SpectralConfig(r=1, target_modules=targets, task_type="CAUSAL_LM"))
    nothing.save_pretrained(folder / "nothing")
    files["base"] = export_gguf(folder / "nothing", folder / "plain", base_model=base, merged=True).path
    row = {"model": name, "base": difference(nothing, server(files["base"]))}
    options = {"r": 3, "target_modules": targets, "init_weights": False, "task_type": "CAUSAL_LM"}
    live = get_peft_model(nothing.unload(), SpectralConfig(rank_pattern={targets[0]: 5}, **options)).eval()
    live.save_pretrained(folder / "adapter")
    for kind, given in (("lora", {}), ("lora, mixed ranks", {"pad": False}), ("merged", {"merged": True})):
        file = export_gguf(folder / "adapter", folder / kind, base_model=base, **given).path
        row[kind] = difference(live, server(file) if kind == "merged" else server(files["base"], file))
    row["without the adapter"] = difference(live, server(files["base"]))
    return row


def byte_level(kind: str, texts: list[str]) -> Any:
    """Get a tokenizer that cuts texts as this family does, trained on texts."""
    from tokenizers import Regex, Tokenizer, decoders, models, trainers
    from tokenizers import pre_tokenizers as cut

    from spectune.export.gguf_words import _cuts

    whole = cut.ByteLevel(add_prefix_space=False)
    plain = cut.ByteLevel(add_prefix_space=False, use_regex=False)
    if kind == "llama":
        known = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
        made = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
        made.pre_tokenizer = cut.Metaspace(prepend_scheme="always")
        made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
        trainer = trainers.BpeTrainer(vocab_size=1500, special_tokens=known, limit_alphabet=90, show_progress=False)
        made.train_from_iterator(texts, trainer)
        return tf.PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    found = {name: expression for expression, name in _cuts().items()}
    cuts = {"gpt-2": whole, "smollm": cut.Sequence([cut.Digits(individual_digits=True), whole])}
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = cuts.get(kind) or cut.Sequence([cut.Split(Regex(found[kind]), "isolated"), plain])
    made.decoder = decoders.ByteLevel()
    letters = cut.ByteLevel.alphabet()
    special = ["<|endoftext|>"]
    made.train_from_iterator(
        texts,
        trainers.BpeTrainer(vocab_size=1500, special_tokens=special, initial_alphabet=letters, show_progress=False),
    )
    return tf.PreTrainedTokenizerFast(tokenizer_object=made, bos_token=special[0], eos_token=special[0])


def words_row(kind: str) -> dict[str, Any]:
    """Count the paragraphs of our pages that llama.cpp cuts into other tokens; the tokenizer saw half of the pages."""
    from urllib.request import Request, urlopen

    pages = sorted((Path(__file__).parents[1] / "docs").glob("*.md"))
    texts = [page.read_text(encoding="utf-8") for page in pages]
    odd = ["don't WE'LL I'm  you've\n\n\n  x\t\ty 12345 6.78", "é ü 漢字 🙂 <|endoftext|> a", " "]
    tried = [part for text in texts[1::2] for part in text.split("\n\n")] + odd
    tokenizer = byte_level(kind, texts[::2])
    with tempfile.TemporaryDirectory() as place:
        config = tf.LlamaConfig(**{**SIZES, "vocab_size": 1536})
        model = get_peft_model(tf.LlamaForCausalLM(config), SpectralConfig(r=1, target_modules=["q_proj"]))
        model.peft_config["default"].task_type = "CAUSAL_LM"
        model.save_pretrained(Path(place, "adapter"))
        model.unload().save_pretrained(Path(place, "base"))
        tokenizer.save_pretrained(Path(place, "base"))
        file = export_gguf(Path(place, "adapter"), Path(place, "out"), base_model=Path(place, "base"), merged=True).path
        running = server(file)
        differ = 0
        for text in tried:
            asked = json.dumps({"content": text, "add_special": True, "parse_special": True}).encode()
            request = Request(f"{running.listening_address}/tokenize", asked, {"Content-Type": "application/json"})
            differ += json.loads(urlopen(request).read())["tokens"] != tokenizer(text)["input_ids"]
    return {"kind": kind, "texts": len(tried), "differ": differ}


def main() -> None:
    warnings.filterwarnings("ignore")
    cut = [words_row(kind) for kind in ("llama", "gpt-2", "smollm", "qwen2", "llama-bpe")]
    print(cut, flush=True)
    if "words" in sys.argv[1:]:
        OUT.write_text(json.dumps({**json.loads(OUT.read_text()), "words": cut}, indent=1) + "\n")
        return
    rows = []
    for name, config in MODELS.items():
        with tempfile.TemporaryDirectory() as place:
            rows.append(measured(name, config, Path(place)))
            print(rows[-1], flush=True)
    versions = {package: metadata.version(package) for package in ("xllamacpp", "gguf", "transformers")}
    OUT.write_text(json.dumps({**provenance(), "versions": versions, "rows": rows, "words": cut}, indent=1) + "\n")


if __name__ == "__main__":
    main()
