"""Whose config it is: a stranger's only when it was read from a file, and the user's own otherwise."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as tf
from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PeftConfig, PeftModel, get_peft_model

from spectune import SpectralConfig
from spectune.checkpoint.patterns import is_tame
from spectune.errors import OptionError
from spectune.tuner import build_adapter_config
from spectune.tuner.origin import Origin

REGEX = r".*layer\.\d\.attention\.self\.(query|value)"


def bert() -> tf.BertModel:
    torch.manual_seed(0)
    return tf.BertModel(
        tf.BertConfig(vocab_size=16, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=8)
    )


def own(**options: Any) -> SpectralConfig:
    return SpectralConfig(**{"r": 2, "target_modules": REGEX} | options)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    get_peft_model(bert(), own()).save_pretrained(folder)
    return folder


OWN: dict[str, Callable[[Path], SpectralConfig]] = {
    "written": lambda folder: own(),
    "replaced": lambda folder: replace(own(), r=3),
    "through a dict": lambda folder: SpectralConfig(**own().to_dict()),
    "through a dict, with its kind": lambda folder: SpectralConfig(**{**own().to_dict(), "peft_type": "SPECTUNE"}),
    "copied": lambda folder: copy.deepcopy(own()),
    "yaml": lambda folder: build_adapter_config({"method": "spectral_a", "target_modules": REGEX}),  # type: ignore
    "attached": lambda folder: get_peft_model(bert(), own()).peft_config["default"],
}
READ: dict[str, Callable[[Path], PeftConfig]] = {
    "SpectralConfig": lambda folder: SpectralConfig.from_pretrained(str(folder)),
    "PeftConfig": lambda folder: PeftConfig.from_pretrained(str(folder)),
    "PEFT's table": lambda folder: PEFT_TYPE_TO_CONFIG_MAPPING["SPECTUNE"].from_pretrained(str(folder)),  # type: ignore
    "PEFT, live": lambda folder: PeftModel.from_pretrained(bert(), str(folder)).peft_config["default"],
    "a changed copy": lambda folder: replace(SpectralConfig.from_pretrained(str(folder)), r=2),
    "a copy": lambda folder: copy.deepcopy(SpectralConfig.from_pretrained(str(folder))),
}


@pytest.mark.parametrize("road", OWN)
def test_what_was_not_read_is_the_user_s(road: str, saved: Path) -> None:
    assert OWN[road](saved).origin is None


@pytest.mark.parametrize("road", READ)
def test_what_was_read_is_a_stranger_s(road: str, saved: Path) -> None:
    config = READ[road](saved)
    assert type(config) is SpectralConfig and config.origin is not None
    assert isinstance(config, PEFT_TYPE_TO_CONFIG_MAPPING["SPECTUNE"])  # type: ignore[index]


def test_transformers_road_is_a_stranger_s(saved: Path) -> None:
    model = bert()
    model.load_adapter(str(saved))
    assert model.peft_config["default"].origin == Origin()


def test_a_reader_that_was_told_the_folder_keeps_it_and_a_changed_copy_does_not(saved: Path) -> None:
    read = SpectralConfig.from_pretrained(str(saved))
    assert read.origin == Origin(str(saved), saved)
    assert replace(read, r=2).origin == Origin()


@pytest.mark.parametrize("save_basis", ["auto", "always"])
def test_a_changed_copy_of_a_read_config_trains_anew(save_basis: str, tmp_path: Path) -> None:
    """It is not held to the tensors of the file, nor does it wait for its basis."""
    get_peft_model(bert(), own(save_basis=save_basis)).save_pretrained(tmp_path)
    model = get_peft_model(bert(), replace(SpectralConfig.from_pretrained(str(tmp_path)), r=3))
    model(input_ids=torch.ones(1, 3, dtype=torch.long))


@pytest.mark.parametrize(
    "attach",
    [
        lambda folder: get_peft_model(bert(), own()),
        lambda folder: get_peft_model(bert(), replace(own(), r=3)),
        lambda folder: get_peft_model(bert(), SpectralConfig(**own().to_dict())),
        lambda folder: PeftModel.from_pretrained(bert(), str(folder)),
    ],
    ids=["written", "replaced", "through a dict", "loaded"],
)
def test_a_regex_stays_a_regex(attach: Any, saved: Path, tmp_path: Path) -> None:
    model = attach(saved)
    assert model.peft_config["default"].target_modules == REGEX
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"] == REGEX
    layers = {path for path, module in model.named_modules() if hasattr(module, "spectune_adapter")}
    assert len(layers) == 4


def test_where_a_config_was_read_is_no_part_of_its_file(saved: Path) -> None:
    read = SpectralConfig.from_pretrained(str(saved))
    assert "origin" not in read.to_dict() and "origin" not in json.loads((saved / "adapter_config.json").read_text())
    assert read == replace(read)


@pytest.mark.parametrize("claimed", [{"place": "mine"}, "mine", True])
def test_a_file_cannot_say_where_it_comes_from(claimed: Any, tmp_path: Path) -> None:
    own().save_pretrained(str(tmp_path))
    place = tmp_path / "adapter_config.json"
    written = json.loads(place.read_text())
    place.write_text(json.dumps({**written, "origin": claimed}))
    with pytest.raises(OptionError, match="origin="):
        peft.PeftConfig.from_pretrained(str(tmp_path))
    place.write_text(json.dumps({**written, "origin": None}))
    assert peft.PeftConfig.from_pretrained(str(tmp_path)).origin is not None  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "pattern",
    [
        REGEX,
        "query",
        r"model\.layers\.(0|1|2)\.self_attn\.[qv]_proj",
        r".*\.layers\.(\d+)\..*\.(q|v)_proj",
        r"(?:encoder|decoder)?\.block\.[^.]+\.(wi|wo)",
        r"a\)*",
    ],
)
def test_patterns_that_people_write_are_tame(pattern: str) -> None:
    assert is_tame(pattern, 60)


@pytest.mark.parametrize(
    "pattern",
    [
        "(a+)+X",
        "((a|b))*X",
        "(?:a|a){1,99}X",
        ".*.*.*.*.*X",
        "(a|a)" * 28 + "X",
        "a?" * 28 + "a" * 28,
        "(?x)(a+) +X",
        "(?=a+)X",
        r"([)]|a+)+X",
        r"[\]](a+)+[x]",
        "a*" * 400,
    ],
)
def test_patterns_that_may_take_python_for_ever_are_wild(pattern: str) -> None:
    assert not is_tame(pattern, 60)


@pytest.mark.parametrize("read", [SpectralConfig.from_pretrained, PeftConfig.from_pretrained], ids=["ours", "PEFT's"])
def test_only_unknown_options_of_a_newer_file_are_named(read: Callable[[str], PeftConfig], tmp_path: Path) -> None:
    own().save_pretrained(str(tmp_path))
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"spam": 1, "foobar": "baz"}))
    with pytest.warns(
        UserWarning, match=r"^Unexpected keyword arguments \['foobar', 'spam'\] for class SpectralConfig,"
    ):
        config = read(str(tmp_path))
    assert config.to_dict() == own().to_dict()
