"""Write the golden folders that are more than one adapter: `python -m tests.golden.make_folders`. Old ones stay."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path
from typing import Any

import torch
import transformers as tf
import yaml
from safetensors.torch import save_file

from spectune import fuse
from spectune.cli.app import app
from spectune.runs import load_run
from tests.recipes import tiny

from .make import HERE

FOLDERS = HERE / "folders"
IDS = torch.arange(4, 16).view(2, 6)
# Name -> adapters of `make`, rule and weights.
FUSED: dict[str, tuple[list[str], dict[str, Any]]] = {
    "fused-spectral": (["spectral_a", "spectral_a-embedded"], {"weights": 1, "allow_overlap": True}),
    "fused-lora": (["spectral_r", "svft"], {"rule": "average"}),
}
SPECTRAL = {"method": "spectral_a", "r": 2, "target_modules": ["query", "value"]}
RUN: dict[str, Any] = {
    "recipe": "text_classification", "model": "bert", "data": {"train": "train.jsonl", "test": "test.jsonl"}
}  # fmt: skip


def write_base(folder: Path) -> None:
    """Write a BERT of some 2,000 numbers with its tokenizer, and examples."""
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    tf.BertModel(tf.BertConfig(**sizes, vocab_size=64, max_position_embeddings=16)).save_pretrained(folder / "bert")
    tiny.tokenizer(pairs=True).save_pretrained(folder / "bert")
    tiny.reviews(folder / "train.jsonl", 8)
    tiny.reviews(folder / "test.jsonl", 4)


def write_run() -> None:
    """Train a run, keep its logits beside it."""
    training = {"steps": 3, "batch_size": 4, "learning_rate": 1e-2}
    Path("run.yaml").write_text(yaml.safe_dump({**RUN, "adapter": SPECTRAL, "training": training}))
    app(["train", "run.yaml", "-o", "run"], standalone_mode=False)
    _, model = load_run("run")
    with torch.no_grad():
        save_file({"logits": model(input_ids=IDS).logits}, "logits.safetensors")
    for left in ("run/checkpoints", "run.yaml"):
        shutil.rmtree(left) if Path(left).is_dir() else Path(left).unlink()
    for left in ("run/report.html", "run/adapter/README.md", "run/.lock"):
        Path(left).unlink(missing_ok=True)


def write_sweep() -> None:
    """Run a sweep of two rates and two seeds."""
    methods = {"spectral_a": {"adapter": SPECTRAL, "learning_rates": [1e-3, 1e-2]}}
    run = {**RUN, "training": {"steps": 2, "batch_size": 4}}
    run["data"] = {**RUN["data"], "validation": "train.jsonl"}
    sweep = {"title": "Golden", "run": run, "methods": methods, "seeds": [0, 1], "tuning_seeds": 1}
    Path("sweep.yaml").write_text(yaml.safe_dump(sweep))
    app(["compare", "sweep.yaml", "-o", "sweep"], standalone_mode=False)
    for left in (
        "sweep/runs",
        "sweep/method_comparison",
        "sweep/comparison.html",
        "sweep/comparison.md",
        "sweep/.lock",
    ):
        shutil.rmtree(left) if Path(left).is_dir() else Path(left).unlink(missing_ok=True)


def write_fused() -> None:
    """Fuse golden adapters, keep the updates beside them."""
    for name, (parts, options) in FUSED.items():
        fused = fuse([HERE / part for part in parts], base=HERE / "base.safetensors", **options)
        fused.save(name)
        updates = {layer: delta.left_OP @ delta.core_matrix() @ delta.right_QI for layer, delta in fused.deltas.items()}
        save_file(
            {layer: update.float().contiguous() for layer, update in updates.items()}, f"{name}/updates.safetensors"
        )
        Path(name, "README.md").unlink(missing_ok=True)


def main() -> None:
    """Write the folders once; those of earlier releases stay as they are."""
    FOLDERS.mkdir()
    with contextlib.chdir(FOLDERS):
        write_base(FOLDERS)
        write_run()
        write_sweep()
        write_fused()
    for path in FOLDERS.rglob("*"):  # no folder of this machine; readers go to FOLDERS first
        if path.suffix in (".json", ".yaml"):
            text = path.read_text()
            path.write_text(text.replace(f"{FOLDERS}/", "").replace(f"{HERE}/", "../"))


if __name__ == "__main__":
    main()
