"""Model cards: what a run says of itself, escaped, without the paths of this machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from peft import get_peft_model

from spectune import SpectralConfig, export_lora, merge_checkpoint
from spectune.export.card import write_run_card
from spectune.export.card_run import result_lines
from spectune.export.card_words import BaseSaid, plain

from ..models import MODELS

RESULT: dict[str, Any] = {
    "task": "causal_lm on Tiny",
    "method": "spectral_a",
    "config": {
        "recipe": "causal_lm",
        "model": "someone/Tiny",
        "seed": 7,
        "adapter": {"method": "spectral_a", "r": 8, "target_modules": ["q_proj"], "core": None},
        "data": {"hub": "openai/gsm8k", "hub_config": "main", "train": "train", "test": "test", "limit": {"train": 64}},
        "training": {"batch_size": 4, "gradient_accumulation": 2, "precision": "float32"},
    },
    "metrics": {"test": {"gsm8k": 0.125, "loss": 1.5}},
    "losses": [2.0, 1.5, 1.0],
    "learning_rate": 0.002,
    "trainable": 12345,
    "versions": {"spectune": "0.1", "timm": "not installed"},
}


def card(folder: Path, **changes: Any) -> tuple[dict[str, Any], str]:
    folder.mkdir(exist_ok=True)
    write_run_card(folder, {**RESULT, **changes})
    return read(folder)


def read(folder: Path) -> tuple[dict[str, Any], str]:
    text = (folder / "README.md").read_text(encoding="utf-8")
    _, front, body = text.split("---\n", 2)
    return yaml.safe_load(front), body


def test_a_runs_card_says_how_it_was_made(tmp_path: Path) -> None:
    front, body = card(tmp_path / "adapter")
    assert front == {
        "base_model": "someone/Tiny", "base_model_relation": "adapter", "datasets": ["openai/gsm8k"],
        "library_name": "peft", "license": "unknown", "metrics": ["gsm8k"], "pipeline_tag": "text-generation",
        "tags": ["spectune", "peft", "spectral_a"],
    }  # fmt: skip
    for row in (
        "| data | openai/gsm8k (main, train, test) |",
        "| options | r=8, target\\_modules=q\\_proj |",
        "| trained numbers | 12,345 |",
        "| batch | 4 × 2 |",
        "| learning rate | 0.002 |",
        "| seed | 7 |",
        "| steps | 3 |",
        "| versions | spectune 0.1 |",
        "| test | gsm8k | 0.125 |",
    ):
        assert row in body, row
    assert "the spread over seeds is not known" in body and "forgot was not measured" in body
    for stack in ("PeftModel.from_pretrained", "**transformers**", "**vLLM**", "**llama.cpp**", "--to merged"):
        assert stack in body, stack
    assert "Fill in `license`" in body


def test_a_sweeps_spread_and_forgetting_are_told(tmp_path: Path) -> None:
    spread = {
        "seeds": [0, 1, 2],
        "rate": 0.002,
        "metrics": [("test", "gsm8k", 0.12, 0.01, 3)],
        "forgetting": (0.05, 0.01),
    }
    text = "\n".join(result_lines(RESULT, spread))
    assert "| test | gsm8k | 0.12 | 0.01 | 3 |" in text and "rose by 0.05 ± 0.01 nats" in text
    assert "not known" not in text and "not measured" not in text


def test_a_diverged_run_and_missing_figures_are_said(tmp_path: Path) -> None:
    _, body = card(
        tmp_path / "adapter", metrics={}, diverged="the run diverged: NaN", unmeasured={"test": "out of memory"}
    )
    assert "Not evaluated." in body and "**The run diverged**" in body and "Not measured on test: out of memory" in body


def test_no_path_of_this_machine_is_in_a_card(tmp_path: Path) -> None:
    base = tmp_path / "secret-place" / "my-base"
    base.mkdir(parents=True)
    config = {
        **RESULT["config"],
        "model": str(base),
        "data": {"train": str(base / "train.csv"), "test": "C:\\me\\test.csv"},
    }
    front, body = card(tmp_path / "adapter", config=config)
    assert "base_model" not in front and "# my-base, fine-tuned" in body
    assert "| data | train: train.csv, test: test.csv |" in body and "secret-place" not in body and "C:" not in body


def test_words_of_strangers_break_neither_yaml_nor_markdown(tmp_path: Path) -> None:
    evil = 'x"\n---\nlicense: mit\n# Hi | <script> `code` \u202e\x1b[31m [a](b)'
    config = {**RESULT["config"], "model": evil, "data": {"hub": evil, "train": evil}}
    result = {"config": config, "method": evil, "task": evil, "metrics": {evil: {evil: 1.0}}, "versions": {evil: evil}}
    front, body = card(tmp_path / "adapter", **result)
    assert front["license"] == "unknown" and front["datasets"] == [evil] and "base_model" not in front
    assert "\x1b" not in body and "\u202e" not in body and "\n# Hi" not in body
    bare = body.replace("\\<", "").replace("\\`", "")
    assert not any(part in bare for part in ("<script", "`code", "[a](b)", "\n---\n"))
    rows = [line for line in body.splitlines() if line.startswith("| task")]
    assert len(rows) == 1 and rows[0].replace("\\|", "").count("|") == 3


@pytest.mark.parametrize(
    ("front", "wanted"),
    [
        ("license: apache-2.0", {"license": "apache-2.0"}),
        (
            "license: other\nlicense_name: mine\nlicense_link: L",
            {"license": "other", "license_name": "mine", "license_link": "L"},
        ),
        ("license: [a, b]", {}),
        ("license: 'evil\\nx: y'", {}),
        ("a: &a [*a]", {}),
        (": : :", {}),
        ("tags: []", {}),
    ],
)
def test_the_licence_is_the_bases_or_is_to_be_filled_in(front: str, wanted: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(f"---\n{front}\n---\n# base\n")
    assert BaseSaid.of("someone/base", tmp_path).licence == wanted
    assert (BaseSaid.of("someone/base", tmp_path).metadata["license"] == "unknown") == (not wanted)


def test_exports_of_a_run_carry_its_figures_on(tmp_path: Path) -> None:
    model: Any = MODELS["llama"].fresh()
    model.save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "README.md").write_text("---\nlicense: mit\n---\n")
    live: Any = get_peft_model(model, SpectralConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    live.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    live.save_pretrained(tmp_path / "run" / "adapter")
    (tmp_path / "run" / "result.json").write_text(json.dumps(RESULT))
    export_lora(tmp_path / "run" / "adapter", tmp_path / "lora")
    merge_checkpoint(None, tmp_path / "run" / "adapter", tmp_path / "merged")
    for folder, library, relation in (("lora", "peft", "adapter"), ("merged", "transformers", "finetune")):
        front, body = read(tmp_path / folder)
        assert (front["library_name"], front["base_model_relation"], front["license"]) == (library, relation, "mit")
        assert "| test | gsm8k | 0.125 |" in body and str(tmp_path) not in body and "mit, as the base's card" in body
    assert plain("a*b") == "a\\*b"


def test_a_base_without_a_name_takes_no_licence_from_where_one_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n")
    monkeypatch.chdir(tmp_path)
    front, body = card(tmp_path / "adapter", config={**RESULT["config"], "model": ""})
    assert front["license"] == "unknown" and "# a model, fine-tuned" in body
