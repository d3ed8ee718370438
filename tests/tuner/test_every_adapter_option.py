"""No option under `adapter:` is ignored: it acts, or stands in the config of PEFT's method, or is refused."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import torch
from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PeftConfig
from torch import nn

from spectune import METHODS, SpectralConfig
from spectune.adapter import spectral_modules
from spectune.algebra import dense
from spectune.errors import OptionError, SpectuneError
from spectune.recipes import parse_config
from spectune.recipes.table import recipe_class
from spectune.runs import building
from spectune.spectrum import obtain
from spectune.tuner import attach, bases, build_adapter_config
from spectune.tuner.config import SVDOptions
from spectune.tuner.config_types import fits
from tests.recipes import tiny
from tests.recipes.other_values import other_values

Options = dict[str, Any]
TARGETS = ["wide", "tall"]
# PEFT's own part of every config: it stands there, and PEFT acts on it.
OF_PEFT = {field.name for field in dataclasses.fields(PeftConfig)}
# directions and a budget need examples (test_prepare.py, test_budget.py); a basis is a file (test_shared_basis.py).
OF_EMBEDDINGS = {
    "trainable_token_indices",
    "ensure_weight_tying",
}  # tests/tuner/test_peft_roads.py; there are none here
ELSEWHERE = {
    "method",
    "svd",
    "directions",
    "spectra",
    "budget",
    "budget_by",
    "basis",
    "basis_id",
    *OF_EMBEDDINGS,
    *OF_PEFT,
}
OWN_OPTIONS = [field.name for field in dataclasses.fields(SpectralConfig) if field.name not in ELSEWHERE]
OF_SVD = [field.name for field in dataclasses.fields(SVDOptions)]


class Blocks(nn.Module):
    """Two blocks of two weights that are not square, with biases and a norm."""

    def __init__(self) -> None:
        super().__init__()
        wide, tall = ((nn.Linear(8, 6), nn.Linear(6, 8)) for _ in range(2))
        pairs = zip(wide, tall, strict=True)
        self.layers = nn.ModuleList(nn.ModuleDict({"wide": a, "tall": b, "norm": nn.LayerNorm(8)}) for a, b in pairs)


def seen(options: Options) -> Any:
    """Get all that an adapter with these options shows: what the basis was asked for, tensors, updates, files."""
    asked: list[Any] = []

    def watched(weights: Any, request: Any, cache: Any, **more: Any) -> Any:
        asked.append({**vars(request), "share": more["share"]})
        return obtain(weights, request, cache, **more)

    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
        patch.chdir(folder)
        patch.setattr(bases, "obtain", watched)
        torch.manual_seed(0)
        model = attach(Blocks(), build_adapter_config(options)).train()
        tensors = [(name, p.requires_grad, p.tolist()) for name, p in model.named_parameters()]
        torch.manual_seed(1)
        trained = [p for p in model.parameters() if p.requires_grad]
        for p in trained:
            p.data += 0.1 * torch.randn(p.shape)
        modules = [module for _, _, module in spectral_modules(model)]
        updates = [dense(delta).tolist() for m in modules for delta in (m.training_delta(), m.training_delta())]
        kept = [(list(m.state_dict()), repr(m.dynamics)) for m in modules]
        return asked, tensors, updates, kept, sorted(str(path) for path in Path().rglob("*"))


@cache
def _plainly(options: str) -> Any:
    return seen(eval(options))


def base(method: str) -> Options:
    return {"method": method, "target_modules": TARGETS} | ({"r": 2} if "r" in METHODS[method].options() else {})


def values(method: str, name: str) -> list[Any]:
    """Get other values of an option of a spectral adapter; `svd.x` is one of the engine's."""
    kind = SVDOptions if name.startswith("svd.") else SpectralConfig
    field = {field.name: field for field in dataclasses.fields(kind)}[name.removeprefix("svd.")]
    default = base(method).get(name, getattr(SpectralConfig(method=method), name, field.default))
    found = other_values(get_type_hints(kind)[field.name], default, field.metadata["help"], ("wide", "norm", "layers"))
    return [{"svd": {field.name: value}} if kind is SVDOptions else {name: value} for value in found]


