"""LoRAs of strangers put onto a live model by our doors: their patterns reach no `re`, their counts no loop."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from peft import LoHaConfig, LoraConfig, PeftModel, get_peft_model
from torch import nn

from spectune.checkpoint import patterns, read_adapter_folder
from spectune.errors import AdapterError, SpectuneError
from spectune.export.source import _load
from spectune.tuner import attach, load_attached, load_beside
from tests.hostile.test_live_load import ENDLESS, SLOW

LONG = "query_of_a_very_long_name_that_takes_a_very_long_time"


def bert() -> Any:
    torch.manual_seed(0)
    return tf.BertModel(
        tf.BertConfig(vocab_size=16, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=8)
    )


def long() -> Any:
    """A base with a layer whose name `re` would take for ever to match."""
    base = bert()
    setattr(base, LONG, nn.Linear(8, 8))
    return base


def saved(folder: Path, config: Any, base: Any = None, **changes: Any) -> Path:
    """An adapter with random numbers and something done to its config."""
    torch.manual_seed(1)
    model = get_peft_model(base or bert(), config)
    for name, parameter in model.named_parameters():
        if "lora_" in name or "hada_" in name:
            nn.init.normal_(parameter)
    model.save_pretrained(folder)
    place = folder / "adapter_config.json"
    place.write_text(json.dumps({**json.loads(place.read_text()), **changes}))
    return folder


HOSTILE: dict[str, dict[str, Any]] = {
    "target": {"target_modules": ENDLESS},
    "slow target": {"target_modules": SLOW},
    "exclude": {"exclude_modules": ENDLESS},
    "slow exclude": {"exclude_modules": SLOW},
    "saved": {"modules_to_save": [ENDLESS]},
    "parameters": {"target_parameters": [ENDLESS]},
    "layers": {"layers_to_transform": [0], "layers_pattern": [f"{SLOW}|{ENDLESS}"]},
    "rank": {"target_modules": ["query", LONG], "rank_pattern": {ENDLESS: 2}},
    "slow rank": {"target_modules": ["query", LONG], "rank_pattern": {SLOW: 2}},
    "alpha": {"target_modules": ["query", LONG], "alpha_pattern": {SLOW: 2}},
    "many alphas": {"alpha_pattern": {f".{n}.*": 2 for n in range(20_000)}},
    "no pattern": {"target_modules": "("},
    "copies": {"target_modules": "((a{1000}){1000}){1000}"},
    "a number for names": {"target_modules": 3},
    "numbers as names": {"target_modules": [3]},
    "a map for names": {"exclude_modules": {"a": 1}},
    "a list for ranks": {"rank_pattern": ["query"]},
    "a text for a rank": {"rank_pattern": {"query": "2"}},
    "r of a billion": {"r": 10**9},
    "a rank of a billion": {"rank_pattern": {"query": 10**9}},
    "r is a text": {"r": "2"},
    "iterations without end": {"init_lora_weights": "pissa_niter_1000000000"},
    "LoftQ without end": {"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4, "loftq_iter": 10**12}},
    "layers without end": {"layer_replication": [[0, 2]] * 100_000},
    "excluded from everything": {"target_modules": "all-linear", "exclude_modules": ENDLESS},
}


# `regex` sees at once that these match nothing.
HARMLESS = ("exclude", "rank")


@pytest.fixture
def no_re(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hostile pattern given to `re` fails at once; with `re` itself the test would hang."""
    import re

    for name in ("match", "fullmatch", "search"):
        honest = getattr(re, name)

        def watched(pattern: Any, *rest: Any, honest: Any = honest, **more: Any) -> Any:
            words = pattern if isinstance(pattern, str) else getattr(pattern, "pattern", "")
            assert not (isinstance(words, str) and (ENDLESS in words or SLOW in words)), "re was given the pattern"
            return honest(pattern, *rest, **more)

        monkeypatch.setattr(re, name, watched)
    monkeypatch.setattr(patterns, "SECONDS", 0.2)


def beside(folder: Path) -> None:
    load_beside(attach(long(), LoraConfig(r=2, target_modules=["key"])), folder, "second")


DOORS: dict[str, Callable[[Path], Any]] = {
    "load_attached": lambda folder: load_attached(long(), folder),
    "beside": beside,
    "export": lambda folder: _load(long(), read_adapter_folder(folder)),
}


@pytest.mark.parametrize("case", HOSTILE)
@pytest.mark.parametrize("door", DOORS)
def test_a_hostile_lora_is_one_line(case: str, door: str, tmp_path: Path, no_re: None) -> None:
    folder = saved(tmp_path / "lora", LoraConfig(r=2, target_modules=["query"]), **HOSTILE[case])
    refusal = None
    try:
        DOORS[door](folder)
    except SpectuneError as error:
        refusal = str(error)
        assert refusal.isprintable()
    assert (refusal is None) == (case in HARMLESS)


HONEST: list[Any] = [
    LoraConfig(r=2, target_modules=["query", "key"], rank_pattern={"key": 4}, alpha_pattern={r"layer\.1.*key": 3}),
    LoraConfig(r=2, target_modules=r".*layer\.\d\.attention\.self\.(query|value)"),
    LoraConfig(r=2, target_modules=["query", "dense"], exclude_modules=["attention.output.dense"]),
    LoraConfig(r=2, target_modules=["query"], layers_to_transform=[1], layers_pattern="layer"),
    LoraConfig(r=2, target_modules="all-linear", use_rslora=True, rank_pattern={"^pooler.dense": 3}),
    LoraConfig(r=2, target_modules=["query"], modules_to_save=["pooler"]),
    LoraConfig(r=2, target_modules=["word_embeddings"]),
    LoHaConfig(r=2, target_modules=["query"], exclude_modules=r".*\.0\..*"),
]


@pytest.mark.parametrize("config", HONEST, ids=range(len(HONEST)))
def test_an_honest_adapter_is_loaded_as_peft_loads_it(config: Any, tmp_path: Path) -> None:
    folder = saved(tmp_path / "lora", config)
    theirs = PeftModel.from_pretrained(bert(), str(folder)).eval()
    ours = load_attached(bert(), folder).eval()
    ids = torch.arange(8)[None]
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], tensor), name
    assert torch.equal(ours(input_ids=ids).last_hidden_state, theirs(input_ids=ids).last_hidden_state)
    if isinstance(config, LoraConfig):
        second = attach(copy.deepcopy(bert()), LoraConfig(r=2, target_modules=["query"]))
        load_beside(second, folder, "second")
        second.set_adapter("second")
        found = second.eval()(input_ids=ids).last_hidden_state
        assert torch.equal(found, theirs(input_ids=ids).last_hidden_state)


def test_a_pickled_lora_is_refused(tmp_path: Path) -> None:
    folder = saved(tmp_path / "lora", LoraConfig(r=2, target_modules=["query"]))
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(AdapterError, match="is a pickle"):
        load_attached(bert(), folder)
