"""A run's merged folder loads by transformers alone, with the trained head and the right names of its classes."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from transformers import pipeline

from spectune import export_lora, merge_checkpoint
from spectune.checkpoint.task_file import read_task
from spectune.errors import DataError, ExportError, OptionError
from spectune.recipes import parse_config
from spectune.runs import load_run, train_run
from tests.recipes import tiny

TOLERANCE = 5e-5
TEXT = "good w3 w2"
DECODER = {"method": "spectral_a", "r": 2, "target_modules": ["q_proj"]}


def trained(values: dict[str, Any], folder: Path) -> Any:
    """Train a run into `folder`/run, merge it into `folder`/merged, and get the live model."""
    live = train_run(parse_config(values), folder / "run").model.eval()
    merge_checkpoint(None, folder / "run", folder / "merged")
    return live


def logits_of(model: Any, inputs: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(**inputs).logits
    return found


def assert_same(folder: Path, live: Any, kind: Any, inputs: Any) -> Any:
    loaded = kind.from_pretrained(folder / "merged")
    torch.testing.assert_close(logits_of(loaded, inputs), logits_of(live, inputs), rtol=0, atol=TOLERANCE)
    return loaded


@pytest.mark.parametrize("base", ["body", "language model", "other classes", "decoder"])
def test_a_text_classifier_is_loaded_with_its_head_and_its_classes(base: str, tmp_path: Path) -> None:
    """Whatever class the base's config names: its body alone, or a model with another head."""
    values = tiny.text_run(tmp_path)
    if base == "language model":
        config = tf.BertConfig.from_pretrained(values["model"])
        torch.manual_seed(0)
        whole = tf.BertForPreTraining(config)  # with a pooler and a head of its own
        whole.save_pretrained(values["model"])
    if base == "other classes":
        torch.manual_seed(0)
        whole = tf.BertForSequenceClassification(tf.BertConfig.from_pretrained(values["model"], num_labels=5))
        whole.save_pretrained(values["model"])
    if base == "decoder":
        values |= {"model": tiny.llama(tmp_path / "llama"), "adapter": DECODER}
    with pytest.warns(UserWarning, match="is for other classes") if base == "other classes" else nullcontext():
        live = trained(values, tmp_path)
    said = json.loads((tmp_path / "merged" / "config.json").read_text())
    kind = "LlamaForSequenceClassification" if base == "decoder" else "BertForSequenceClassification"
    assert said["architectures"] == [kind] and said["id2label"] == {"0": "no", "1": "yes"}
    assert said["label2id"] == {"no": 0, "yes": 1} and said["problem_type"] == "single_label_classification"
    words = tf.AutoTokenizer.from_pretrained(tmp_path / "merged")
    inputs = words([TEXT], return_tensors="pt")
    loaded, report = tf.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "merged", output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"] and type(loaded).__name__ == kind
    expected = logits_of(live, inputs)
    torch.testing.assert_close(logits_of(loaded, inputs), expected, rtol=0, atol=TOLERANCE)
    export_lora(tmp_path / "run", tmp_path / "lora")  # on a base whose head may be another
    (answer,) = pipeline("text-classification", model=str(tmp_path / "merged"))([TEXT])
    assert answer["label"] == ("no", "yes")[int(expected.argmax())]
    assert answer["score"] == pytest.approx(float(expected.softmax(-1).max()), abs=1e-3)


def test_a_model_of_scores_is_loaded_as_one(tmp_path: Path) -> None:
    (tmp_path / "scores.jsonl").write_text(
        "".join(json.dumps({"text": f"w{i}", "label": i / 8}) + "\n" for i in range(8))
    )
    path = str(tmp_path / "scores.jsonl")
    values = tiny.text_run(tmp_path, data={"train": path, "validation": path}, problem="regression")
    live = trained(values, tmp_path)
    inputs = tf.AutoTokenizer.from_pretrained(tmp_path / "merged")([TEXT], return_tensors="pt")
    loaded = assert_same(tmp_path, live, tf.AutoModelForSequenceClassification, inputs)
    assert loaded.config.problem_type == "regression" and loaded.config.num_labels == 1


def test_a_model_with_mean_pooling_says_how_its_logits_are_made(tmp_path: Path) -> None:
    live = trained(tiny.text_run(tmp_path, pooling="mean"), tmp_path)
    inputs = tf.AutoTokenizer.from_pretrained(tmp_path / "merged")([TEXT], return_tensors="pt")
    loaded = assert_same(tmp_path, live, tf.AutoModelForTokenClassification, inputs)
    assert loaded.config.id2label == {0: "no", 1: "yes"}
    assert "the mean of its tokens' logits" in (tmp_path / "merged" / "README.md").read_text()


def test_an_image_classifier_is_loaded_with_its_head_and_its_classes(tmp_path: Path) -> None:
    live = trained(tiny.image_run(tmp_path), tmp_path)
    inputs = {"pixel_values": torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))}
    loaded = assert_same(tmp_path, live, tf.AutoModelForImageClassification, inputs)
    assert loaded.config.id2label == {0: "0", 1: "1"}  # the base had three others


def test_the_lora_of_a_classifier_carries_classes_and_tokenizer(tmp_path: Path) -> None:
    trained(tiny.text_run(tmp_path), tmp_path)
    export_lora(tmp_path / "run", tmp_path / "lora")
    assert read_task(tmp_path / "lora").labels == ("no", "yes")
    assert tf.AutoTokenizer.from_pretrained(tmp_path / "lora")("good").input_ids
    loaded = tf.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "bert", **read_task(tmp_path / "lora").config_options()
    )
    loaded.load_adapter(str(tmp_path / "lora"))
    assert loaded.config.id2label == {0: "no", 1: "yes"}


def test_a_base_that_lacks_what_its_config_says_is_refused(tmp_path: Path) -> None:
    """Only the head that an adapter brings may differ: transformers would fill anything else with random numbers."""
    values = tiny.text_run(tmp_path)
    train_run(parse_config(values), tmp_path / "run")
    config = tf.BertConfig.from_pretrained(values["model"], intermediate_size=52)
    config.save_pretrained(values["model"])
    with pytest.raises(ExportError, match="cannot be loaded: its .*intermediate.* has another shape than its config"):
        export_lora(tmp_path / "run", tmp_path / "lora")


@pytest.mark.parametrize("values", [tiny.text_run, tiny.lm_run, tiny.image_run], ids=["texts", "words", "pictures"])
def test_training_refuses_a_base_that_lacks_what_its_config_says(values: Any, tmp_path: Path) -> None:
    asked = values(tmp_path)
    tf.AutoConfig.from_pretrained(asked["model"], intermediate_size=52).save_pretrained(asked["model"])
    with pytest.raises(OptionError, match="cannot load .*: its .* has another shape than its config says"):
        train_run(parse_config(asked), tmp_path / "run")


def test_other_classes_than_the_run_was_trained_on_are_refused(tmp_path: Path) -> None:
    values = tiny.text_run(tmp_path)
    trained(values, tmp_path)
    path = tmp_path / "train.jsonl"
    path.write_text(path.read_text().replace('"yes"', '"aye"'))
    with pytest.raises(DataError, match="the classes are aye, no now, but this run was trained on no, yes"):
        load_run(tmp_path / "run")
