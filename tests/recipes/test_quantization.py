"""Text runs on a quantised base: train, resume, evaluate, export, merge."""

from __future__ import annotations

import os
import signal
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from spectune import export_lora, merge_checkpoint
from spectune.errors import OptionError
from spectune.recipes import parse_config
from spectune.recipes.pretrained import pretrained
from spectune.recipes.table import recipe_class
from spectune.runs import run
from spectune.runs.building import build
from spectune.training.checkpoints import Interrupted

from . import tiny


def run_of(folder: Path, quantization: str, **more: Any) -> dict[str, Any]:
    return tiny.lm_run(folder) | {"quantization": quantization} | more


@pytest.mark.parametrize("quantization", ["nf4", "int8", "fp8"])
def test_a_run_trains_on_a_quantised_base_and_delivers_full_precision(tmp_path: Path, quantization: str) -> None:
    pytest.importorskip("torchao" if quantization == "fp8" else "bitsandbytes")
    config = parse_config(run_of(tmp_path, quantization))
    whole = run(config, tmp_path / "whole")
    assert whole.losses[-1] < whole.losses[0]
    export_lora(tmp_path / "whole" / "adapter", tmp_path / "lora")
    merged = merge_checkpoint(None, tmp_path / "whole" / "adapter", tmp_path / "merged").path
    x = torch.tensor([[2, 5, 9, 11]])
    lora = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(config.model), str(tmp_path / "lora"))
    from_merged = AutoModelForCausalLM.from_pretrained(merged)(x).logits
    torch.testing.assert_close(from_merged, lora(x).logits, rtol=0, atol=1e-4)


def test_resumed_runs_on_nf4_end_as_unbroken_ones(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    training = {"steps": 4, "batch_size": 2, "save_every": 2, "validate_every": 1, "learning_rate": 1e-2}
    values = run_of(tmp_path, "nf4", training=training)
    values["data"]["validation"] = values["data"]["test"]
    config = parse_config(values)
    whole = run(config, tmp_path / "whole")

    def stop(done: int, steps: int, loss: float) -> None:
        if done == 2:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Interrupted):
        run(config, tmp_path / "other", on_step=stop)
    assert run(config, tmp_path / "other", resume=True).metrics == whole.metrics
    files = [tmp_path / name / "adapter" / "adapter_model.safetensors" for name in ("whole", "other")]
    assert files[0].read_bytes() == files[1].read_bytes()
    trained = load_file(files[0])
    assert {tensor.dtype for tensor in trained.values()} == {torch.float32}


def test_without_an_adapter_there_is_nothing_to_train(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="quantization: nf4 needs an adapter"):
        parse_config(run_of(tmp_path, "nf4", adapter="none"))


def test_int4_needs_an_accelerator(tmp_path: Path) -> None:
    pytest.importorskip("torchao")
    if torch.accelerator.is_available():
        pytest.skip("there is an accelerator")
    with pytest.raises(OptionError, match="int4 needs an accelerator"):
        pretrained(AutoModelForCausalLM, parse_config(run_of(tmp_path, "int4")), None)


def test_a_checkpoint_that_is_quantised_is_not_quantised_again(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    config = parse_config(run_of(tmp_path, "nf4"))
    pretrained(AutoModelForCausalLM, config, None).save_pretrained(tmp_path / "stored")
    again = config.model_copy(update={"model": str(tmp_path / "stored")})
    with pytest.raises(OptionError, match="is stored quantised already"):
        pretrained(AutoModelForCausalLM, again, None)


def test_a_checkpoint_that_is_stored_quantised_trains_as_it_is(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    config = parse_config(run_of(tmp_path, "nf4"))
    stored = pretrained(AutoModelForCausalLM, config, None)
    stored.save_pretrained(tmp_path / "stored")
    tiny.tokenizer().save_pretrained(tmp_path / "stored")
    plain = config.model_copy(update={"model": str(tmp_path / "stored"), "quantization": "none"})
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        result = run(plain, tmp_path / "run")
    assert result.losses[-1] < result.losses[0]
    assert any("not at hand in full precision" in str(warning.message) for warning in said)


@pytest.mark.parametrize("adapter", ["LORA", "svft"])
@pytest.mark.parametrize("quantization", ["nf4", "int8", "fp8"])
def test_a_classifier_with_a_fitted_head_trains_on_a_quantised_base(
    tmp_path: Path, adapter: str, quantization: str
) -> None:
    """Fitting the head is an inference, after which bitsandbytes would give wrong gradients on a CPU."""
    pytest.importorskip("torchao" if quantization == "fp8" else "bitsandbytes")
    core = {"method": "svft", "pattern": "dense", "basis_rank": 4, "directions": "gradient"}
    options = core if adapter == "svft" else {"peft_type": "LORA", "r": 2}
    # A fitted head answers with certainty, so a loss of dropped features is arbitrarily large.
    values = tiny.text_run(tmp_path, dropout=0.0, training={"head_first": True}) | {"quantization": quantization}
    config = parse_config(values | {"adapter": options | {"target_modules": ["query", "value"]}})
    model, _ = build(recipe_class(config.recipe)(config))
    assert not any(getattr(m.weight.quant_state, "packing_format_for_cpu", False) for m in model.modules() if is_nf4(m))
    assert type(model.get_base_model().classifier.original_module) is torch.nn.Linear  # new, and not quantised
    result = run(config, tmp_path / "run")
    assert max(result.losses) < 0.6  # 0.69 is guessing; 0.39 when this was written


def is_nf4(module: Any) -> bool:
    return getattr(getattr(module, "weight", None), "quant_state", None) is not None
