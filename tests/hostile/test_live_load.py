"""Adapters from strangers, put onto a live model: by PEFT, by `load_attached`, and where an export begins."""

from __future__ import annotations

import copy
import json
import re
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.tuners_utils import check_target_module_exists
from torch import nn

from spectune import SpectralConfig
from spectune.errors import AdapterError, SpectuneError
from spectune.export.source import open_source
from spectune.tuner.attach import load_attached
from spectune.tuner.from_file import chosen_layers
from spectune.tuner.origin import Origin
from tests.effort import at_most
from tests.golden.make import Base
from tests.hostile.test_adapters import changed, with_config

# Quick for regex, which sees that there is no X; `re` goes through all the ways to cut a name into ones and twos.
ENDLESS = "(([a-z0-9_.]|[a-z0-9_.][a-z0-9_.])+)+X"
# Slow for both.
SLOW = "(([a-z0-9_.]|[a-z0-9_.][a-z0-9_.])+)+[XY]"
LONG = "a_layer_of_a_very_long_name_that_takes_a_very_long_time"
SECONDS = 60  # a pattern that nobody stops takes years


class Long(nn.Module):
    """A base whose second layer has a long name."""

    def __init__(self) -> None:
        super().__init__()
        self.lin0 = nn.Linear(8, 8)
        setattr(self, LONG, nn.Linear(8, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lin0(x)


HOSTILE: dict[str, dict[str, Any]] = {
    "target": {"target_modules": ENDLESS},
    "slow target": {"target_modules": SLOW},
    "exclude": {"target_modules": ["lin0"], "exclude_modules": ENDLESS},
    "slow exclude": {"target_modules": ["lin0"], "exclude_modules": SLOW},
    "saved": {"target_modules": ["lin0"], "modules_to_save": [ENDLESS]},
    "layers": {"target_modules": ["lin0", LONG], "layers_to_transform": [0], "layers_pattern": [f"{SLOW}|{ENDLESS}"]},
    "indices of lists": {"target_modules": ["lin0"], "layers_to_transform": [[0], {}, 1]},
    "rank": {"target_modules": ["lin0", LONG], "rank_pattern": {ENDLESS: 2}},
    "a later rank": {"target_modules": ["lin0"], "rank_pattern": {"lin0": 2, ENDLESS: 2, SLOW: 2}},
    "many": {"target_modules": ["lin0"], "modules_to_save": [f"{n}.*" for n in range(20_000)]},
    "many ranks": {"target_modules": ["lin0"], "rank_pattern": {f".{n}.*": 2 for n in range(20_000)}},
    "no pattern": {"target_modules": "("},
    "copies": {"target_modules": "((a{1000}){1000}){1000}"},
}


@pytest.mark.parametrize("case", HOSTILE)
@pytest.mark.parametrize("load", [PeftModel.from_pretrained, load_attached], ids=["peft", "load_attached"])
def test_a_hostile_pattern_of_a_file_does_not_hang_a_live_load(case: str, load: Any, tmp_path: Path) -> None:
    folder, refusal = changed("spectral_a", tmp_path / "adapter", with_config(**HOSTILE[case])), ""
    with at_most(SECONDS):
        try:
            get_peft_model_state_dict(load(Long(), str(folder)))  # which matches target_modules once more
        except SpectuneError as error:
            refusal = str(error)
    assert refusal.isprintable()


class Embedding(Base):
    """A base with a module of the names that PEFT holds against target_modules when it saves."""

    def __init__(self) -> None:
        super().__init__()
        setattr(self, LONG, nn.ModuleDict({"embed_tokens": nn.Embedding(2, 2)}))


def test_a_pattern_that_chooses_layers_does_not_hang_when_peft_saves(tmp_path: Path) -> None:
    pattern = ENDLESS.replace("+X", "*lin[01]")  # regex sees that other names have no "lin"
    folder = changed("spectral_a", tmp_path / "adapter", with_config(target_modules=pattern))
    with at_most(SECONDS):
        model = PeftModel.from_pretrained(Embedding(), str(folder))
        assert model.peft_config["default"].target_modules == {"lin0", "lin1"}
        model.save_pretrained(tmp_path / "again")


def bert(path: Path) -> nn.Module:
    torch.manual_seed(0)
    config = tf.BertConfig(
        vocab_size=16, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8
    )
    return tf.BertModel(config)


@pytest.mark.parametrize("pattern", [ENDLESS, SLOW])
def test_a_hostile_pattern_does_not_hang_where_an_export_begins(pattern: str, tmp_path: Path) -> None:
    base = bert(tmp_path)
    folder = tmp_path / "adapter"
    get_peft_model(copy.deepcopy(base), SpectralConfig(r=2, target_modules=["query"])).save_pretrained(folder)
    place = folder / "adapter_config.json"
    place.write_text(json.dumps({**json.loads(place.read_text()), "target_modules": pattern}))
    with at_most(SECONDS), pytest.raises(AdapterError, match=r"matches no layer|take more than"):
        open_source(folder, base, None)


HONEST: list[dict[str, Any]] = [
    {"target_modules": r".*layer\.\d\.attention\.self\.(query|value)"},
    {"target_modules": ["query", "0.attention.self.key"], "exclude_modules": ["query"]},
    {"target_modules": ["query", "key"], "exclude_modules": r".*\.1\..*"},
    {"target_modules": ["dense"], "modules_to_save": ["pooler"]},
    {"target_modules": ["query"], "layers_to_transform": [1]},
    {"target_modules": ["query"], "layers_to_transform": 0, "layers_pattern": "layer"},
    {"target_modules": ["query"], "layers_to_transform": [0], "layers_pattern": ["nothing", "lay.r"]},
    {"target_modules": ["query"], "layers_to_transform": []},
    {"target_modules": "all-linear"},
]


@pytest.mark.parametrize("options", HONEST, ids=str)
def test_an_honest_file_chooses_the_layers_that_peft_chooses(options: dict[str, Any], tmp_path: Path) -> None:
    config = tf.BertConfig(
        vocab_size=16, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=8
    )
    base = tf.BertModel(config)
    if options["target_modules"] != "all-linear":
        asked = SpectralConfig(r=2, **options)
        paths = [path for path, _ in base.named_modules() if path]
        assert (
            chosen_layers(asked, base) == {path for path in paths if check_target_module_exists(asked, path)} != set()
        )
    tuned = get_peft_model(copy.deepcopy(base), SpectralConfig(r=2, init_weights=False, **options))
    tuned.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path))
    for name, tensor in tuned.state_dict().items():
        assert torch.allclose(loaded.state_dict()[name], tensor, atol=1e-5), name
    loaded.save_pretrained(tmp_path / "again")
    PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / "again"))


