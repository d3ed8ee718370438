"""One record with every part in it, as a real run would leave it."""

from __future__ import annotations

import math
import random
from typing import Any

from spectune.runs import (
    Check,
    Confusion,
    Example,
    LayerMove,
    LayerSpectrum,
    Metric,
    RunResult,
    Sample,
    Size,
    machine,
    versions,
)


def spectrum(name: str, count: int, tuned: int, seed: int) -> LayerSpectrum:
    chance = random.Random(seed)
    before = [12.0 / (1 + 0.3 * i) + 0.01 for i in range(count)]
    after = [v * (1 + chance.uniform(-0.05, 0.08)) if i < tuned else v for i, v in enumerate(before)]
    return LayerSpectrum(name=name, before=before, after=sorted(after, reverse=True))


def full_record(**more: Any) -> RunResult:
    """Every part filled; `more` goes over it."""
    chance = random.Random(0)
    losses = [2.1 * math.exp(-i / 60) + 0.12 + chance.uniform(-0.15, 0.15) * math.exp(-i / 150) for i in range(300)]
    answers = [("How do I reset my password?", "account"), ("Where is my parcel?", "shipping")]
    examples = [Example(text=text, expected=right, predicted=right) for text, right in answers]
    values: dict[str, Any] = dict(
        title="MiniLM, spectral_a r=8, topics of conversation",
        task="text classification",
        method="spectral_a",
        config={"method": "spectral_a", "r": 8, "lr": 0.002, "targets": ["query", "value"], "seed": 3},
        versions=versions(),
        machine=machine(device="cpu"),
        losses=losses,
        learning_rate=0.002,
        trainable=73_728,
        metrics={"test": {"accuracy": 0.874, "loss": 0.4127}},
        compared=[
            Metric(name="before training", value=0.118, note="head untrained, 400 held-out sentences"),
            Metric(name="frozen body, trained head", value=0.702, note="same steps, same batches"),
            Metric(name="LoRA, r=8, same budget", value=0.861, note="best of 4 learning rates"),
        ],
        sizes=[
            Size(name="spectral_a, r=8", trainable=73_728, file_bytes=312_448),
            Size(name="LoRA, r=16", trainable=147_456, file_bytes=601_112),
            Size(name="full", trainable=22_713_216),
        ],
        validation_losses=[(step, 2.0 * math.exp(-step / 60) + 0.3) for step in range(50, 301, 50)],
        looked_at=True,
        updates=[
            LayerMove(name=f"encoder.layer.{i}.attention.self.query", moved=0.1 + 0.02 * i, norm=9.0) for i in range(12)
        ],
        spectra=[spectrum(f"encoder.layer.{i}.attention.self.query", 384, 8, i) for i in (0, 3, 5)],
        checks=[
            Check(name="the base is untouched", ok=True, text="all 103 tensors bit for bit as before"),
            Check(name="the LoRA export is exact", ok=True, text="largest difference of logits 2.4e-7"),
            Check(name="the file loads on a bfloat16 base", ok=False, text="off by 0.4%, at most 0.1% was asked for"),
        ],
        confusion=Confusion(
            split="test",
            labels=["account", "humor", "shipping"],
            counts=[[61, 2, 4], [1, 38, 9], [3, 5, 77]],
        ),
        samples=[
            Sample(
                prompt="Where is my parcel?", expected="It is on its way.", before="I am a model", after="On its way."
            ),
            Sample(prompt="Tell me a joke", before="", after="A parcel walks into a bar."),
        ],
        examples=[*examples, Example(text="Tell me a joke about parcels", expected="humor", predicted="shipping")],
    )
    return RunResult(**(values | more))


def bare_record(**more: Any) -> RunResult:
    """Only what a result must have."""
    values: dict[str, Any] = {"title": "t", "task": "t", "method": "svft", "config": {}, "losses": []}
    return RunResult(**(values | {"learning_rate": 1e-3, "trainable": 0} | more))
