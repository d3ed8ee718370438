"""Small runs of every recipe, whose losses are kept: what each is told, and the one way to train and read it.

Whatever is not told is left at its default, so that a changed default shows. No dropout: torch draws its masks by
MKL's generator where there is MKL and by its own elsewhere.
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
import yaml

from tests.models import vit_targets
from tests.recipes import tiny

STEPS = 20
SEED = 3
WORDS = 105  # of the text encoder; what the examples' tokenizer had when the losses were written down
Made = Callable[[Path], list[str]]
"""Writes what a run needs into a folder and gets the words that `spectune` is told, without the output."""


def trained(words: list[str], output: Path, *more: str) -> dict[str, Any]:
    """Get the losses and final figures of a run. The only place that knows how a run is started and where it is read.

    Through the command line, in this process, on one thread.
    """
    from spectune.cli import main

    said, argv, threads = io.StringIO(), sys.argv, torch.get_num_threads()
    sys.argv = ["spectune", *words, "--output", str(output), "--json", *more]
    torch.set_num_threads(1)
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said), warnings.catch_warnings():
            main()
    except SystemExit as stop:
        if stop.code:
            raise RuntimeError(said.getvalue()) from None
    finally:
        sys.argv = argv
        torch.set_num_threads(threads)
    found = next(path for name in ("result.json", "run/result.json") if (path := output / name).exists())
    result = json.loads(found.read_text())
    figures = {f"{split} {name}": value for split, of in result["metrics"].items() for name, value in of.items()}
    if result["compared"]:  # the demo's baselines, and its own figure under the method's name
        figures = {metric["name"]: metric["value"] for metric in result["compared"]}
        figures[result["method"]] = result["metrics"]["test"]["accuracy"]
    return {"losses": result["losses"], "metrics": figures}


def cut_back(output: Path, step: int) -> Path:
    """Leave of a finished run what one that was killed after `step` leaves; get the checkpoint of that step."""
    for path in sorted(output.rglob("*"), reverse=True):
        kept = path.name in ("run.yaml", ".lock") or f"checkpoint-{step}" in path.parts
        if not kept and path.is_file():
            path.unlink()
        elif path.is_dir() and not any(path.iterdir()):
            path.rmdir()
    return output / "checkpoints" / f"checkpoint-{step}"


def filled(model: Any, spread: float = 0.2) -> Any:
    """Get the model with weights that do not depend on how a release of transformers draws them."""
    generator = torch.Generator().manual_seed(SEED)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * spread)
    return model


def refilled(kind: Any, folder: str, spread: float = 0.2, **more: Any) -> None:
    """Fill a saved model, its head included."""
    with contextlib.redirect_stderr(io.StringIO()):
        filled(kind.from_pretrained(folder, **more), spread).save_pretrained(folder)


def written(folder: Path, values: dict[str, Any]) -> list[str]:
    (folder / "run.yaml").write_text(yaml.safe_dump(values))
    return ["train", str(folder / "run.yaml")]


def plain(values: dict[str, Any], adapter: Any) -> dict[str, Any]:
    """Get a run of tests.recipes.tiny at the default rate."""
    training = {"steps": STEPS, "batch_size": 4, "save_every": STEPS // 2}
    return values | {"seed": SEED, "adapter": adapter, "training": training}


def text(adapter: Any, folder: Path) -> list[str]:
    values = plain(tiny.text_run(folder), adapter) | {"dropout": 0.0}
    refilled(tf.BertForSequenceClassification, values["model"], num_labels=2)
    return written(folder, values)


def language(adapter: Any, folder: Path) -> list[str]:
    values = plain(tiny.lm_run(folder, evaluation={"metrics": ["loss", "gsm8k"]}), adapter)
    refilled(tf.LlamaForCausalLM, values["model"])
    return written(folder, values)


def image(adapter: Any, folder: Path) -> list[str]:
    values = plain(tiny.image_run(folder), adapter)
    refilled(tf.ViTForImageClassification, values["model"], 0.1, num_labels=2, ignore_mismatched_sizes=True)
    return written(folder, values)


def prompt_tokenizer(folder: Path, size: int = 0) -> Any:
    """Get a CLIP tokenizer that is the same in every process: a BPE that is trained numbers ties as it likes."""
    words, letters, end = ("a", "shape"), "abcdefghijklmnopqrstuvwxyz<>", "</w>"
    starts = [word[:i] for word in words for i in range(2, len(word))]
    tokens = ["<|startoftext|>", "<|endoftext|>", *letters, *(c + end for c in letters), *starts, "shape" + end]
    tokens += [f"<|{i}|>" for i in range(len(tokens), size)]
    merges = [f"{word[:i]} {word[i]}{end if i == len(word) - 1 else ''}" for word in words for i in range(1, len(word))]
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
    files = {"vocab": str(folder / "vocab.json"), "merges": str(folder / "merges.txt")}
    return tf.CLIPTokenizer(**files, model_max_length=16)


def concept(adapters: dict[str, Any], folder: Path) -> list[str]:
    from examples.glyphs import base
    from tests.recipes.tiny import picture

    # The size of the vocabulary decides the random numbers that are left for the UNet: one of the tests' own, always.
    with torch.random.fork_rng(devices=[]), pytest.MonkeyPatch.context() as patch:
        patch.setattr(base, "make_tokenizer", lambda: prompt_tokenizer(folder, WORDS))
        torch.manual_seed(SEED)
        pipeline = base.fresh_pipeline()
    filled(pipeline.text_encoder)
    pipeline.tokenizer = prompt_tokenizer(folder)
    pipeline.save_pretrained(folder / "base")
    (folder / "images").mkdir()
    for i in range(3):
        picture(i).save(folder / "images" / f"{i}.png")
    run = {
        "recipe": "text_to_image", "model": str(folder / "base"), "data": {"train": str(folder / "images")},
        "adapter": adapters, "word": {"token": "<dax>", "initial_word": "shape"}, "seed": SEED,
        "prior": {"prompts": ["a shape"], "images": 2}, "drawings": {"steps": 1},
        "training": {"steps": STEPS, "warmup": 10, "save_every": STEPS // 2},
    }  # fmt: skip
    return written(folder, run)


def demo(folder: Path) -> list[str]:
    return ["demo", "--steps", str(STEPS), "--sentences", "8"]


def lora(*targets: str) -> dict[str, Any]:
    return {"peft_type": "LORA", "r": 2, "target_modules": list(targets)}


def spectral(method: str, *targets: str, **options: Any) -> dict[str, Any]:
    return {"method": method, "target_modules": list(targets), **options}


def _cases() -> Iterator[tuple[str, str, Made]]:
    words, heads, eyes = ("query", "value"), ("q_proj", "v_proj", "down_proj"), vit_targets()[:2]
    for recipe, make, targets in (
        ("text_classification", text, words), ("causal_lm", language, heads), ("image_classification", image, eyes),
    ):  # fmt: skip
        yield recipe, "spectral_a", partial(make, spectral("spectral_a", *targets, r=2))
        yield recipe, "LoRA", partial(make, lora(*targets))
    dynamics = {"singular_decay": 0.1, "grad_norm": "rms"}
    for name, adapter in {
        "spectral_r": spectral("spectral_r", *heads, r=4),
        "svft": spectral("svft", *heads, pattern="banded", off_diagonals=2),
        "specadapt with dynamics": spectral("specadapt", *heads, r=2, basis_rank=8, **dynamics),
        "full": "none",
    }.items():
        yield "causal_lm", name, partial(language, adapter)
    for name, adapters in {
        "spectral_a": {"unet": spectral("spectral_a", "to_q", "to_v", "conv1", r=2)},
        "LoRA": {"unet": lora("to_q", "to_v"), "text_encoder": lora("q_proj")},
    }.items():
        yield "text_to_image", name, partial(concept, adapters)
    yield "demo", "spectral_a", demo


CASES: dict[str, dict[str, Made]] = {}
for _recipe, _name, _make in _cases():
    CASES.setdefault(_recipe, {})[_name] = _make
