"""A slice of the fuzzing campaign: the same targets and mutations as `fuzz/`, some hundred inputs of each."""

from __future__ import annotations

import importlib
import json
import random
import re
import sys
from collections import Counter
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


def test_every_target_has_its_slice(fuzz: Any) -> None:
    targets, _ = fuzz
    assert set(targets.all_targets()) - {*NAMES, *LIVE, *DATA} == {"gguf_file", "yaml_file"}


def test_the_page_says_what_the_campaigns_recorded() -> None:
    page = (FUZZ.parent / "docs" / "reliability.md").read_text("utf-8")
    first, later = (json.loads((FUZZ / name).read_text())["runs"] for name in ("results.json", "later_results.json"))
    inputs: Counter[str] = Counter()
    for run in first:
        inputs[run["target"]] += run["inputs"]
    table = page.partition("| target | inputs |")[2].partition("\n\n")[0]
    said = dict(re.findall(r"^\| `(\w+)` \| ([\d,]+) \|", table, re.MULTILINE))
    assert said == {target: f"{count:,}" for target, count in inputs.items()}
    for runs in (first, later):
        assert f"{sum(run['inputs'] for run in runs):,} inputs" in page
    left = {run["target"] for run in (*first, *later) if run["findings"]}
    assert all(f"(`{target}`)" in page for target in left), f"the page is silent on what is left of {left}"
