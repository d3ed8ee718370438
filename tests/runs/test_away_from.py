"""`training.away_from`: a run whose adapter leaves the inputs of other runs' tasks alone."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from spectune.adapter import spectral_modules
from spectune.errors import AdapterError, OptionError
from spectune.recipes import parse_config
from spectune.runs import drawn_examples, examples_of, run
from spectune.runs.remembered_pass import directions_said

from ..concepts.concepts import concept_run
from ..recipes import tiny
from .test_examples_first import HEAD_FIRST, OF_TEXT, built


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Get the folder of a run on the base that `text_run` makes there."""
    folder = tmp_path_factory.mktemp("away")
    run(parse_config(tiny.text_run(folder, training={"steps": 1})), folder / "run")
    return folder / "run"


def away(other: Path, share: float, **more: Any) -> dict[str, Any]:
    training = HEAD_FIRST["training"] | {"away_from": [str(other)], "away_share": share}
    return tiny.text_run(other.parent, adapter=OF_TEXT, training=training, **more)


def seen_share(recipe: Any, model: Any, batches: list[dict[str, Any]]) -> float:
    """Get which share of the energy of a layer's inputs an adapter reads."""
    path, _, module = next(iter(spectral_modules(model)))
    inputs: list[torch.Tensor] = []
    layer = model.get_submodule(path).base_layer
    watch = layer.register_forward_hook(lambda _, given, __: inputs.append(given[0].detach()))
    with torch.no_grad():
        for batch in batches:
            model.eval()(**batch)
    watch.remove()
    x_NI = torch.cat([x.flatten(0, -2)[mask.flatten() > 0] for x, mask in zip(inputs, masks(batches), strict=True)])
    return float((x_NI @ module.Vh_RI.float().mT).square().sum() / x_NI.square().sum())


def masks(batches: list[dict[str, Any]]) -> list[torch.Tensor]:
    return [batch["attention_mask"] for batch in batches]


def test_of_the_other_runs_inputs_the_adapter_reads_at_most_what_the_share_leaves(other: Path) -> None:
    plain = built(tiny.text_run(other.parent, adapter=OF_TEXT, **HEAD_FIRST))
    theirs = examples_of(other)
    assert seen_share(*plain, theirs) > 0.3
    for share in (0.5, 0.8):
        assert seen_share(*built(away(other, share)), theirs) < 1 - share + 1e-3


def test_the_cache_knows_directions_beside_other_runs_and_of_another_share(other: Path, tmp_path: Path) -> None:
    cached = OF_TEXT | {"svd": {"cache_dir": str(tmp_path / "cache")}}
    said = []
    for values in (HEAD_FIRST["training"], away(other, 0.5)["training"], away(other, 0.8)["training"]) * 2:
        keys = {name: value for name, value in values.items() if name in ("head_first", "away_from", "away_share")}
        said.append(directions_said(built(tiny.text_run(other.parent, adapter=cached, training=keys))[1]))
    assert [line.startswith("gradient (found in") for line in said] == [True] * 3 + [False] * 3, said
    assert ["away from 1 other run," in line for line in said] == [False, True, True, False, False, False], said


def test_each_process_looks_at_its_share(other: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, shares = parse_config(away(other, 0.5)), list[list[Any]]()
    for index in range(2):
        monkeypatch.setattr(
            drawn_examples, "join", lambda index=index: SimpleNamespace(process_index=index, num_processes=2)
        )
        shares.append([batch["input_ids"].tolist() for batch in drawn_examples.batches_of_others(config)])
    whole = [batch["input_ids"].tolist() for batch in examples_of(other)]
    assert all(shares) and sorted(shares[0] + shares[1]) == sorted(whole)


def test_what_cannot_keep_away_is_refused_before_any_work(other: Path, tmp_path: Path) -> None:
    for adapter in ({"method": "spectral_a", "r": 2}, "none", OF_TEXT | {"basis": "basis.safetensors"}):
        with pytest.raises(OptionError, match="away_from needs directions that this run finds in its examples"):
            parse_config(away(other, 0.5) | {"adapter": adapter})
    concept = concept_run(tmp_path / "concept", training={"away_from": [str(other)]})
    with pytest.raises(OptionError, match="away_from needs directions that this run finds in its examples"):
        parse_config(concept)
    with pytest.raises(OptionError, match="away_share needs away_from"):
        parse_config(tiny.text_run(tmp_path, training={"away_share": 0.5}))
    elsewhere = tiny.text_run(tmp_path, adapter=OF_TEXT, training={"head_first": True, "away_from": [str(other)]})
    with pytest.raises(OptionError, match="was trained on .* and this run trains .* Name runs on the same base"):
        built(elsewhere)
    with pytest.raises(AdapterError, match="this is not the folder of a run"):
        built(away(tmp_path, 0.5))


def test_runs_of_every_recipe_that_has_batches_give_examples(tmp_path: Path) -> None:
    """Also where only the model says what a batch is, as for pictures."""
    for make in (tiny.image_run, tiny.preference_run, tiny.reward_run):
        folder = tmp_path / make.__name__
        folder.mkdir()
        more = {"group_size": 2} if make is tiny.reward_run else {}
        run(parse_config(tiny.merged(make(folder, **more), {"training": {"steps": 1}})), folder / "run")
        (first, *_) = examples_of(folder / "run")
        assert "labels" not in first and all(len(tensor) for tensor in first.values())
