"""Where every option of a run of text_to_image is seen at work: in the Trainer before its first step, and in files."""

from __future__ import annotations

import copy
import tempfile
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from diffusers import DiffusionPipeline
from PIL import Image

from examples.glyphs.base import fresh_pipeline
from spectune.methods import METHODS
from tests.recipes.every_field import Different, Entries, Run, Told, picture
from tests.recipes.run_fields import COMMON, counts, decays
from tests.recipes.short_trainings import logged

READ = DiffusionPipeline.from_pretrained
USUAL, WORD = METHODS["spectral_a"].learning_rate, 1e-3


def concept_home(folder: Path) -> None:
    """Write run files with two pipelines, pictures and masks."""
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
    run: dict[str, Any] = {
        "recipe": "text_to_image",
        "model": str(folder / "base"),
        "adapter": {"unet": {"method": "spectral_a", "r": 2, "target_modules": ["to_q"]}},
        "data": {"train": str(folder / "images")},
        "training": {"steps": 4},
    }
    more = {"word": {"token": "<dax>", "initial_word": "shape"}, "drawings": {"steps": 1}}
    (folder / "run.yaml").write_text(yaml.safe_dump(run | more))
    (folder / "any.yaml").write_text(yaml.safe_dump(run | {"recipe": "causal_lm"}))


@cache
def _opened(folder: str) -> Any:
    return READ(folder, use_safetensors=True)


def opened(folder: str, **told: Any) -> Any:
    """In place of DiffusionPipeline.from_pretrained: read each folder once, and keep what was told."""
    found = copy.deepcopy(_opened(folder))
    found.unet.told = told
    return found


def of_concept(file: Path, *words: str) -> Run:
    """Get a run; `{here}` in a word is the file's folder."""
    return Run(file, tuple(word.replace("{here}", str(file.parent)) for word in words))


def unet(run: Run) -> Any:
    return run.model.unet


def method(run: Run, part: str) -> Any:
    config = getattr(getattr(run.model, part), "peft_config", {}).get("default")
    return getattr(config, "method", None)


def rates(run: Run) -> list[float]:
    """Of the first adapter, the word, and a second adapter."""
    return [group["lr"] for group in run.groups]


def example(run: Run, name: str) -> Any:
    return run.trainer.train_dataset[0].get(name, torch.zeros(0)).flatten().tolist()


def caption(run: Run) -> str:
    tokens = run.trainer.train_dataset[0]["tokens"]
    words: str = run.model.pipeline.tokenizer.decode(tokens, skip_special_tokens=True)
    return words.strip()


def loss(run: Run) -> float:
    """Of the first two examples, with the first noise that the loss draws."""
    model, plan = run.told()._built
    batch = run.recipe.collate([run.trainer.train_dataset[i] for i in (0, 1)])
    with torch.no_grad():
        return float(plan.loss(model, batch))


def drawings(run: Run) -> list[tuple[str, bytes]]:
    """What four steps draw."""
    with tempfile.TemporaryDirectory() as folder:
        (callback,) = run.recipe.callbacks(run.model, Path(folder))
        for done in range(5):
            state = SimpleNamespace(global_step=done, max_steps=4)
            (callback.on_step_end if done else callback.on_train_begin)(None, state, None)
        found: list[tuple[str, bytes]] = run.recipe.drawings(Path(folder))
    return found


def captions(run: Run) -> list[str]:
    return [said for said, _ in drawings(run)]


def first_drawn(run: Run) -> bytes:
    return drawings(run)[0][1]


def random_start(run: Run) -> Any:
    return next(p.flatten()[:4].tolist() for name, p in unet(run).named_parameters() if "lora_A" in name)


def base_dtypes(run: Run) -> set[torch.dtype]:
    own = ("spectune_", "new_word")
    return {p.dtype for name, p in run.model.named_parameters() if not any(word in name for word in own)}


def stepping(entry: Told) -> Told:
    """The word goes at the rate of the adapter, as `step` has it."""
    return Told(entry.words, entry.see, entry.wanted, given=("training.head_learning_rate=1.0",))


