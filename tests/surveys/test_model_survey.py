"""What a model survey says, against torch's SVD of the live weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from spectune.errors import AdapterError, OptionError, WeightError
from spectune.surveys import group_figures, survey_model
from spectune.surveys.model_survey import JSON_POINTS, points

from ..models import MODELS


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("bert")
    MODELS["bert"].fresh().save_pretrained(str(place))  # type: ignore[operator]
    return place


def test_every_weight_has_the_spectrum_of_the_live_one(folder: Path) -> None:
    survey, live = survey_model(folder, 4, quick=True), MODELS["bert"].fresh()
    assert len(survey.weights) == survey.targets == 13  # six in each block, and the pooler
    for weight in survey.weights:
        W_OI = live.get_submodule(weight.name).weight
        assert isinstance(W_OI, torch.Tensor) and weight.shape == W_OI.shape
        W_OI = W_OI.detach()
        S_K = torch.linalg.svdvals(W_OI.double())
        torch.testing.assert_close(torch.tensor(weight.values, dtype=torch.float64), S_K, rtol=1e-8, atol=1e-8)
        assert weight.figures["energy_at_r"] == pytest.approx(float((S_K[:4] ** 2).sum() / (S_K**2).sum()))
    assert survey.model_numbers == sum(p.numel() for p in live.parameters())
    assert survey.target_numbers == sum(w.shape[0] * w.shape[1] for w in survey.weights)


def test_kinds_are_summed_up_over_the_blocks(folder: Path) -> None:
    survey = survey_model(folder, 4, quick=True)
    rows = {row["group"]: row for row in group_figures(survey)}
    assert rows["query"]["count"] == 2 and rows["intermediate.dense"]["shapes"] == [[48, 32]]
    queries = [w.figures["stable_rank"] for w in survey.weights if w.group == "query"]
    assert rows["query"]["stable_rank"] == pytest.approx(sum(queries) / 2)


def test_a_sample_looks_at_some_and_counts_all(folder: Path) -> None:
    seen: list[tuple[int, int, str]] = []
    whole = survey_model(folder, 4, quick=True)
    survey = survey_model(folder, 4, sample=1, quick=True, on_layer=lambda *said: seen.append(said))
    assert len(survey.weights) == 7 and survey.targets == 13 and survey.budget == whole.budget
    assert [done for done, _, _ in seen] == list(range(8)) and seen[-1] == (7, 7, "")
    with pytest.raises(OptionError, match="--sample 0"):
        survey_model(folder, sample=0)


def test_times_are_estimated_unless_quick(folder: Path) -> None:
    assert {row.decompose_seconds for row in survey_model(folder, 4, quick=True).budget} == {None, 0.0}
    seconds = {row.method: row.decompose_seconds for row in survey_model(folder, 4, include="query").budget}
    assert seconds["lora"] == seconds["lidb"] == 0.0
    assert all((seconds[name] or 0) > 0 for name in ("spectral_a", "svft", "svft banded", "specadapt"))


def test_json_is_plain_and_thins_long_spectra(folder: Path) -> None:
    said = json.loads(json.dumps(survey_model(folder, 4, quick=True).to_json(), allow_nan=False))
    assert said["kind"] == "model" and len(said["weights"]) == 13 and len(said["budget"]) == 11
    assert said["weights"][0]["spectrum"][0][0] == 1 and said["left_out"]
    long = points([float(5000 - i) for i in range(5000)])
    assert len(long) <= JSON_POINTS and long[0] == (1, 5000.0) and long[-1] == (5000, 1.0)


def test_a_weight_with_nan_and_a_folder_without_a_model_are_named(tmp_path: Path) -> None:
    save_file({"l.q.weight": torch.full((3, 3), float("nan"))}, tmp_path / "m.safetensors")
    with pytest.raises(WeightError, match=r"l\.q: .*NaN"):
        survey_model(tmp_path)
    with pytest.raises(AdapterError, match="a model is needed, but there is no such folder or file"):
        survey_model(tmp_path / "nowhere")