def situations(method: str, name: str) -> Iterator[Options]:
    """Get a method's options, then with each other one of them changed: some only act beside another."""
    yield base(method)
    for other in (*METHODS[method].options(), "layers_to_transform"):
        if other != name:
            yield from (base(method) | told for told in values(method, other))


def ignored_by(method: str, name: str) -> bool:
    """Ask whether an option is taken by a method and never acts; True as well where it is refused in the end."""
    refused = True
    for plain in situations(method, name):
        for told in values(method, name):
            try:
                changed = seen(plain | told) != _plainly(repr(plain))
            except ValueError:  # also what PEFT refuses while it attaches
                continue
            if changed:
                return False
            refused = False
    return not refused


@pytest.mark.filterwarnings("ignore:.* is more than some weights have and was lowered")
@pytest.mark.parametrize("method", list(METHODS))
def test_every_option_of_a_method_acts(method: str) -> None:
    assert seen(base(method)) == seen(base(method))
    assert [name for name in METHODS[method].options() if ignored_by(method, name)] == []


@pytest.mark.filterwarnings("ignore:.* is more than some weights have and was lowered")
@pytest.mark.parametrize("name", [*OWN_OPTIONS, *(f"svd.{name}" for name in OF_SVD)])
def test_an_option_of_every_method_acts_with_one(name: str) -> None:
    assert not all(ignored_by(method, name) for method in METHODS), f"{name} is taken and changes nothing"


class AttachedError(Exception):
    """In place of an adapter: its config."""


def attached(options: Options) -> PeftConfig:
    """Get the config that a run attaches; `OptionError` where it refuses the options."""
    values = {"recipe": "text_classification", "model": "m", "data": {"train": "t"}, "training": {"steps": 1}}
    config = parse_config(values | {"adapter": options})
    recipe = recipe_class(config.recipe)(config)

    def caught(model: nn.Module, config: PeftConfig) -> None:
        raise AttachedError(config)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recipe, "build_model", lambda: nn.Linear(2, 2))
        patch.setattr(recipe, "head", lambda model: ["classifier"])
        patch.setattr(building, "attach", caught)
        with pytest.raises(AttachedError) as found:
            building.build(recipe)
    return found.value.args[0]


def stands(config: PeftConfig, name: str, value: Any) -> bool:
    """Ask whether an option stands in a config; the recipe adds its head to what is saved."""
    found = _plain(getattr(config, name))
    if isinstance(value, dict):
        return isinstance(found, dict) and value.items() <= found.items()
    return set(value) <= set(found) if name == "modules_to_save" else found == _plain(value)


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    return sorted(value) if isinstance(value, set) else value


def simplest(kind: str) -> Options:
    """Get the least that a method of PEFT has to be told: nothing, or one option."""
    hints = get_type_hints(PEFT_TYPE_TO_CONFIG_MAPPING[kind])
    least: Options = {"peft_type": kind}
    one_more = ({name: value} for name, hint in hints.items() for value in other_values(hint, None))
    for more in chain([{}], one_more):
        with suppress(OptionError):
            attached(least | more)
            return least | more
    raise AssertionError(f"{kind}: no config of it can be made")


FOREIGN = [
    str(getattr(kind, "value", kind))
    for kind, config in PEFT_TYPE_TO_CONFIG_MAPPING.items()
    if config is not SpectralConfig
]


def test_every_option_of_any_method_stands_in_its_config_or_is_refused() -> None:
    ignored, tried, options = [], 0, 0
    for least in ({"method": "spectral_a"}, *map(simplest, FOREIGN)):
        plain = attached(least)
        hints = get_type_hints(type(plain))
        for field in dataclasses.fields(plain):
            options += 1
            for value in other_values(hints[field.name], _plain(getattr(plain, field.name))):
                with suppress(SpectuneError):
                    told = attached(least | {field.name: value})
                    ignored += [] if stands(told, field.name, value) else [f"{least}: {field.name}={value!r}"]
                    tried += 1
                    break
    assert ignored == []
    assert tried > 0.8 * options, f"values were found for {tried} of {options} options only"


