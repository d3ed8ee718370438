from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from spectune.errors import DataError, OptionError
from spectune.runs import LayerSpectrum, Metric, RunRecord, machine, versions

from ..pages.records import full_record


def test_a_record_comes_back_from_json_as_it_was() -> None:
    record = full_record()
    assert RunRecord.from_json(record.to_json()) == record


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"validation": [3]}', "validation holds 3, a step and a loss were expected"),
        ('{"updates": [{"name": "a", "moved": "x", "norm": 1}]}', "updates holds 'x', which is no number"),
    ],
)
def test_a_record_whose_parts_are_wrong_is_refused(text: str, said: str) -> None:
    whole = '{"format": 1, "title": "t", "task": "t", "method": "m", ' + text[1:]
    with pytest.raises(DataError, match=said):
        RunRecord.from_json(whole)


def test_a_bare_record_comes_back_too() -> None:
    record = RunRecord("title", "task", "svft")
    assert RunRecord.from_json(record.to_json()) == record


def test_a_run_that_diverged_is_kept_in_strict_json() -> None:
    record = replace(
        full_record(),
        loss=[1.0, math.nan, math.inf],
        metrics=[Metric("perplexity", math.inf, share=False)],
        spectra=[LayerSpectrum("x", [2.0], [math.nan])],
    )
    text = record.to_json()
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    back = RunRecord.from_json(text)
    assert math.isnan(back.loss[1]) and back.loss[2] == math.inf
    assert back.metrics[0].value == math.inf and math.isnan(back.spectra[0].after[0])


def test_a_config_may_hold_what_json_cannot() -> None:
    record = replace(full_record(), config={"path": Path("a"), "layers": (1, 2), "targets": {"v", "q"}, 3: None})
    config = RunRecord.from_json(record.to_json()).config
    assert config == {"path": "a", "layers": [1, 2], "targets": ["q", "v"], "3": None}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "no JSON"),
        ("[]", "format"),
        ('{"format": 99}', "asked for format 1, found 99"),
        ('{"format": 1, "title": "t", "task": "t"}', "not whole"),
        ('{"format": 1, "titel": "t"}', "Did you mean 'title'"),
        ('{"format": 1, "sizes": [{"name": "x", "trained": 3}]}', "unknown key 'trained'"),
        ('{"format": 1, "sizes": [7]}', "a Size was expected"),
        ('{"format": 1, "sizes": 7}', "a list was expected"),
        ('{"format": 1, "loss": ["low"]}', "no number"),
        ('{"format": 1, "metrics": [{"name": "x", "value": "high"}]}', "no number"),
    ],
)
def test_something_else_is_refused(text: str, said: str) -> None:
    with pytest.raises(DataError, match=said):
        RunRecord.from_json(text)


@pytest.mark.parametrize("value", [-0.1, 87.5, math.nan])
def test_a_share_lies_between_zero_and_one(value: float) -> None:
    with pytest.raises(OptionError, match="share=False"):
        Metric("accuracy", value)


def test_versions_and_machine_say_what_ran() -> None:
    found = versions("no-such-package-at-all")
    assert list(found) == ["python", "spectune", "torch", "peft", "transformers", "no-such-package-at-all"]
    assert found["no-such-package-at-all"] == "not installed" and found["torch"] != "not installed"
    assert machine(device="cpu")["device"] == "cpu" and int(machine()["cpu_count"]) >= 1
