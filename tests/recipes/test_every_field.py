"""No option of a YAML file is dropped in silence: each is told, and seen where it takes effect."""

from __future__ import annotations

import dataclasses
import gc
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf
from peft import PEFT_TYPE_TO_CONFIG_MAPPING
from transformers import TrainerCallback
from transformers.integrations import integration_utils

from spectune import SpectralConfig
from spectune.concepts import text_to_image
from spectune.concepts.file import read_concept
from spectune.concepts.options import ConceptOptions
from spectune.errors import DataError, OptionError
from spectune.recipes import parse_config
from spectune.recipes.table import recipe_class
from spectune.runs import load_run, run
from spectune.spectrum import obtain
from spectune.sweeps.config import GeneralText, SweepConfig
from spectune.training.config import validate
from spectune.tuner import bases, build_adapter_config
from spectune.tuner.config import SVDOptions
from tests.recipes import adapter_fields as adapters
from tests.recipes import concept_fields as concepts
from tests.recipes import tiny
from tests.recipes.adapter_fields import FOREIGN, SPECTRAL, arrived, foreign, outcome
from tests.recipes.concept_fields import CONCEPT, Concept
from tests.recipes.every_field import Home, Run, check, home, paths, picture, texts
from tests.recipes.run_fields import ENTRIES, NO_OTHERS
from tests.recipes.sweep_fields import SWEEP, Sweep, sweep_home

RUNS = [(recipe, path) for recipe, entries in ENTRIES.items() for path in entries]
# Runs without the option, built once.
PLAIN: dict[tuple[Any, ...], Any] = {}


class Tracker(TrainerCallback):
    """In place of a tracker that would have to be installed."""


