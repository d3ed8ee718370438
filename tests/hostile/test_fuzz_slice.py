"""A slice of the fuzzing campaign: the same targets and mutations as `fuzz/`, some hundred inputs of each."""

from __future__ import annotations

import importlib
import json
import random
import sys
from pathlib import Path
from typing import Any

import pytest

FUZZ = Path(__file__).parents[2] / "fuzz"
INPUTS = 200
# A whole GGUF file makes transformers build a model; its header has a target of its own. Run files are the recipes'.
NAMES = (
    "tensor_file",
    "tensor_header",
    "json_file",
    "index_file",
    "method_config",
    "spectral_config",
    "spectral_header",
    "spectral_file",
    "lora_config",
    "lora_header",
    "lora_file",
    "cache_header",
    "cache_entry",
    "gguf_header",
)


@pytest.fixture(scope="module")
def fuzz() -> Any:
    sys.path.insert(0, str(FUZZ))
    try:
        yield importlib.import_module("targets"), importlib.import_module("mutate")
    finally:
        sys.path.remove(str(FUZZ))


# PEFT under it takes ten times as long for one input.
LIVE = ("live_config", "live_header")


DATA = (
    "data_csv", "data_tsv", "data_json", "data_jsonl", "data_gz", "data_gz_inside",
    "data_parquet", "data_parquet_footer", "data_parquet_pages",
)  # fmt: skip


@pytest.mark.parametrize("name", [*NAMES, *LIVE, *DATA])
def test_mutated_files_end_in_one_clear_error(name: str, fuzz: Any) -> None:
    targets, mutate = fuzz
    if name.startswith("gguf"):
        pytest.importorskip("gguf")
    target = targets.all_targets()[name]
    random_ = random.Random(20_240_522)
    for data in target.seeds:
        targets.judge(target, data)
    for _ in range(INPUTS):
        data = mutate.mutate(random_.choice(target.seeds), random_)
        targets.judge(target, data)  # any other error than a SpectuneError goes through, and fails here


def test_the_recorded_campaign_ran_a_million_inputs_and_left_nothing_open() -> None:
    recorded = json.loads((FUZZ / "results.json").read_text())
    assert recorded["inputs"] == sum(run["inputs"] for run in recorded["runs"]) >= 1_000_000
    assert {run["target"] for run in recorded["runs"]} >= set(NAMES)
    assert [run for run in recorded["runs"] if run["findings"] and run["target"] in NAMES] == []


def test_what_ran_after_the_campaign_left_nothing_open_either() -> None:
    recorded = json.loads((FUZZ / "later_results.json").read_text())
    assert {run["target"] for run in recorded["runs"]} >= {*LIVE, *DATA}
    assert [run for run in recorded["runs"] if run["findings"]] == []
    assert f"{sum(run['inputs'] for run in recorded['runs']):,} inputs" in (
        FUZZ.parent / "docs" / "reliability.md"
    ).read_text("utf-8")
