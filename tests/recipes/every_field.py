"""What it takes to ask of every option of a run whether it arrives: the options there are, and runs told otherwise."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias, get_args

import numpy as np
import yaml
from PIL import Image
from pydantic import BaseModel

from spectune.recipes import RECIPES, load_config
from spectune.recipes.table import recipe_class
from spectune.runs.building import build
from tests.models import vit_targets
from tests.recipes import tiny


class Different:
    """Seen with the option: anything but what is seen without it, in every part."""


@dataclass(frozen=True)
class Told:
    """One option of a run, and where it is seen at work."""

    words: str | tuple[str, ...]
    """`key=value`, over the file; further ones only where the first is refused alone."""
    see: Callable[[Any], Any]
    wanted: Any
    """What is seen then; a function gets it from `Run.told`."""
    given: tuple[str, ...] = ()
    """What is told both runs, with the option and without it."""
    file: str = "run.yaml"

    @property
    def all_words(self) -> tuple[str, ...]:
        """What the run with the option is told."""
        return (*self.given, *([self.words] if isinstance(self.words, str) else self.words))


Entries: TypeAlias = dict[str, Told]


def check(plain: Any, told: Any, entry: Told) -> None:
    """See the wanted with the option, and something else without it."""
    found, before = entry.see(told), entry.see(plain)
    if entry.wanted is Different:
        pairs = zip(found, before, strict=True) if isinstance(found, tuple) else [(found, before)]
        assert all(a != b for a, b in pairs), f"{entry.words} changes nothing, or not everything: {found}"
        return
    wanted = entry.wanted(told) if callable(entry.wanted) and not isinstance(entry.wanted, type) else entry.wanted
    assert found == wanted, f"{entry.words}: seen {found!r}, wanted {wanted!r}"
    assert before != wanted, f"{entry.words}: without it the same is seen: {before!r}"


def paths(kind: type, stem: str = "") -> Iterator[str]:
    """Get the dotted path of every option of a configuration, those of its sections included."""
    if issubclass(kind, BaseModel):
        fields = {name: f.annotation for name, f in kind.model_fields.items()}
    else:
        fields = {f.name: None for f in dataclasses.fields(kind)}
    for name, annotation in fields.items():
        star = ".*" if str(annotation).startswith("dict[str, spectune") else ""
        inner = list(_sections(annotation))
        for section in inner:
            yield from paths(section, f"{stem}{name}{star}.")
        if not inner:
            yield f"{stem}{name}"


def _sections(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        yield from _sections(part)


@dataclass
class Run:
    """A run of a file with words over it, built only as far as somebody looks."""

    file: Path
    words: tuple[str, ...] = ()
    seen: dict[str, Any] = field(default_factory=dict)
    """What stubs were told."""

    def told(self, *words: str) -> Run:
        """Get the same run, told more."""
        return Run(self.file, (*self.words, *words))

    @cached_property
    def config(self) -> Any:
        return load_config(self.file, self.words)

    @cached_property
    def recipe(self) -> Any:
        return recipe_class(self.config.recipe)(self.config)

    @cached_property
    def _built(self) -> Any:
        return build(self.recipe)

    @property
    def model(self) -> Any:
        return self._built[0]

    @property
    def adapter(self) -> Any:
        """The config that is attached, None without one."""
        return getattr(self.model, "peft_config", {}).get("default")

    @cached_property
    def trainer(self) -> Any:
        return self._new_trainer()

    def _new_trainer(self) -> Any:
        return self.recipe.trainer(*self._built, self.file.parent / "out")

    @property
    def batch(self) -> Any:
        """The first batch that would be trained on: of a new trainer, for building one seeds what shuffles."""
        return next(iter(self._new_trainer().get_train_dataloader()))

    @property
    def curve(self) -> list[float]:
        """Each of four steps' share of the peak rate."""
        self.trainer.create_optimizer_and_scheduler(4)
        return [round(self.trainer.lr_scheduler.lr_lambdas[0](step), 6) for step in range(4)]

    @property
    def groups(self) -> Any:
        return self.trainer.create_optimizer().param_groups

    @property
    def steps(self) -> int:
        """How many steps the Trainer would do."""
        loader = self.trainer.get_train_dataloader()
        return int(self.trainer.set_initial_training_values(self.trainer.args, loader)[-1])


