"""Figures do not depend on the road: train, resume, evaluate and report give the same ones, bit for bit."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from spectune.recipes import parse_config
from spectune.runs import load_run, look, measure, run, train_run
from spectune.training import Interrupted
from tests.concepts.concepts import concept_home, run_values

from ..recipes import tiny


def text(folder: Path) -> dict[str, Any]:
    return tiny.text_run(folder)


def scores(folder: Path) -> dict[str, Any]:
    """Correlations show the last bits of what the model says, shares of right answers do not."""
    values = tiny.text_run(folder)
    for name in ("train", "validation"):
        rows = "".join(f'{{"text": "w{i} w{i % 5}", "label": {i / 7}}}\n' for i in range(16))
        Path(values["data"][name]).write_text(rows)
    return values | {"problem": "regression"}


def concept(folder: Path) -> dict[str, Any]:
    pytest.importorskip("diffusers")
    home = concept_home(folder)
    return run_values(home, data={"validation": str(home / "dax")}, training={"steps": 6, "save_every": 2})


def language(folder: Path) -> dict[str, Any]:
    pytest.importorskip("trl")
    return tiny.lm_run(folder, training={"steps": 6, "save_every": 2})


LORA = {"peft_type": "LORA", "r": 2, "lora_dropout": 0.3}
ROADS = {
    "text classification": (text, None),
    "scores, a LoRA with dropout": (scores, LORA | {"target_modules": ["query"]}),
    "scores, every weight": (scores, "none"),
    "scores, the head alone": (scores, "head"),
    "language model": (language, None),
    "language model, a LoRA with dropout": (language, LORA | {"target_modules": ["q_proj"]}),
    "image classification": (tiny.image_run, None),
    "concept": (concept, None),
}


CASES = [*((road, "bfloat16") for road in ROADS), ("text classification", "float32"), ("language model", "float32")]


@pytest.mark.parametrize("road, precision", CASES)
def test_every_road_gives_the_same_figures(road: str, precision: str, tmp_path: Path) -> None:
    make, adapter = ROADS[road]
    values = make(tmp_path)
    values |= {"training": values["training"] | {"precision": precision}}
    if adapter == "head":
        del values["training"]["learning_rate"]
    config = parse_config(values | ({} if adapter is None else {"adapter": adapter}))
    trained = train_run(config, tmp_path / "run", looks=True)
    figures = trained.result.metrics
    assert figures and measure(*load_run(tmp_path / "run")) == figures
    again = look(trained.result, *load_run(tmp_path / "run"))
    assert again == trained.result

    def stop(step: int, steps: int, loss: float) -> None:
        if step == 3:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Interrupted):
        run(config, tmp_path / "parts", on_step=stop)
    assert run(config, tmp_path / "parts", resume=True).metrics == figures
    (tmp_path / "parts" / "result.json").unlink()
    assert run(config, tmp_path / "parts", resume=True).metrics == figures


def test_some_parts_alone_may_be_measured(tmp_path: Path) -> None:
    values = tiny.text_run(tmp_path)
    values["data"]["test"] = values["data"]["validation"]
    found = train_run(parse_config(values), tmp_path / "run", measures=["validation"])
    assert set(found.result.metrics) == {"validation"}
