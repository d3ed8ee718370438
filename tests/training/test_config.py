"""What a run is told: everything is used or refused, with the near miss."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from spectune.errors import OptionError
from spectune.recipes import RECIPES, commented_yaml, load_config, parse_config
from spectune.training.config import DataSection
from spectune.training.yaml_file import read_yaml, write_yaml

GOOD: dict[str, Any] = {
    "recipe": "text_classification",
    "model": "somewhere",
    "adapter": {"method": "spectral_a"},
    "data": {"train": "a.csv"},
    "training": {"steps": 5},
}


def written(folder: Path, text: str) -> Path:
    path = folder / "run.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"sed": 1}, r"sed: unknown key. Did you mean 'seed'\?"),
        (
            {"training": {"steps": 5, "learning_rte": 1}},
            r"training.learning_rte: unknown key. Did you mean 'learning_rate'",
        ),
        ({"training": {"lr": 1e-3}}, r"training.lr: unknown key. Did you mean 'learning_rate'\?"),
        (
            {"training": {"seed": 1}},
            "training.seed: unknown key. Write seed at the top of the file, outside of training",
        ),
        ({"output_dir": "x"}, "output_dir: unknown key. The folder stands on the command line: .* -o FOLDER"),
        ({"data": {"train": "a.csv", "max_token": 3}}, r"data.max_token: unknown key. Did you mean 'max_tokens'"),
        ({"training": {"steps": 5, "epochs": 1}}, "training: give either steps or epochs"),
        ({"training": {}}, "training: give either steps or epochs"),
        ({"training": {"steps": 0}}, "training.steps=0: input should be greater than 0"),
        ({"training": {"steps": 5, "schedule": "cosin"}}, "training.schedule='cosin'"),
        ({"data": {"train": "a", "validation": "b", "validation_share": 0.1}}, "both given"),
        (
            {"recipe": "text_clasification"},
            r"recipe 'text_clasification' does not exist. Did you mean 'text_classification'",
        ),
        ({"adapter": "non"}, "adapter"),
    ],
)
def test_a_wrong_configuration_is_refused(change: dict[str, Any], line: str) -> None:
    with pytest.raises(OptionError, match=line):
        parse_config(GOOD | change)


def test_a_missing_part_is_named() -> None:
    for name in ("model", "adapter", "training", "data"):
        with pytest.raises(OptionError, match=f"{name}: is missing"):
            parse_config({key: value for key, value in GOOD.items() if key != name})


def test_overrides_reach_the_configuration(tmp_path: Path) -> None:
    path = written(tmp_path, yaml.safe_dump(GOOD))
    overrides = ["training.learning_rate=1e-4", "data.limit.train=7", "adapter.r=3", "training.report_to=[tensorboard]"]
    config = load_config(path, overrides)
    assert config.training.learning_rate == 1e-4 and config.data.limit == {"train": 7}  # type: ignore[attr-defined]
    assert config.adapter_options == {"method": "spectral_a", "r": 3}
    assert config.training.report_to == ["tensorboard"]
    with pytest.raises(OptionError, match="Did you mean 'learning_rate'"):
        load_config(path, ["training.learning_rat=1"])
    with pytest.raises(OptionError, match="must be key=value"):
        load_config(path, ["training.steps"])
    with pytest.raises(OptionError, match="model is 'somewhere', which has no keys"):
        load_config(path, ["model.name=x"])


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("seed: 1\nseed: 2\n", "duplicate key 'seed'"),
        ("a: {b: 1, b: 2}\n", "duplicate key 'b'"),
        ("a: !!python/object/apply:os.system [ls]\n", "not YAML"),
        ("- 1\n", "keys with values are needed, but this is a list"),
        ("a: [\n", "not YAML"),
    ],
)
def test_a_hostile_or_ambiguous_file_is_refused(text: str, line: str, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=line):
        read_yaml(written(tmp_path, text))


def test_numbers_are_read_as_people_write_them(tmp_path: Path) -> None:
    read = read_yaml(written(tmp_path, "a: 1e-4\nb: 5E3\nc: 1.5e-2\nd: 12\ne: '1e-4'\nf: e4\n"))
    assert read == {"a": 1e-4, "b": 5e3, "c": 1.5e-2, "d": 12, "e": "1e-4", "f": "e4"}


@pytest.mark.parametrize("recipe", list(RECIPES))
def test_the_commented_example_is_a_run_and_shows_every_option(recipe: str, tmp_path: Path) -> None:
    text = commented_yaml(recipe)
    config = load_config(written(tmp_path, text))
    assert config.recipe == recipe
    # Every option behind a '#' is one that exists, with its default: taken in, the run is the same.
    lines = [line.replace("# ", "", 1) if line.lstrip().startswith("# ") else line for line in text.splitlines()[1:]]
    assert load_config(written(tmp_path, "\n".join(lines))) == config


def test_the_examples_are_runs() -> None:
    folder = Path(__file__).parents[2] / "examples"
    found = [load_config(path) for path in sorted(folder.glob("*.yaml")) if path.name != "sweep.yaml"]
    assert {config.recipe for config in found} >= {"text_classification", "causal_lm", "image_classification"}


@pytest.mark.parametrize(
    "line",
    [
        "a: 2001-99-99", "a: !!int x", "a: !!bool x", "a: !!timestamp x", "a: " + "9" * 5000,
        "a: &x [1]\nb: [*x, *x]", "? [1]\n: 2",
    ],
    ids=["date", "int", "bool", "timestamp", "digits", "alias", "list as key"],
)  # fmt: skip
def test_what_the_yaml_reader_trips_over_is_one_line(tmp_path: Path, line: str) -> None:
    (tmp_path / "run.yaml").write_text(line)
    with pytest.raises(OptionError, match="this is not YAML") as refused:
        read_yaml(tmp_path / "run.yaml")
    assert len(str(refused.value).splitlines()) == 1


def test_many_keys_are_read_in_no_time_that_grows_with_their_square(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("".join(f"k{i}: 1\n" for i in range(20_000)))
    assert len(read_yaml(tmp_path / "run.yaml")) == 20_000


def test_a_split_of_the_hub_stays_a_name_also_beside_a_folder_of_that_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "train").mkdir()
    monkeypatch.chdir(tmp_path)
    assert DataSection.model_validate({"hub": "openai/gsm8k", "train": "train"}).train == "train"
    assert DataSection.model_validate({"train": "train"}).train == str(tmp_path / "train")


@pytest.mark.parametrize(("length", "override"), [({"epochs": 3}, "steps=2"), ({"steps": 3}, "epochs=2")])
def test_a_length_over_the_file_replaces_the_files(length: dict[str, int], override: str, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    values = {"recipe": "text_classification", "model": "m", "adapter": "none", "data": {"train": "a"}}
    path.write_text(write_yaml(values | {"training": length}))
    name, value = override.split("=")
    told = load_config(path, [f"training.{override}"]).training
    assert getattr(told, name) == int(value) and getattr(told, next(iter(length))) is None
    with pytest.raises(OptionError, match="give either steps or epochs"):
        load_config(path, ["training.steps=1", "training.epochs=1"])