@dataclass(frozen=True)
class Home:
    """A folder with a run file for each recipe, whose models lie in a hub cache with two revisions."""

    folder: Path

    def run(self, recipe: str, *words: str, file: str = "run.yaml") -> Run:
        """Get a run; `{here}` in a word is the recipe's folder, `{few}` some data, `{revision}` the other one."""
        here = self.folder / recipe
        few = next(path for path in here.glob("few*"))
        other = self.folder / f"models--tiny--{recipe}" / "snapshots" / OTHER
        places = {"{here}": here, "{few}": few, "{revision}": other}
        for name, place in places.items():
            words = tuple(word.replace(name, str(place)) for word in words)
        return Run(here / file, words)


def home(folder: Path) -> Home:
    """Write models, data and run files."""
    training = {"steps": 4, "batch_size": 4, "learning_rate": 1e-2}
    spectral = {"method": "spectral_a", "r": 2}
    for recipe, model, targets in (
        ("text_classification", tiny.bert, ["query", "value"]),
        ("causal_lm", tiny.llama, ["q_proj", "v_proj"]),
        ("image_classification", tiny.vit, list(vit_targets()[:2])),
    ):
        here = folder / recipe
        here.mkdir()
        hub = folder / f"models--tiny--{recipe}"
        _revisions(Path(model(hub / "snapshots" / MAIN)))
        (hub / "refs").mkdir()
        for name, commit in (("main", MAIN), ("other", OTHER)):
            (hub / "refs" / name).write_text(commit)
        split = _images if recipe == "image_classification" else _texts
        found = {name: split(here / name, count) for name, count in SIZES.items()}
        data = {name: found[name] for name in ("train", "validation", "test")}
        more: dict[str, Any] = {"dropout": 0.0} if recipe == "text_classification" else {}
        if recipe == "causal_lm":
            data |= {"prompt": "{question} :", "completion": " {answer}", "max_tokens": 32}
        if recipe == "image_classification":
            data |= {"augment": False}
        adapter = spectral | {"target_modules": targets}
        run = {"recipe": recipe, "model": f"tiny/{recipe}", "adapter": adapter, "data": data, "training": training}
        (here / "run.yaml").write_text(yaml.safe_dump(run | more))
        least = run | {"data": {"train": data["train"]}, "recipe": next(name for name in RECIPES if name != recipe)}
        (here / "any.yaml").write_text(yaml.safe_dump(least))
        (here / "loud.jinja").write_text("{% for m in messages %}good {{ m['content'] }} {% endfor %}")
    return Home(folder)


MAIN, OTHER = "0" * 40, "1" * 40
SIZES = {"train": 16, "validation": 4, "test": 6, "few": 5}


def _revisions(main: Path) -> None:
    """Put another snapshot beside the first; config, tokenizer and pixels say that they are the other's."""
    (main / "preprocessor_config.json").write_text(_processor(0.5))
    other = main.with_name(OTHER)
    other.mkdir()
    for path in main.iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    (other / "preprocessor_config.json").write_text(_processor(0.25))
    for name, mark in (("config.json", {"mark": "other"}), ("tokenizer_config.json", {"model_max_length": 77})):
        if (other / name).is_file():
            (other / name).write_text(json.dumps(json.loads((other / name).read_text()) | mark))


def _processor(mean: float) -> str:
    size = {"height": 8, "width": 8}
    told = {"image_processor_type": "ViTImageProcessor", "size": size, "image_mean": [mean] * 3, "image_std": [0.5] * 3}
    return json.dumps(told)


def texts(count: int) -> list[dict[str, Any]]:
    """Rows that every text recipe can read in several ways."""
    return [
        {
            "text": f"w{i} {('bad', 'good')[i % 2]} w3 w4 w5", "other": f"w{20 + i}", "label": ("no", "yes")[i % 2],
            "mark": i % 3, "question": f"w{i} w{i + 1}", "answer": f"w{i} #### {1 + i % 2}",
            "prompt": f"w{i}", "completion": " w30",
        }
        for i in range(count)
    ]  # fmt: skip


def _texts(path: Path, count: int) -> str:
    path.with_suffix(".jsonl").write_text("".join(json.dumps(row) + "\n" for row in texts(count)))
    return str(path.with_suffix(".jsonl"))


def _images(path: Path, count: int) -> str:
    for i in range(count):
        (path / ("dark", "light")[i % 2]).mkdir(parents=True, exist_ok=True)
        picture(i).save(path / ("dark", "light")[i % 2] / f"{i:02}.png")
    return str(path)


def picture(i: int) -> Any:
    noise = np.random.default_rng(i).integers(0, 120, (8, 8, 3)) + 120 * (i % 2)
    return Image.fromarray(noise.astype(np.uint8))
