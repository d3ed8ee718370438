"""No option of a YAML file is dropped in silence: somebody reads each of them while a run or a sweep is at work."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import pytest
from pydantic import BaseModel

from spectune.recipes import RECIPES, parse_config
from spectune.recipes.table import recipe_class
from spectune.runs import run
from spectune.sweeps import parse_sweep, run_sweep, summarise, to_markdown
from spectune.sweeps.config import SweepConfig
from spectune.sweeps.workers import Workers
from spectune.training.config import Section
from tests.concepts.concepts import concept_run
from tests.recipes import tiny
from tests.sweeps.sweeps import in_this_process

SHORT = {"steps": 1, "save_every": 2}
FROM_HUB = {"hub": "a/set", "hub_config": "all", "train": "train", "validation": "validation"}
HARNESS = {"metrics": ["loss", "exact_match"], "max_new_tokens": 2, "lm_eval": {"tasks": ["arc"]}}
REWARDS: list[dict[str, Any]] = [
    {"rewards": [{"reward": "gsm8k"}, {"reward": "exact_match"}, {"reward": "length", "most": 3}]},
    {"rewards": [{"reward": "ends_with", "text": "w1"}]},
]
for _over in REWARDS:
    _over["data"] = {"answer": "{answer}"}
# recipe -> (its tiny run, what goes over it in each of the runs that together read every option)
RUNS: dict[str, tuple[Any, list[dict[str, Any]]]] = {
    "text_classification": (tiny.text_run, [{}, {"data": FROM_HUB}]),
    "causal_lm": (tiny.lm_run, [{"evaluation": HARNESS}, {"data": FROM_HUB | {"test": None}}]),
    "preference": (
        tiny.preference_run,
        [{}, {"loss": "kto"}, {"data": FROM_HUB | {"test": None}}, {"evaluation": {"lm_eval": {"tasks": ["arc"]}}}],
    ),
    "reward": (tiny.reward_run, [{"evaluation": {"lm_eval": {"tasks": ["arc"]}}}, {"data": FROM_HUB}, *REWARDS]),
    "image_classification": (tiny.image_run, [{}, {"data": FROM_HUB}]),
    "text_to_image": (concept_run, [{}]),
}


# Options of the shared sections that a recipe refuses, or that only `generate` reads; its own tests hold that.
REFUSED = {"ConceptTraining.head_first", "WritingEvaluation.max_new_tokens"}
# Read only beside directions of data: tests/runs/test_away_from.py.
OF_DIRECTIONS = {"away_share"}
# Sections that need a package or a function of the user's; so do theirs.
ELSEWHERE = {"JsonSchema", "OwnReward"}


def options(kind: type[BaseModel]) -> Iterator[tuple[type[BaseModel], str]]:
    """Get (section, name) of every option, those of inner sections too."""
    for name, field in kind.model_fields.items():
        inner = list(_sections(field.annotation))
        yield from ((kind, name),) if not inner else (option for section in inner for option in options(section))


def _sections(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        yield from _sections(part)


@contextmanager
def recorded_reads() -> Iterator[set[tuple[type, str]]]:
    """Get a set that is filled with (section, name) of what is read in the block; checks on parsing are not readers."""
    found: set[tuple[type, str]] = set()
    parsing = [0]
    validated: Any = BaseModel.model_validate

    def read(section: Section, name: str) -> Any:
        if not parsing[0]:
            found.add((type(section), name))
        return object.__getattribute__(section, name)

    def parse(kind: type[Section], *args: Any, **kwargs: Any) -> Any:
        parsing[0] += 1
        try:
            return validated.__func__(kind, *args, **kwargs)
        finally:
            parsing[0] -= 1

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Section, "__getattribute__", read)
        patch.setattr(Section, "model_validate", classmethod(parse))
        yield found


def unread(kind: type[BaseModel], read: set[tuple[type, str]]) -> list[str]:
    left = [f"{section.__name__}.{name}" for section, name in options(kind) if (section, name) not in read]
    left = [name for name in left if name.split(".")[1] not in OF_DIRECTIONS]
    return [name for name in left if name not in REFUSED and name.split(".")[0] not in ELSEWHERE]


def hub_data(name: str, config: str | None, split: str) -> Any:
    """In place of the hub: eight rows of texts and pictures."""
    from datasets import ClassLabel, Dataset, Features, Image, Value

    words = {"text": Value("string"), "question": Value("string"), "answer": Value("string")}
    words |= dict.fromkeys(("prompt", "chosen", "rejected"), Value("string"))
    rows = [
        {"text": f"w{i}", "question": f"w{i}", "answer": f"#### {i % 2}", "image": tiny.picture(i), "label": i % 2}
        | {"prompt": f"w{i}", "chosen": "good", "rejected": "bad"}
        for i in range(8)
    ]
    features = Features({**words, "image": Image(), "label": ClassLabel(names=["no", "yes"])})
    return Dataset.from_list(rows, features=features)


@pytest.fixture(autouse=True)
def outside(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hub of data sets and lm-eval, without a network."""
    monkeypatch.setattr("datasets.load_dataset", hub_data)
    harness, wrapper = type(sys)("lm_eval"), type(sys)("lm_eval.models.huggingface")
    vars(harness)["simple_evaluate"] = lambda **told: {"results": {"arc": {"acc,none": 0.5}}}
    vars(wrapper)["HFLM"] = lambda **told: None
    tasks = type(sys)("lm_eval.tasks")
    vars(tasks)["TaskManager"] = lambda: SimpleNamespace(all_tasks=["arc"])
    parts = {"": harness, ".models": harness, ".models.huggingface": wrapper, ".tasks": tasks}
    for name, module in ((f"lm_eval{part}", module) for part, module in parts.items()):
        monkeypatch.setitem(sys.modules, name, module)


@pytest.mark.parametrize("recipe", list(RECIPES))
def test_a_run_reads_every_option(recipe: str, tmp_path: Path) -> None:
    assert recipe in RUNS, f"{recipe}: give its tiny runs in RUNS"
    told, overs = RUNS[recipe]
    read: set[tuple[type, str]] = set()
    for number, over in enumerate(overs):
        folder = tmp_path / str(number)
        folder.mkdir()
        config = parse_config(tiny.merged(told(folder, training=SHORT), over))
        with recorded_reads() as found:
            run(config, folder / "run")
        read |= found
    assert not unread(recipe_class(recipe).Config, read), unread(recipe_class(recipe).Config, read)


def test_a_sweep_reads_every_option(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Workers, "run", in_this_process)
    base = tiny.lm_run(tmp_path, training=SHORT, data={"validation": tiny.sums(tmp_path / "validation.jsonl", 4)})
    arm = {"adapter": base.pop("adapter"), "learning_rates": [base["training"].pop("learning_rate")]}
    (tmp_path / "a.txt").write_text("w1 w2 w3 w4 " * 10)
    read: set[tuple[type, str]] = set()
    for number, text in enumerate(({"file": str(tmp_path / "a.txt")}, {"hub": "a/set"})):
        sweep = parse_sweep({"run": base, "methods": {"one": arm}, "seeds": [0], "forgetting": text})
        with recorded_reads() as found:
            to_markdown(summarise(sweep, run_sweep(sweep, tmp_path / str(number), provenance={})))
        read |= found
    assert not unread(SweepConfig, read), unread(SweepConfig, read)
