"""`spectune trl`: the scripts of the installed trl train a spectral adapter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftConfig, PeftModel
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from spectune.cli.app import app
from spectune.errors import SpectuneError
from spectune.plugins.trl import run, split

from ..recipes import tiny

pytest.importorskip("trl")
DATA = {
    "sft": [{"text": "w1 w2 good"}, {"text": "w3 w4 bad"}] * 2,
    "dpo": [{"prompt": "w1 w2", "chosen": "good w3", "rejected": "bad"}] * 4,
    "grpo": [{"prompt": "w1 w2", "solution": "good"}] * 4,
}
GRPO = "--reward_funcs tests.plugins.test_trl.reward --num_generations 2 --max_completion_length 3 --beta 0"


def reward(completions: list[Any], **_: Any) -> list[float]:
    return [float(i % 2) for i in range(len(completions))]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("script", list(DATA))
def test_a_script_of_trl_trains_a_spectral_adapter(script: str, tmp_path: Path) -> None:
    base = tiny.llama(tmp_path / "base")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text("\n".join(map(json.dumps, DATA[script])))
    words = ["--model_name_or_path", str(base), "--dataset_name", str(tmp_path / "data"), "--max_steps", "1"]
    words += ["--output_dir", str(tmp_path / "out"), "--use_cpu", "--bf16", "false", "--report_to", "none"]
    words += [
        "--per_device_train_batch_size",
        "2",
        "--learning_rate",
        "1e-2",
        *(GRPO.split() if script == "grpo" else []),
    ]
    adapter = ["--adapter", "svft", "--adapter_pattern=banded", "--adapter_off_diagonals", "1"]
    adapter += ["--adapter_target_modules", "q_proj", "v_proj"]
    done = CliRunner().invoke(app, ["trl", script, *adapter, *words], catch_exceptions=False)
    assert done.exit_code == 0
    config = PeftConfig.from_pretrained(tmp_path / "out")
    assert (config.peft_type, config.method, config.pattern) == ("SPECTUNE", "svft", "banded")
    assert config.target_modules == {"q_proj", "v_proj"} and config.task_type == "CAUSAL_LM"
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "out")
    assert any(bool(p.any()) for name, p in model.named_parameters() if "spectune_adapter" in name)


def test_options_of_the_adapter_are_told_from_those_of_trl() -> None:
    words = [
        "--lr",
        "1e-3",
        "--adapter",
        "spectral_a",
        "--adapter_r=4",
        "--adapter_target_modules",
        "q_proj",
        "v_proj",
        "--bf16",
    ]
    words += ["--adapter_svd", "{tolerance: 1.0e-4}", "--adapter_modules_to_save", "lm_head", "--x", "1"]
    options, rest = split(words)
    assert rest == ["--lr", "1e-3", "--bf16", "--x", "1"]
    given = {"r": 4, "target_modules": ["q_proj", "v_proj"], "svd": {"tolerance": 1e-4}, "modules_to_save": ["lm_head"]}
    assert options == {"": "spectral_a", **given}
    assert split(["--adapter_target_modules", "all-linear"])[0] == {"target_modules": "all-linear"}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["sft"], "--adapter is missing. Choose from: spectral_a"),
        (["stf", "--adapter", "svft"], "trl has no such training script. Did you mean 'sft'"),
        (["sft", "--adapter", "spectral_b"], "peft_type 'SPECTRAL_B' does not exist"),
        (["sft", "--adapter", "spectral_a", "--adapter_rr", "8"], "unexpected keyword argument 'rr'"),
        (["sft", "--adapter", "spectral_a", "--lora_r", "8"], "--lora_r has no effect with --adapter"),
        (["sft", "--adapter", "spectral_a", "--adapter_svd", "{a"], "--adapter_svd {a: cannot be read as a value"),
    ],
)
def test_a_wrong_request_is_refused_before_trl_loads_anything(words: list[str], said: str) -> None:
    with pytest.raises(SpectuneError) as refusal:
        run(words[0], words[1:])
    assert said in str(refusal.value)


def test_trl_s_own_function_is_put_back() -> None:
    import trl

    before = trl.get_peft_config
    with pytest.raises(ValueError, match="dataset"):
        run("sft", ["--adapter", "spectral_a", "--use_cpu", "--bf16=false", "--output_dir=x", "--model_name_or_path=x"])
    assert trl.get_peft_config is before and torch.is_grad_enabled()