@pytest.mark.parametrize(
    ("told", "words"),
    [
        ({"inference_mode": True}, "leaves nothing to train"),
        ({"eva_config": {"rho": 3.0}}, "eva has no effect without"),
        ({"corda_config": {"verbose": True}}, "corda has no effect without"),
        ({"lora_ga_config": {"scale": "gd"}}, "lora_ga has no effect without"),
        ({"arrow_config": {"top_k": 2}}, "arrow has no effect without"),
        ({"init_lora_weights": "eva"}, "which spectune does not call"),
        ({"init_lora_weights": "corda"}, "which spectune does not call"),
        ({"init_lora_weights": "lora_ga"}, "which spectune does not call"),
        ({"loftq_config": {"loftq_bits": 8}}, "will be ignored"),
        ({"base_model_name_or_path": "x"}, "comes from the model"),
    ],
)
def test_what_peft_would_leave_without_effect_is_refused(told: Options, words: str, tmp_path: Path) -> None:
    adapter = {"peft_type": "LORA", "target_modules": ["query"]} | told
    values = tiny.text_run(tmp_path, adapter=adapter)
    with pytest.raises(OptionError, match=words):
        building.build(recipe_class(values["recipe"])(parse_config(values)))


@pytest.mark.parametrize("kind", sorted(str(getattr(kind, "value", kind)) for kind in PEFT_TYPE_TO_CONFIG_MAPPING))
def test_what_peft_has_by_default_fits_what_it_annotates(kind: str) -> None:
    """Else a type would be refused that PEFT itself uses."""
    config = next(c for k, c in PEFT_TYPE_TO_CONFIG_MAPPING.items() if str(getattr(k, "value", k)) == kind)
    hints = get_type_hints(config)
    for field in dataclasses.fields(config):
        default = field.default
        assert default in (None, dataclasses.MISSING) or fits(default, hints[field.name]), field.name


WRONG_TYPES: list[Options] = [
    {"r": [1, 2]}, {"r": True}, {"r": 8.5}, {"r": "8"}, {"lora_dropout": [0.1]}, {"lora_alpha": "x"},
    {"use_rslora": "yes"}, {"target_modules": 3}, {"target_modules": [1]}, {"init_lora_weights": 3},
    {"rank_pattern": [1]},
]  # fmt: skip


@pytest.mark.parametrize("told", WRONG_TYPES, ids=str)
def test_a_wrong_type_in_an_option_of_pefts_is_refused(told: Options) -> None:
    with pytest.raises(OptionError, match=rf"adapter: LORA: {next(iter(told))}=.* is of the type .* is needed"):
        build_adapter_config({"peft_type": "LORA", "target_modules": ["q"]} | told)


RIGHT_TYPES: list[Options] = [
    {"lora_alpha": 0.5}, {"lora_dropout": 0}, {"init_lora_weights": "pissa_niter_4"}, {"init_lora_weights": False},
    {"layers_to_transform": [0, 1]}, {"target_modules": "all-linear"}, {"rank_pattern": {"q": 3}},
]  # fmt: skip


@pytest.mark.parametrize("told", RIGHT_TYPES, ids=str)
def test_what_peft_takes_is_taken(told: Options) -> None:
    build_adapter_config({"peft_type": "LORA", "target_modules": ["q"]} | told)


def test_a_number_that_peft_overwrites_is_refused() -> None:
    with pytest.raises(OptionError, match="num_virtual_tokens=5 has no effect: CPT always sets it to 1"):
        build_adapter_config({"peft_type": "CPT", "task_type": "CAUSAL_LM", "num_virtual_tokens": 5})
