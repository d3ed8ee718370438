"""Layers that share one weight: what an adapter does to one of them is merged into that one alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from peft import get_peft_model

from spectune import SpectralConfig, merge_checkpoint
from spectune.checkpoint import open_checkpoint
from spectune.errors import ExportError

from ..models import MODELS, Tiny, llama, output
from ..tuner.conftest import train


def tied_llama() -> torch.nn.Module:
    config: Any = llama().config
    config.tie_word_embeddings = True
    return tf.LlamaForCausalLM(config)


TIED = {"llama": Tiny(tied_llama, (), MODELS["llama"].inputs), "gpt2": MODELS["gpt2"]}
EMBEDDING = {"llama": "embed_tokens", "gpt2": "wte"}


def merged(tiny: Tiny, folder: Path, base: Path, **options: Any) -> tuple[torch.Tensor, Any]:
    """Get the logits of the live adapter, and what merging it into the saved base gave."""
    model = get_peft_model(tiny.fresh(), SpectralConfig(r=3, **options))
    train(model)
    live = output(model.eval(), tiny.inputs())
    assert (live - output(tiny.fresh(), tiny.inputs())).abs().max() > 0.05
    model.save_pretrained(folder / "adapter")
    return live, merge_checkpoint(base, folder / "adapter", folder / "merged")


def assert_computes(folder: Path, tiny: Tiny, live: torch.Tensor) -> None:
    loaded = type(tiny.fresh()).from_pretrained(folder).eval()
    torch.testing.assert_close(output(loaded, tiny.inputs()), live, rtol=0, atol=2e-5)


@pytest.mark.parametrize("shard", ["5GB", "20KB"])
@pytest.mark.parametrize("what", ["embedding", "head", "both", "whole embedding", "whole head"])
@pytest.mark.parametrize("name", list(TIED))
@pytest.mark.filterwarnings("ignore:Model with `tie_word_embeddings=True`")
def test_one_of_two_tied_layers_is_merged_alone(name: str, what: str, shard: str, tmp_path: Path) -> None:
    tiny, embedding = TIED[name], EMBEDDING[name]
    targets = {"embedding": [embedding], "head": ["lm_head"], "both": [embedding, "lm_head"]}
    options: dict[str, Any] = {"target_modules": targets.get(what, list(MODELS[name].targets))}
    if what.startswith("whole"):
        options["modules_to_save"] = ["lm_head" if what == "whole head" else embedding]
    tiny.fresh().save_pretrained(tmp_path / "base", max_shard_size=shard)
    assert "lm_head.weight" not in open_checkpoint(tmp_path / "base").names
    live, done = merged(tiny, tmp_path, tmp_path / "base", **options)
    assert_computes(tmp_path / "merged", tiny, live)
    assert len(done.untied) == 2 and "lm_head" in done.untied
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["tie_word_embeddings"] is False
    assert json.loads((tmp_path / "base" / "config.json").read_text())["tie_word_embeddings"] is True


def test_other_layers_of_a_tied_model_leave_the_tie(tmp_path: Path) -> None:
    tiny = TIED["gpt2"]
    tiny.fresh().save_pretrained(tmp_path / "base")
    live, done = merged(tiny, tmp_path, tmp_path / "base", target_modules=["c_attn"])
    assert_computes(tmp_path / "merged", tiny, live)
    assert done.untied == () and "lm_head.weight" not in open_checkpoint(tmp_path / "merged").names


def test_a_body_that_was_saved_alone_gets_the_head_beside_it(tmp_path: Path) -> None:
    """Files of GPT-2's body name no `transformer.`; the config says which class is meant."""
    tiny = TIED["gpt2"]
    tiny.fresh().transformer.save_pretrained(tmp_path / "base")
    tiny.fresh().config.save_pretrained(tmp_path / "base")
    config = json.loads((tmp_path / "base" / "config.json").read_text()) | {"architectures": ["GPT2LMHeadModel"]}
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    live, _ = merged(tiny, tmp_path, tmp_path / "base", target_modules=["wte"])
    assert_computes(tmp_path / "merged", tiny, live)


def test_a_class_that_uses_the_option_for_more_is_refused(tmp_path: Path) -> None:
    """T5 shares one weight among four layers and scales its logits where it is tied."""
    tiny = MODELS["t5"]
    tiny.fresh().save_pretrained(tmp_path / "base")
    with pytest.raises(ExportError, match=r"shared share one weight, but the adapter changes only lm_head"):
        merged(tiny, tmp_path, tmp_path / "base", target_modules=["lm_head"])
    assert not (tmp_path / "merged").exists()
