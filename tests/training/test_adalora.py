"""AdaLoRA's part of a step, which PEFT leaves to whoever trains."""

from __future__ import annotations

from pathlib import Path

import pytest

from spectune.recipes import parse_config
from spectune.runs import load_run, run
from tests.recipes import tiny


@pytest.mark.filterwarnings("ignore:The following rank_pattern keys:RuntimeWarning")  # PEFT's, on loading what it saved
def test_adalora_gives_up_ranks_as_told_and_is_found_again(tmp_path: Path) -> None:
    adapter = {"peft_type": "ADALORA", "target_modules": ["query", "value"], "init_r": 4, "target_r": 2}
    adapter |= {"total_step": 6, "tinit": 1, "tfinal": 2}
    config = parse_config(tiny.text_run(tmp_path, adapter=adapter, dropout=0.0))
    result = run(config, tmp_path / "run")
    recipe, model = load_run(tmp_path / "run")
    ranks = [sum(kept) for kept in model.peft_config["default"].rank_pattern.values()]  # type: ignore[union-attr,operator]
    assert sum(ranks) == 2 * len(ranks) == 8
    assert recipe.evaluate(model, "validation") == result.metrics["validation"]
