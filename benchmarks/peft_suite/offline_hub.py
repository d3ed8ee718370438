"""The models that PEFT's tests load by name, made from configs with random weights, as the hub's cache would hold them.

Their names are the ones on the hub, so that everything in PEFT and in its tests finds them by its own ways.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import peft
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

REVISION = "0" * 40
WORDS = 1024
SMALL: dict[str, Any] = {
    "vocab_size": WORDS, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 512, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
GPT: dict[str, Any] = {
    "vocab_size": WORDS, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512, "bos_token_id": 1,
    "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
SEQUENCES: dict[str, Any] = {"pad_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 0, "vocab_size": WORDS}


def opt(layers: int = 2, width: int = 32) -> Any:
    sizes = {**SMALL, "num_hidden_layers": layers, "hidden_size": width, "ffn_dim": 64, "word_embed_proj_dim": width}
    return transformers.OPTForCausalLM(transformers.OPTConfig(**sizes))


def llama_like(name: str, kind: str = "ForCausalLM", **more: Any) -> Any:
    config = getattr(transformers, f"{name}Config")(**SMALL, num_key_value_heads=2, head_dim=8, **more)
    return getattr(transformers, name.removesuffix("Text") + kind)(config)


def encoder(name: str, kind: str, **more: Any) -> Any:
    config = getattr(transformers, f"{name}Config")(**SMALL, type_vocab_size=2, num_labels=2, **more)
    return getattr(transformers, name + kind)(config)


def t5() -> Any:
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, **SEQUENCES}
    return transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes))


def bart() -> Any:
    sides = {f"{side}_{what}": n for side in ("encoder", "decoder") for what, n in BART_SIDE.items()}
    return transformers.BartForConditionalGeneration(
        # Larger weights than Bart's .02, so that an update in proportion to them changes what is generated.
        transformers.BartConfig(
            d_model=32, max_position_embeddings=512, bos_token_id=1, init_std=0.2, **sides, **SEQUENCES
        )
    )


def resnet() -> Any:
    sizes = {"embedding_size": 10, "hidden_sizes": [10, 20, 30, 40], "depths": [1, 1, 2, 1], "num_labels": 3}
    return transformers.ResNetForImageClassification(transformers.ResNetConfig(**sizes))


def stable_diffusion(folder: Path) -> None:
    """Write a pipeline from text to image, all of its parts tiny."""
    ends = {"model_max_length": 77}
    words = ["<|startoftext|>", "<|endoftext|>", *"abcdefghijklmnopqrstuvwxyz"]
    words += [f"{letter}</w>" for letter in words[2:]]
    clip = {**SMALL, "vocab_size": len(words), "max_position_embeddings": 77, "bos_token_id": 0, "eos_token_id": 1}
    channels = {"block_out_channels": (32, 64), "layers_per_block": 1, "norm_num_groups": 4}
    blocks = ("DownBlock2D", "CrossAttnDownBlock2D"), ("CrossAttnUpBlock2D", "UpBlock2D")
    pixels = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    diffusers.StableDiffusionPipeline(
        vae=diffusers.AutoencoderKL(**channels, **pixels, latent_channels=4),
        text_encoder=transformers.CLIPTextModel(transformers.CLIPTextConfig(**clip)),
        tokenizer=transformers.CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[], **ends),
        unet=diffusers.UNet2DConditionModel(
            **channels, sample_size=8, cross_attention_dim=32, attention_head_dim=8, down_block_types=blocks[0],
            up_block_types=blocks[1],
        ),
        scheduler=diffusers.DDIMScheduler(clip_sample=False, set_alpha_to_one=False),
        safety_checker=None,
        feature_extractor=None,
    ).save_pretrained(folder)  # fmt: skip


BART_SIDE = {"layers": 2, "attention_heads": 4, "ffn_dim": 64}
BUILD: dict[str, Callable[[], Any]] = {
    "peft-internal-testing/tiny-random-OPTForCausalLM": opt,
    # The tests of quantisation count its layers; bitsandbytes multiplies no rows on a CPU that are narrower than 64.
    "peft-internal-testing/opt-125m": lambda: opt(12, 64),
    "peft-internal-testing/tiny-random-GPT2LMHeadModel": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(**GPT)
    ),
    "hf-internal-testing/tiny-random-gpt2": lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config(**GPT)),
    "gpt2": lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config(**GPT)),
    "peft-internal-testing/tiny-random-GPTJForCausalLM": lambda: transformers.GPTJForCausalLM(
        transformers.GPTJConfig(**GPT, rotary_dim=4)
    ),
    "trl-internal-testing/tiny-random-LlamaForCausalLM": lambda: llama_like("Llama"),
    "peft-internal-testing/tiny-random-LlamaForCausalLM": lambda: llama_like("Llama"),
    "peft-internal-testing/tiny-dummy-qwen2": lambda: llama_like("Qwen2"),
    "hf-internal-testing/tiny-random-MistralForCausalLM": lambda: llama_like("Mistral"),
    "hf-internal-testing/tiny-random-Gemma3ForCausalLM": lambda: llama_like("Gemma3Text"),
    "trl-internal-testing/tiny-LlamaForSequenceClassification-3.2": lambda: llama_like(
        "Llama", "ForSequenceClassification"
    ),
    "peft-internal-testing/tiny-random-T5ForConditionalGeneration-calibrated": t5,
    "peft-internal-testing/tiny-random-BartForConditionalGeneration": bart,
    "peft-internal-testing/tiny-random-ResNetForImageClassification": resnet,
    "peft-internal-testing/tiny-random-BertModel": lambda: encoder("Bert", "Model"),
    "peft-internal-testing/tiny-random-RobertaModel": lambda: encoder("Roberta", "Model"),
    "peft-internal-testing/tiny-random-DebertaModel": lambda: encoder("Deberta", "Model", **RELATIVE),
    "peft-internal-testing/tiny-random-DebertaV2Model": lambda: encoder("DebertaV2", "Model", **RELATIVE),
    "peft-internal-testing/tiny-random-BertForSequenceClassification": lambda: encoder(
        "Bert", "ForSequenceClassification"
    ),
    "peft-internal-testing/tiny-random-RobertaForSequenceClassification": lambda: encoder(
        "Roberta", "ForSequenceClassification"
    ),
}
RELATIVE: dict[str, Any] = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]}


def tokenizer() -> Any:
    """Get a tokenizer of bytes."""
    letters = {letter: 3 + i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    plain = Tokenizer(models.BPE({"<pad>": 0, "<s>": 1, "</s>": 2, **letters}, []))
    plain.pre_tokenizer, plain.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<pad>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=plain, **special)


PIPELINE = "hf-internal-testing/tiny-sd-pipe"


def fill(cache: Path) -> None:
    """Write every model into a hub's cache, unless it is there."""
    for name, build in BUILD.items():
        with _fresh(cache, name) as folder:
            if folder is not None:
                build().save_pretrained(folder)
                tokenizer().save_pretrained(folder)
                if build is resnet:
                    transformers.ConvNextImageProcessor(size={"shortest_edge": 96}).save_pretrained(folder)
    with _fresh(cache, PIPELINE) as folder:
        if folder is not None:
            stable_diffusion(folder)
    with _fresh(cache, "peft-internal-testing/tiny-opt-lora-revision", "test") as folder:
        if folder is not None:  # the tests of configs read a LoRA's, and nothing else of it
            peft.LoraConfig(base_model_name_or_path="peft-internal-testing/opt-125m").save_pretrained(str(folder))


@contextmanager
def _fresh(cache: Path, name: str, revision: str = "main") -> Iterator[Path | None]:
    """Get the folder of a model that is to be written, in a snapshot under this revision; None where it is there."""
    home = cache / f"models--{name.replace('/', '--')}"
    if (home / "refs" / revision).exists():
        yield None
        return
    torch.manual_seed(0)
    (folder := home / "snapshots" / REVISION).mkdir(parents=True, exist_ok=True)
    yield folder
    (home / "refs").mkdir(parents=True, exist_ok=True)
    (home / "refs" / revision).write_text(REVISION)