class Many(nn.Module):
    """A base with many layers whose paths together are longer than any expression may be."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.ModuleDict({LONG: nn.Linear(2, 2), "up": nn.Linear(2, 2)}) for _ in range(60))


ALL_LONG = [f"blocks.{place}.{LONG}" for place in range(60)]
LISTED = "|".join(re.escape(path) for path in ALL_LONG)


@pytest.mark.parametrize(
    ("words", "excluded"),
    [
        (LISTED, None),
        (rf"blocks\.[0-3]\.up|{LISTED}", None),
        (f"(?:blocks.7.up|nothing)|{LISTED}", None),
        (f"(?i:BLOCKS.7.up)|{LISTED}", None),
        (rf"x\|{LISTED}", None),
        (f".*{LONG}|.*up", rf"(?:.*\.)?up|{LISTED.rpartition('|')[0]}"),
    ],
)
def test_a_long_list_of_paths_is_read_as_peft_reads_it(words: str, excluded: str | None) -> None:
    model, asked = Many(), SpectralConfig(r=1, target_modules=words, exclude_modules=excluded)
    wanted = {path for path, _ in model.named_modules() if path and check_target_module_exists(asked, path)}
    if "(?i" in words:  # changes the letters that follow, so it is one expression, and longer than one may be
        with pytest.raises(AdapterError, match="as a pattern of layer names"):
            chosen_layers(asked, model)
    else:
        assert chosen_layers(asked, model) == wanted != set()


ABSURD: dict[str, tuple[str, dict[str, Any]]] = {
    "a rotation of 50,000": ("spectral_r", {"r": 50_000, "save_basis": "always"}),
    "a million directions": ("spectral_a", {"r": 2**20}),
    "a million, basis in the file": ("spectral_a-embedded", {"r": 2**20, "columns": "top", "save_basis": "always"}),
    "a rank of a million by pattern": ("spectral_a", {"rank_pattern": {"lin.*": 2**20}}),
    "a million random": ("lidb", {"r": 2**20}),
    "rows of a million": ("orthogonal_adaptation", {"r": 2**20}),
    "one direction more": ("spectral_a", {"r": 3}),
}


@pytest.mark.parametrize("case", ABSURD)
def test_a_live_load_allocates_nothing_that_the_file_does_not_bring(case: str, tmp_path: Path) -> None:
    golden, options = ABSURD[case]
    folder = changed(golden, tmp_path / "adapter", with_config(**options))
    before = Base().state_dict()
    model = Base()
    tracemalloc.start()
    try:
        with pytest.raises(AdapterError, match=r"the adapter file (has no tensor|does not fit)"):
            PeftModel.from_pretrained(model, str(folder))
        assert tracemalloc.get_traced_memory()[1] < 2**26
    finally:
        tracemalloc.stop()
    assert list(model.state_dict()) == list(before)


def test_a_live_load_makes_no_layers_that_the_file_does_not_bring(tmp_path: Path) -> None:
    """One honest layer is not the excuse for a hundred."""

    def without_lin1(config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if ".lin1." in name]:
            del tensors[name]

    with pytest.raises(AdapterError, match=r"^lin1: the adapter file has no tensor 'lin1.spectune_adapter.A_U'"):
        PeftModel.from_pretrained(Base(), str(changed("spectral_a", tmp_path / "adapter", without_lin1)))


def test_an_export_allocates_nothing_that_the_file_does_not_bring(tmp_path: Path) -> None:
    """transformers reads the config by itself, and tells nobody from where."""
    base, folder = bert(tmp_path), tmp_path / "adapter"
    get_peft_model(copy.deepcopy(base), SpectralConfig(r=2, target_modules=["query"])).save_pretrained(folder)
    place = folder / "adapter_config.json"
    place.write_text(json.dumps({**json.loads(place.read_text()), "r": 2**20}))
    with pytest.raises(AdapterError, match=r"the adapter file (has no tensor|does not fit)"):
        open_source(folder, base, None)


def test_a_config_is_held_to_its_file_once(tmp_path: Path) -> None:
    """What was loaded may be copied to another adapter when the file is gone."""
    folder = changed("svft", tmp_path / "adapter", with_config())
    model = PeftModel.from_pretrained(Base(), str(folder))
    (folder / "adapter_model.safetensors").unlink()
    model.base_model.add_weighted_adapter(["default"], [0.5], "other")
    assert model.peft_config["default"].origin == Origin(str(folder))
    assert model.peft_config["other"].origin == Origin()