SVFT = "{method: svft, target_modules: [to_q]}"
TEXT = "adapter.text_encoder={method: spectral_a, r: 1, target_modules: [q_proj]}"
PRIOR = ("prior.prompts=[a shape]", "prior.images=2")
DRAWS = "drawings.prompts=[a <dax>]"
LOOKS = ("data.validation={here}/few", "training.validate_every=1")
SAME = ("warmup", "schedule", "optimizer", "save_every", "keep_checkpoints", "report_to", "workers")
CONCEPT: Entries = {f"training.{name}": COMMON[f"training.{name}"] for name in SAME} | {
    f"training.{name}": stepping(COMMON[f"training.{name}"])
    for name in ("max_grad_norm", "precision", "gradient_checkpointing")
} | {
    "recipe": Told("recipe=text_to_image", lambda run: type(run.recipe).__name__, "TextToImage", file="any.yaml"),
    "model": Told("model={here}/base2", lambda run: next(unet(run).parameters()).flatten()[:4].tolist(), Different),
    "revision": Told(
        "revision=other", lambda run: (unet(run).get_base_model().told["revision"],
                                       unet(run).peft_config["default"].revision), ("other", "other"),
    ),
    "dtype": Told("dtype=bfloat16", base_dtypes, {torch.bfloat16}),
    "seed": Told(
        "seed=5", lambda run: (random_start(run), example(run, "prior_latents"), first_drawn(run), loss(run),
                               run.batch["latents"].flatten()[:9].tolist()), Different,
        given=("adapter.unet={peft_type: LORA, target_modules: [to_q]}", DRAWS, *PRIOR),
    ),
    "adapter.unet": Told(f"adapter.unet={SVFT}", lambda run: method(run, "unet"), "svft"),
    "adapter.text_encoder": Told(TEXT, lambda run: method(run, "text_encoder"), "spectral_a"),
    "training.steps": Told("training.steps=5", lambda run: (run.steps, len(run.trainer.train_dataset)), (5, 10)),
    "training.epochs": Told(("training.epochs=3", "training.steps=null"), lambda run: run.steps, 5),
    "training.batch_size": Told(
        "training.batch_size=3",
        lambda run: (len(run.batch["tokens"]), len(next(iter(run.trainer.get_eval_dataloader()))["tokens"])), (3, 3),
        given=LOOKS,
    ),
    "training.gradient_accumulation": Told(
        "training.gradient_accumulation=2",
        lambda run: (run.steps, len(run.trainer.train_dataset), run.trainer.args.gradient_accumulation_steps),
        (4, 16, 2),
    ),
    "training.learning_rate": Told("training.learning_rate=0.5", rates, [0.5, WORD]),
    "training.head_learning_rate": Told("training.head_learning_rate=0.5", rates, [USUAL, 0.5]),
    "training.text_encoder_learning_rate": Told(
        "training.text_encoder_learning_rate=0.5", rates, [USUAL, WORD, 0.5], given=(TEXT,)
    ),
    # The word is a row of a matrix.
    "training.weight_decay": Told("training.weight_decay=0.1", decays, {True: {0.1}, False: {0.1}}),
    "training.validate_every": Told(LOOKS[1], logged, [1, 2], given=LOOKS[:1]),
    "training.snr_gamma": Told("training.snr_gamma=5.0", loss, Different),
    "data.train": Told("data.train={here}/few", counts, {"train": 2}),
    "data.validation": Told("data.validation={here}/few", counts, {"train": 3, "validation": 2}),
    "data.test": Told("data.test={here}/few", counts, {"train": 3, "test": 2}),
    "data.caption": Told('data.caption="a red {token}"', caption, Different),
    "data.masks": Told("data.masks={here}/masks", lambda run: example(run, "weights"), Different),
    "word.token": Told("word.token=<wug>", lambda run: run.model.word, "<wug>"),
    "word.initial_word": Told("word.initial_word=star", lambda run: run.model.new_word.tolist(), Different),
    "prior.prompts": Told(
        "prior.prompts=[a shape]", lambda run: len(example(run, "prior_latents")) > 0, True, given=("prior.images=2",)
    ),
    "prior.images": Told(
        "prior.images=3", lambda run: len({tuple(row["prior_latents"].flatten().tolist())
                                           for row in run.trainer.train_dataset}), 3,
        given=("training.steps=20", *PRIOR),
    ),
    "prior.weight": Told("prior.weight=3.0", loss, Different, given=PRIOR),
    "drawings.prompts": Told(DRAWS, captions, ["step 0: a <dax>", "step 4: a <dax>"]),
    "drawings.every": Told(
        "drawings.every=3", captions, ["step 0: a <dax>", "step 3: a <dax>", "step 4: a <dax>"], given=(DRAWS,)
    ),
    "drawings.steps": Told("drawings.steps=2", first_drawn, Different, given=(DRAWS,)),
    "drawings.guidance": Told("drawings.guidance=2.0", first_drawn, Different, given=(DRAWS,)),
}  # fmt: skip


def patched(patch: pytest.MonkeyPatch) -> None:
    """Have pipelines read once."""
    patch.setattr(DiffusionPipeline, "from_pretrained", opened)
