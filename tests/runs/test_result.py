from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from spectune.errors import DataError
from spectune.runs import LayerSpectrum, Metric, RunResult, machine, versions

from ..pages.records import bare_record, full_record


def written(folder: Path, result: RunResult) -> RunResult:
    result.write(folder / "result.json")
    return RunResult.read(folder).model_copy(update={"folder": ""})


@pytest.mark.parametrize("result", [full_record(), bare_record()], ids=["full", "bare"])
def test_a_result_comes_back_from_its_file_as_it_was(result: RunResult, tmp_path: Path) -> None:
    assert written(tmp_path, result) == result


def test_a_run_that_diverged_is_kept_in_strict_json(tmp_path: Path) -> None:
    result = full_record(
        losses=[1.0, math.nan, math.inf],
        metrics={"test": {"perplexity": -math.inf}},
        compared=[Metric(name="perplexity", value=math.inf, share=False)],
        spectra=[LayerSpectrum(name="x", before=[2.0], after=[math.nan])],
    )
    back = written(tmp_path, result)
    json.loads((tmp_path / "result.json").read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert math.isnan(back.losses[1]) and back.losses[2] == math.inf
    assert back.compared[0].value == math.inf and math.isnan(back.spectra[0].after[0])
    assert back.metrics["test"]["perplexity"] == -math.inf


def test_a_config_may_hold_what_json_cannot(tmp_path: Path) -> None:
    result = bare_record(config={"path": Path("a"), "layers": (1, 2), "targets": {"v"}, "none": None})
    assert written(tmp_path, result).config == {"path": "a", "layers": [1, 2], "targets": ["v"], "none": None}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"format": 99}, "format"),
        ({"titel": "t"}, "titel: extra inputs are not permitted"),
        ({"losses": ["low"]}, "losses.0"),
        ({"losses": None}, "losses"),
        ({"sizes": [{"name": "x", "trained": 3}]}, "sizes.0"),
        ({"sizes": 7}, "sizes"),
        ({"validation_losses": [3]}, "validation_losses.0"),
        ({"updates": [{"name": "a", "moved": "x", "norm": 1}]}, "updates.0.moved"),
        ({"drawings": [{"caption": "a", "png": '"><script>'}]}, "drawings.0.png"),
    ],
)
def test_something_else_is_refused_in_one_line(change: dict[str, Any], said: str, tmp_path: Path) -> None:
    values = json.loads(bare_record().to_json())
    (tmp_path / "result.json").write_text(json.dumps(values | change))
    with pytest.raises(DataError, match=said) as caught:
        RunResult.read(tmp_path)
    assert "\n" not in str(caught.value) and "--resume" in str(caught.value)


@pytest.mark.parametrize("text", ["{", "[]", ""])
def test_what_is_no_result_at_all_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "result.json").write_text(text)
    with pytest.raises(DataError, match="this is not a RunResult"):
        RunResult.read(tmp_path)


@pytest.mark.parametrize("value", [-0.1, 87.5, math.nan])
def test_a_share_lies_between_zero_and_one(value: float) -> None:
    with pytest.raises(ValidationError, match="share=False"):
        Metric(name="accuracy", value=value)


def test_versions_and_machine_say_what_ran() -> None:
    found = versions("no-such-package-at-all")
    assert list(found) == ["python", "spectune", "torch", "peft", "transformers", "no-such-package-at-all"]
    assert found["no-such-package-at-all"] == "not installed" and found["torch"][0].isdigit()
    assert machine(device="x")["device"] == "x"