@pytest.fixture(scope="module", autouse=True)
def light_collections() -> Iterator[None]:
    """Leave what is imported out of garbage collections: every training asks for some, half a second each."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Home]:
    """Models in a hub cache, a hub of data sets, a tracker and lm-eval: all without a network."""
    PLAIN.clear()
    found = home(tmp_path_factory.mktemp("home"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(found.folder))
        patch.setattr("datasets.load_dataset", hub_data)
        patch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "mlflow", Tracker)
        fake = type(sys)("lm_eval")
        fake.simple_evaluate = simple_evaluate  # type: ignore[attr-defined]
        wrapper = type(sys)("lm_eval.models.huggingface")
        wrapper.HFLM = lambda **options: options  # type: ignore[attr-defined]
        tasks = type(sys)("lm_eval.tasks")
        tasks.TaskManager = lambda: SimpleNamespace(all_tasks=["arc", "gsm8k"])  # type: ignore[attr-defined]
        modules = {
            "lm_eval": fake,
            "lm_eval.models": fake,
            "lm_eval.models.huggingface": wrapper,
            "lm_eval.tasks": tasks,
        }
        for name, module in modules.items():
            patch.setitem(sys.modules, name, module)
        yield found


def simple_evaluate(**options: Any) -> dict[str, Any]:
    """Answer with what was asked."""
    asked = {**options, "tasks": len(options["tasks"])}
    return {"results": {"": {name: value for name, value in asked.items() if isinstance(value, int)}}}


def hub_data(name: str, config: str | None, split: str) -> Any:
    """Get 9 rows of a data set, 11 in its other configuration; of texts, of pictures, or of plain text."""
    from datasets import ClassLabel, Dataset, Features, Image

    rows = texts({None: 9, "more": 11}[config])
    if name == "a/set":
        return Dataset.from_list(rows)
    if name == "a/text":
        return [{"text": f"w{len(rows)} {split.replace('train', 'good')} w1 w2"}]
    columns = {"image": [picture(i) for i in range(len(rows))], "label": [row["label"] for row in rows]}
    return Dataset.from_dict(columns, features=Features({"image": Image(), "label": ClassLabel(names=["no", "yes"])}))


@pytest.mark.parametrize("recipe", list(ENTRIES))
def test_every_option_of_a_run_has_an_entry(recipe: str) -> None:
    options = set(paths(recipe_class(recipe).Config))
    assert options == set(ENTRIES[recipe]), f"without an entry: {options - set(ENTRIES[recipe])}"


@pytest.mark.parametrize(("recipe", "path"), RUNS)
def test_an_option_of_a_run_arrives(recipe: str, path: str, place: Home) -> None:
    entry = ENTRIES[recipe][path]
    without = place.run(recipe, *entry.given, file=entry.file)
    plain = PLAIN.setdefault((without.file, without.words), without)
    check(plain, place.run(recipe, *entry.all_words, file=entry.file), entry)


def test_every_option_of_a_concept_and_of_a_sweep_has_an_entry() -> None:
    for kind, entries in ((ConceptOptions, CONCEPT), (SweepConfig, SWEEP)):
        options = set(paths(kind))
        assert options == set(entries), f"without an entry: {options - set(entries)}"


@pytest.fixture(scope="module")
def concept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("concept")
    concepts.concept_home(folder)
    return folder / "run.yaml"


@pytest.mark.parametrize("path", list(CONCEPT))
def test_an_option_of_a_concept_arrives(path: str, concept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tf.Trainer, "train", concepts.train)
    monkeypatch.setattr(text_to_image, "open_pipeline", concepts.opened)
    entry = CONCEPT[path]
    plain = PLAIN.setdefault((concept, entry.given), Concept(concept, entry.given))
    check(plain, Concept(concept, entry.all_words), entry)


def test_the_seed_decides_how_the_adapters_of_a_concept_begin(concept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tf.Trainer, "train", concepts.train)
    monkeypatch.setattr(text_to_image, "open_pipeline", concepts.opened)
    starts = []
    for chance in (1, 2):
        torch.manual_seed(chance)
        starts.append(Concept(concept, CONCEPT["seed"].given).random_start)
    assert starts[0] == starts[1]


@pytest.mark.parametrize("path", list(SWEEP))
def test_an_option_of_a_sweep_arrives(path: str, place: Home) -> None:
    file, entry = place.folder / "sweep" / "sweep.yaml", SWEEP[path]
    if not file.is_file():
        sweep_home(file.parent)
    plain = PLAIN.setdefault((file, entry.given), Sweep(file, entry.given))
    check(plain, Sweep(file, entry.all_words), entry)


@pytest.mark.parametrize("path", list(SPECTRAL))
def test_an_option_of_a_spectral_adapter_arrives(path: str, place: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    entry, recipe = SPECTRAL[path], "text_classification"
    plain, told = (place.run(recipe, *words) for words in (entry.given, entry.all_words))
    for one in (plain, told):

        def watched(weights: Any, request: Any, cache: Any, one: Run = one, **more: Any) -> Any:
            one.seen.update(vars(request) | more)
            return obtain(weights, request, cache, **more)

        monkeypatch.setattr(bases, "obtain", watched)
        outcome(one)
    check(plain, told, entry)


def test_every_option_of_an_adapter_has_an_entry() -> None:
    spectral = {f.name for f in dataclasses.fields(SpectralConfig)} - {"svd"}
    spectral |= {f"svd.{f.name}" for f in dataclasses.fields(SVDOptions)}
    assert spectral == set(SPECTRAL), f"without an entry: {spectral - set(SPECTRAL)}"
    for kind, (_, entries) in FOREIGN.items():
        options = {f.name for f in dataclasses.fields(PEFT_TYPE_TO_CONFIG_MAPPING[kind])} - {"peft_type"}
        known = set(entries) | set(adapters.REFUSED) | adapters.LEFT_TO_PEFT.get(kind, set())
        assert options <= known, f"{kind}, without an entry: {options - known}"


@pytest.mark.parametrize("kind", list(FOREIGN))
def test_every_option_of_a_method_of_peft_reaches_the_attached_config(kind: str, place: Home) -> None:
    for name, (text, *more) in FOREIGN[kind][1].items():
        told = place.run("text_classification", *foreign(kind, f"adapter.{name}={text}", *more))
        without = build_adapter_config(place.run("text_classification", *foreign(kind)).config.adapter_options)
        asked = told.config.adapter_options
        config = build_adapter_config(asked) if name in adapters.NEEDS_A_GPU else told.adapter
        assert arrived(config, name, text), f"{kind}: {name} is {getattr(config, name)!r}"
        assert not arrived(without, name, text), f"{kind}: {name} is {text} anyway"


def test_what_peft_would_leave_without_effect_is_refused(place: Home) -> None:
    for name, (text, words) in adapters.REFUSED.items():
        found = outcome(place.run("text_classification", *foreign("LORA", f"adapter.{name}={text}")))
        assert found.startswith("refused") and words in found, found
    for start in adapters.REFUSED_START:
        found = outcome(place.run("text_classification", *foreign("LORA", f"adapter.init_lora_weights={start}")))
        assert "which is not made here" in found, found
    ignored = foreign("LORA", "adapter.loftq_config={loftq_bits: 8}")
    assert "will be ignored" in outcome(place.run("text_classification", *ignored))


def test_dropout_reaches_layers_that_read_it_in_the_config(tmp_path: Path) -> None:
    config = tf.LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, vocab_size=64, pad_token_id=0,
        attention_dropout=0.5, num_labels=2,
    )  # fmt: skip
    folder = tiny.save(tf.LlamaForSequenceClassification(config), tmp_path / "m")
    adapter = {"method": "spectral_a", "r": 2, "target_modules": ["q_proj"]}
    recipe = recipe_class("text_classification")(
        parse_config(tiny.text_run(tmp_path, model=folder, adapter=adapter, dropout=0.0))
    )
    model = recipe.build_model().train()
    batch = recipe.collate([recipe.rows("train")[i] for i in range(3)])
    assert torch.equal(model(**batch).logits, model(**batch).logits)


@pytest.mark.filterwarnings("ignore:The following rank_pattern keys:RuntimeWarning")  # PEFT's, on loading what it saved
def test_adalora_gives_up_ranks_as_told_and_is_found_again(tmp_path: Path) -> None:
    adapter = {"peft_type": "ADALORA", "target_modules": ["query", "value"], "init_r": 4, "target_r": 2}
    adapter |= {"total_step": 6, "tinit": 1, "tfinal": 2}
    config = parse_config(tiny.text_run(tmp_path, adapter=adapter, dropout=0.0))
    result = run(config, tmp_path / "run")
    recipe, model = load_run(tmp_path / "run")
    ranks = [sum(kept) for kept in model.peft_config["default"].rank_pattern.values()]  # type: ignore[union-attr,operator]
    assert sum(ranks) == 2 * len(ranks) == 8
    assert recipe.evaluate(model, "validation") == result.metrics["validation"]


@pytest.mark.parametrize(
    ("recipe", "words", "line"),
    [
        ("causal_lm", ["training.head_learning_rate=0.1"], "this run has no new head"),
        ("causal_lm", ["training.schedule=constant", "training.warmup=5"], "schedule constant has no warmup"),
        ("causal_lm", ["training.optimizer=adamw_tortch"], "adamw_tortch.* is not a valid OptimizerNames"),
        ("text_classification", ["training.precision=float16"], "found a CPU"),
        ("image_classification", ["data.train={squares}", *NO_OTHERS, "data.validation_share=0.5"], "of their own"),
    ],
)
def test_what_would_have_no_effect_is_refused(
    recipe: str, words: list[str], line: str, place: Home, tmp_path: Path
) -> None:
    if "float16" in words[0] and torch.accelerator.is_available():
        pytest.skip("there is an accelerator, which computes in float16")
    pixels = np.zeros((4, 8, 8, 3), np.uint8)
    labels = np.arange(4) % 2
    np.savez(tmp_path / "s.npz", x_train=pixels, y_train=labels, x_validation=pixels, y_validation=labels)
    told = place.run(recipe, *(word.replace("{squares}", str(tmp_path / "s.npz")) for word in words))
    with pytest.raises((OptionError, DataError), match=line):
        told.trainer  # noqa: B018


def test_a_part_that_is_not_asked_for_takes_no_options(concept: Path) -> None:
    with pytest.raises(OptionError, match="no adapter of text_encoder is asked for"):
        read_concept(concept, ["text_encoder_rate=0.1"])
    with pytest.raises(OptionError, match="hub_config needs hub"):
        validate(GeneralText, {"file": "a.txt", "hub_config": "b"}, "forgetting")
