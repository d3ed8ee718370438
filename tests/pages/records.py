"""One record with every part in it, as a real run would leave it."""

from __future__ import annotations

import math
import random

from spectune.runs import (
    Example,
    LayerSpectrum,
    LayerUpdate,
    Metric,
    Proof,
    RunRecord,
    Size,
    machine,
    versions,
)


def spectrum(name: str, count: int, tuned: int, seed: int) -> LayerSpectrum:
    chance = random.Random(seed)
    before = [12.0 / (1 + 0.3 * i) + 0.01 for i in range(count)]
    after = [v * (1 + chance.uniform(-0.05, 0.08)) if i < tuned else v for i, v in enumerate(before)]
    return LayerSpectrum(name, before, sorted(after, reverse=True))


def full_record() -> RunRecord:
    chance = random.Random(0)
    loss = [2.1 * math.exp(-i / 60) + 0.12 + chance.uniform(-0.15, 0.15) * math.exp(-i / 150) for i in range(300)]
    answers = [("How do I reset my password?", "account"), ("Where is my parcel?", "shipping")]
    examples = [Example(text, right, right) for text, right in answers]
    return RunRecord(
        title="MiniLM, spectral_a r=8, topics of conversation",
        task="text classification",
        method="spectral_a",
        config={"method": "spectral_a", "r": 8, "lr": 0.002, "target_modules": ["query", "value"], "svd": {"seed": 0}},
        versions=versions(),
        machine=machine(device="cpu"),
        seed=3,
        loss=loss,
        metrics=[
            Metric("before training", 0.118, "head untrained, 400 held-out sentences"),
            Metric("frozen body, trained head", 0.702, "same steps, same batches"),
            Metric("LoRA, r=8, same budget", 0.861, "best of 4 learning rates"),
            Metric("spectral_a, r=8", 0.874),
            Metric("held-out loss", 0.4127, "mean over 400 sentences", share=False),
        ],
        sizes=[
            Size("spectral_a, r=8", 73_728, 312_448),
            Size("LoRA, r=16", 147_456, 601_112),
            Size("full", 22_713_216),
        ],
        validation=[(step, 2.0 * math.exp(-step / 60) + 0.3) for step in range(50, 301, 50)],
        updates=[LayerUpdate(f"encoder.layer.{i}.attention.self.query", 0.1 + 0.02 * i, 9.0) for i in range(12)],
        spectra=[spectrum(f"encoder.layer.{i}.attention.self.query", 384, 8, i) for i in (0, 3, 5)],
        proofs=[
            Proof("the base is untouched", True, "all 103 tensors bit for bit as before"),
            Proof("the LoRA export is exact", True, "largest difference of logits 2.4e-7"),
            Proof("the file loads on a bfloat16 base", False, "off by 0.4%, at most 0.1% was asked for"),
        ],
        examples=[*examples, Example("Tell me a joke about parcels", "humor", "shipping")],
    )
