"""trl's own DPOTrainer: a trained adapter goes on against a reference that is its copy, so the first loss is ln 2."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from ..models import MODELS
from ..recipes.tiny import tokenizer
from .conftest import adapted
from .test_twins import flipped

LLAMA = MODELS["llama"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_the_first_loss_of_trl_is_ln_2(
    method: str, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    adapted(LLAMA, method).save_pretrained(tmp_path / "adapter")
    monkeypatch.setattr("spectune.tuner.bases.obtain", flipped)  # another solver, with other signs
    model: Any = PeftModel.from_pretrained(LLAMA.fresh().to(dtype), tmp_path / "adapter", is_trainable=True)
    pairs = {"prompt": ["w1 w2", "w3"], "chosen": ["w4 w5", "good"], "rejected": ["w6", "bad w7"]}
    options = trl.DPOConfig(
        str(tmp_path / "out"), max_steps=1, per_device_train_batch_size=2, logging_steps=1, report_to=[],
        use_cpu=True, bf16=False, save_strategy="no", disable_tqdm=True, learning_rate=1e-2,
    )  # fmt: skip
    data = datasets.Dataset.from_dict(pairs)
    trainer = trl.DPOTrainer(model, args=options, train_dataset=data, processing_class=tokenizer())
    assert sorted(model.peft_config) == ["default", "ref"]
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained and all(".default." in name for name in trained)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer.train()
    assert abs(trainer.state.log_history[0]["loss"] - math.log(2)) < 1e-4
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved and moved <= trained
