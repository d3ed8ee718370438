"""Where every option of a run of text_to_image is seen at work: in the Trainer before its first step, and in files."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from examples.glyphs.base import fresh_pipeline
from spectune.concepts import text_to_image
from spectune.concepts.file import read_concept
from spectune.concepts.pipeline import open_pipeline
from spectune.methods import METHODS
from spectune.training.loop import Watch
from tests.recipes.every_field import Different, Entries, Told, picture


def concept_home(folder: Path) -> None:
    """Write a run file with two pipelines, pictures and masks."""
    for seed, name in enumerate(("base", "base2")):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            fresh_pipeline().save_pretrained(folder / name)
    for name, count in (("images", 3), ("few", 2)):
        (folder / name).mkdir()
        for i in range(count):
            picture(i).save(folder / name / f"{i}.png")
    (folder / "masks").mkdir()
    for i in range(3):
        mask = Image.new("L", (8, 8), 0)
        mask.paste(255, (0, 0, 4, 8))
        mask.save(folder / "masks" / f"{i}.png")
    adapter = {"method": "spectral_a", "r": 2, "target_modules": ["to_q"]}
    places = {"pipeline": str(folder / "base"), "images": str(folder / "images")}
    run = {"token": "<dax>", "initial_word": "shape", "unet": adapter, "steps": 4, "sampling_steps": 1}
    (folder / "run.yaml").write_text(yaml.safe_dump({"recipe": "text_to_image"} | places | run))


@cache
def _opened(folder: str) -> Any:
    return open_pipeline(folder)


@dataclass
class Concept:
    """A run that does everything but the steps themselves."""

    file: Path
    words: tuple[str, ...]
    said: list[str] = field(default_factory=list)

    @cached_property
    def _ran(self) -> tuple[Any, Any]:
        words = [word.replace("{here}", str(self.file.parent)) for word in self.words]
        output = self.file.parent / f"out{len(TRAINERS)}"
        run = text_to_image.train_concept(read_concept(self.file, words), output, say=self.said.append)
        return run, TRAINERS[-1]

    @property
    def output(self) -> Path:
        return Path(self._ran[0].output)

    @property
    def trainer(self) -> Any:
        return self._ran[1]

    @property
    def counts(self) -> str:
        return self._ran and self.said[0]

    @property
    def sheets(self) -> list[str]:
        return [path.name for path in self._ran[0].validation]

    @property
    def drawn(self) -> bytes:
        return bytes(self._ran[0].validation[0].read_bytes())

    @property
    def caption(self) -> str:
        tokens = self.trainer.train_dataset[0]["tokens"]
        words: str = self.trainer.model._pipeline[0].tokenizer.decode(tokens, skip_special_tokens=True)
        return words.strip()

    @property
    def rates(self) -> list[float]:
        """Of the word, the UNet and the text encoder."""
        return [group["lr"] for group in self.trainer.create_optimizer().param_groups]

    @property
    def loss(self) -> float:
        """Of the first two examples, with the noise that the second call of the loss draws."""
        batch = torch.utils.data.default_collate([self.trainer.train_dataset[i] for i in (0, 1)])
        with torch.no_grad():
            return float(self.trainer.plan.loss(self.trainer.model, batch))

    def adapter(self, part: str) -> Any:
        """The method in a saved part, None where there is none."""
        config = self.output / part / "adapter_config.json"
        return json.loads(config.read_text())["method"] if config.is_file() else None

    @property
    def word(self) -> dict[str, Any]:
        return {name: value.tolist() for name, value in load_file(self.output / "token.safetensors").items()}

    @property
    def random_start(self) -> Any:
        named = self.trainer.model.unet.named_parameters()
        return next(p.flatten()[:4].tolist() for name, p in named if "lora_A" in name)

    @property
    def prior(self) -> Any:
        return self.trainer.train_dataset[0]["prior_latents"].flatten()[:4].tolist()


TRAINERS: list[Any] = []
USUAL = METHODS["spectral_a"].learning_rate


def train(trainer: Any, *args: Any, **kwargs: Any) -> None:
    """In place of Trainer.train: tell of four steps and do none."""
    TRAINERS.append(trainer)
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, Watch) and callback.on_step is not None:
            for step in range(1, trainer.args.max_steps + 1):
                callback.on_step(step, trainer.args.max_steps, 1.0)


def opened(folder: str | Path) -> Any:
    """In place of open_pipeline: read each folder once."""
    return copy.deepcopy(_opened(str(folder)))


def seen(name: str) -> Callable[[Concept], Any]:
    return lambda run: getattr(run, name)


ADAPTER = "{method: svft, target_modules: [to_q]}"
TEXT = "text_encoder={method: spectral_a, r: 1, target_modules: [q_proj]}"
PRIOR = ("prior_prompts=[a shape]", "prior_images=2")
DRAWS = "validation_prompts=[a <dax>]"
CONCEPT: Entries = {
    "pipeline": Told(
        "pipeline={here}/base2",
        lambda run: next(run.trainer.model.unet.parameters()).flatten()[:4].tolist(),
        Different,
    ),
    "images": Told("images={here}/few", seen("counts"), "2 pictures of the concept, 0 of its class"),
    "token": Told("token=<wug>", lambda run: list(run.word), ["<wug>"]),
    "initial_word": Told("initial_word=star", seen("word"), Different),
    "caption": Told('caption="a red {token}"', seen("caption"), Different),
    "masks": Told("masks={here}/masks", lambda run: run.trainer.train_dataset[0]["weights"].tolist(), Different),
    "unet": Told(f"unet={ADAPTER}", lambda run: run.adapter("unet"), "svft"),
    "text_encoder": Told(TEXT, lambda run: run.adapter("text_encoder"), "spectral_a"),
    "unet_rate": Told("unet_rate=0.5", seen("rates"), [1e-3, 0.5]),
    "text_encoder_rate": Told("text_encoder_rate=0.5", seen("rates"), [1e-3, USUAL, 0.5], given=(TEXT,)),
    "token_rate": Told("token_rate=0.5", seen("rates"), [0.5, USUAL]),
    "steps": Told("steps=5", lambda run: (run.trainer.args.max_steps, len(run.trainer.train_dataset)), (5, 10)),
    "batch_size": Told(
        "batch_size=3", lambda run: len(next(iter(run.trainer.get_train_dataloader()))["tokens"]), 3
    ),
    "seed": Told(
        "seed=5", lambda run: (run.random_start, run.prior, run.drawn, run.loss), Different,
        given=("unet={peft_type: LORA, target_modules: [to_q]}", DRAWS, *PRIOR),
    ),
    "prior_prompts": Told("prior_prompts=[a shape]", seen("counts"), "3 pictures of the concept, 2 of its class",
                          given=("prior_images=2",)),
    "prior_images": Told("prior_images=3", seen("counts"), "3 pictures of the concept, 3 of its class", given=PRIOR),
    "prior_weight": Told("prior_weight=3.0", seen("loss"), Different, given=PRIOR),
    "snr_gamma": Told("snr_gamma=5.0", seen("loss"), Different),
    "validation_prompts": Told(DRAWS, seen("sheets"), ["step-0.png", "step-4.png"]),
    "validation_every": Told(
        "validation_every=3", seen("sheets"), ["step-0.png", "step-3.png", "step-4.png"], given=(DRAWS,)
    ),
    "sampling_steps": Told("sampling_steps=2", seen("drawn"), Different, given=(DRAWS,)),
    "guidance": Told("guidance=2.0", seen("drawn"), Different, given=(DRAWS,)),
}  # fmt: skip
