"""Text classification: metrics as scikit-learn has them, heads, pairs, scores, every kind of adapter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf
from sklearn import metrics as oracle

from spectune.errors import DataError, OptionError
from spectune.recipes import parse_config
from spectune.recipes.metrics import measure
from spectune.recipes.recipe import Recipe
from spectune.recipes.table import recipe_class
from spectune.recipes.text_classification_config import GLUE
from spectune.runs import dry_run, load_run, run
from spectune.runs.building import build

from . import tiny


def recipe_of(values: dict[str, Any]) -> Any:
    config = parse_config(values)
    return recipe_class(config.recipe)(config)


@pytest.mark.parametrize(
    "adapter",
    [
        {"method": "spectral_a", "r": 2, "target_modules": ["query", "value"]},
        {"method": "svft", "target_modules": ["value", "dense"]},
        {"peft_type": "LORA", "r": 2, "target_modules": ["value"], "use_dora": True},
        "none",
    ],
    ids=lambda value: value if isinstance(value, str) else value.get("method") or value["peft_type"],
)
def test_any_adapter_learns_is_saved_and_found_again(adapter: Any, tmp_path: Path) -> None:
    more = {"steps": 40, "batch_size": 8, "learning_rate": 1e-2, "head_learning_rate": 3e-2, "save_every": 100}
    values = tiny.text_run(tmp_path, adapter=adapter, training=more, pooling="mean", dropout=0.0)
    result = run(parse_config(values), tmp_path / "run")
    assert result.metrics["validation"]["accuracy"] >= 0.75 and result.losses[-1] < 0.6 * result.losses[0]
    recipe, model = load_run(tmp_path / "run")
    assert recipe.evaluate(model, "validation") == result.metrics["validation"]
    assert result.file_bytes == sum(p.stat().st_size for p in (tmp_path / "run").glob("*/*.safetensors"))


def test_the_counts_are_those_of_the_layers(tmp_path: Path) -> None:
    found = dry_run(parse_config(tiny.text_run(tmp_path)))
    assert [shape for _, shape in found.layers] == [[32, 32]] * 4
    assert found.trainable == 4 * 2 * (32 + 32) and found.head == 2 * 32 + 2
    base = recipe_of(tiny.text_run(tmp_path)).build_model()
    assert found.total == sum(p.numel() for p in base.parameters())
    assert found.memory.gradients == 4 * (found.trainable + found.head) and found.memory.activations > 0
    full = dry_run(parse_config(tiny.text_run(tmp_path, adapter="none")))
    assert full.trainable + full.head == full.total == found.total and full.layers == []


def test_head_and_adapter_train_at_their_own_rates_and_decay_spares_biases(tmp_path: Path) -> None:
    more = {"head_learning_rate": 0.5, "weight_decay": 0.1}
    recipe: Recipe = recipe_of(tiny.text_run(tmp_path, training=more))
    model, plan = build(recipe)
    optimizer = recipe.trainer(model, plan, tmp_path / "out").create_optimizer()
    named = {id(p): name for name, p in model.named_parameters()}
    for group in optimizer.param_groups:
        names = [named[id(p)] for p in group["params"]]
        assert all(("classifier" in name) == (group["lr"] == 0.5) for name in names)
        assert all(name.endswith("bias") == (group["weight_decay"] == 0) for name in names)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters() if p.requires_grad}


def test_metrics_are_those_of_scikit_learn_and_numpy() -> None:
    rng = np.random.default_rng(0)
    right, found = rng.integers(0, 2, 60).tolist(), rng.integers(0, 2, 60).tolist()
    names = ["accuracy", "f1", "macro_f1", "matthews"]
    wanted = [
        np.mean(np.array(right) == found),
        oracle.f1_score(right, found),
        oracle.f1_score(right, found, average="macro"),
        oracle.matthews_corrcoef(right, found),
    ]
    assert list(measure(names, found, right).values()) == pytest.approx(wanted)
    scores, truth = rng.normal(size=60), rng.normal(size=60)
    figures = measure(["pearson", "spearman"], scores.tolist(), truth.tolist())
    assert figures["pearson"] == pytest.approx(np.corrcoef(scores, truth)[0, 1])
    ranks = np.corrcoef(scores.argsort().argsort(), truth.argsort().argsort())[0, 1]
    assert figures["spearman"] == pytest.approx(ranks)
    assert measure(["pearson"], [1.0, 1.0], [0.0, 1.0]) == {"pearson": 0.0}
    with pytest.raises(DataError, match="two classes"):
        measure(["f1"], [0, 2], [0, 1])


def test_glue_tasks_take_their_columns_and_metrics(tmp_path: Path) -> None:
    assert GLUE["cola"].metrics[0] == "matthews" and GLUE["stsb"].metrics == ("pearson", "spearman")
    assert GLUE["mrpc"].metrics == GLUE["qqp"].metrics == ("accuracy", "f1")
    path = tmp_path / "pairs.jsonl"
    rows = [{"sentence1": "good w1", "sentence2": f"w{i}", "label": i % 2} for i in range(12)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"train": str(path), "validation": str(path), "glue": "mrpc"}
    recipe = recipe_of(tiny.text_run(tmp_path, data=data))
    assert recipe.metrics == ["accuracy", "f1"] and recipe.labels == ["0", "1"]
    shown = "".join(piece for piece, _ in recipe.show().pieces)
    assert shown == "[CLS] good w1 [SEP] w0 [SEP] "
    assert recipe.rows("train")[0]["token_type_ids"] == [0, 0, 0, 0, 1, 1]
    config = parse_config(tiny.text_run(tmp_path, data={"glue": "mnli", "train": None, "validation": None}))
    assert (config.data.hub, config.data.validation) == ("nyu-mll/glue", "validation_matched")  # type: ignore[attr-defined]


def test_scores_are_learned_as_numbers(tmp_path: Path) -> None:
    path = tmp_path / "scores.jsonl"
    rows = [{"sentence1": ("bad", "good")[i % 2], "sentence2": f"w{i}", "label": 5.0 * (i % 2)} for i in range(16)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"train": str(path), "validation": str(path), "glue": "stsb"}
    for pooling in ("model", "mean"):
        more = {"steps": 40, "head_learning_rate": 3e-2, "save_every": 100}
        values = tiny.text_run(tmp_path, data=data, training=more, pooling=pooling)
        found = run(parse_config(values), tmp_path / pooling).metrics["validation"]
        assert found["pearson"] > 0.9 and found["spearman"] > 0.8, pooling


def test_the_mean_head_ignores_padding(tmp_path: Path) -> None:
    recipe = recipe_of(tiny.text_run(tmp_path, pooling="mean"))
    model = recipe.build_model().eval()
    long, short = (
        {"input_ids": [2, 5, 6, 7, 8, 3], "attention_mask": [1] * 6},
        {"input_ids": [2, 5, 3], "attention_mask": [1] * 3},
    )
    together = recipe.logits(model, recipe.collate([long, short]))
    alone = recipe.logits(model, recipe.collate([short]))
    torch.testing.assert_close(together[1:], alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("more", "line"),
    [
        ({"evaluation": {"metrics": ["pearson"]}}, "'pearson' does not fit classes"),
        ({"data": {"label": "lable"}}, "no column 'lable'. Did you mean 'label'"),
        ({"adapter": {"method": "spectral_a", "rr": 2}}, "unexpected keyword argument 'rr'"),
        ({"adapter": {"peft_type": "LORA", "rnk": 2}}, "LORA has no option 'rnk'"),
        ({"adapter": {"peft_type": "LOORA"}}, "'LOORA' does not exist. Did you mean 'LORA'"),
        ({"adapter": {"r": 2}}, "give either 'method'"),
        ({"model": "nowhere/at-all"}, "cannot load"),
        ({"training": {"validate_every": 2}, "data": {"validation": None}}, "there are no validation examples"),
    ],
)
def test_what_cannot_be_done_is_refused_by_check(more: dict[str, Any], line: str, tmp_path: Path) -> None:
    with pytest.raises((OptionError, DataError), match=line):
        config = parse_config(tiny.text_run(tmp_path, **more))
        dry_run(config)
        recipe_class(config.recipe)(config).evaluate(torch.nn.Linear(1, 1), "validation")


def test_a_label_that_training_never_saw_is_refused(tmp_path: Path) -> None:
    (tmp_path / "odd.jsonl").write_text('{"text": "good", "label": "perhaps"}\n')
    values = tiny.text_run(tmp_path, data={"validation": str(tmp_path / "odd.jsonl")})
    with pytest.raises(DataError, match="the class 'perhaps' does not occur in train"):
        run(parse_config(values), tmp_path / "run")


def test_the_validation_loss_is_looked_at_when_asked(tmp_path: Path) -> None:
    import spectune.training.checkpoints as saved

    run(parse_config(tiny.text_run(tmp_path, training={"validate_every": 3})), tmp_path / "run")
    history = saved.history(saved.checkpoints(tmp_path / "run" / "checkpoints")[-1])
    assert [entry["step"] for entry in history if "eval_loss" in entry] == [3, 6]


def test_dropout_reaches_layers_that_read_it_in_the_config(tmp_path: Path) -> None:
    config = tf.LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, vocab_size=64, pad_token_id=0,
        attention_dropout=0.5, num_labels=2,
    )  # fmt: skip
    folder = tiny.save(tf.LlamaForSequenceClassification(config), tmp_path / "m")
    adapter = {"method": "spectral_a", "r": 2, "target_modules": ["q_proj"]}
    recipe = recipe_class("text_classification")(
        parse_config(tiny.text_run(tmp_path, model=folder, adapter=adapter, dropout=0.0))
    )
    model = recipe.build_model().train()
    batch = recipe.collate([recipe.rows("train")[i] for i in range(3)])
    assert torch.equal(model(**batch).logits, model(**batch).logits)


@pytest.mark.parametrize(
    ("task", "header", "labels"),
    [
        ("rte", "index\tsentence1\tsentence2\tlabel", ["entailment", "not_entailment"]),
        (
            "stsb",
            "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore",
            ["1.2", "5"],
        ),
    ],
)
def test_files_as_glue_hands_them_out_are_read(task: str, header: str, labels: list[str], tmp_path: Path) -> None:
    width = header.count("\t") - 2
    rows = ["\t".join([*["none"] * width, '"w1" good', 'bad "w2', labels[i % 2]]) for i in range(6)]
    (tmp_path / "train.tsv").write_text("\n".join([header, *rows]) + "\n")
    data = {"glue": task, "train": str(tmp_path / "train.tsv"), "validation": str(tmp_path / "train.tsv")}
    found = dry_run(parse_config(tiny.text_run(tmp_path, data=data)))
    assert found.examples == {"train": 6, "validation": 6}
    recipe = recipe_of(tiny.text_run(tmp_path, data=data))
    assert recipe.targets("train")[:2] == ([1.2, 5.0] if task == "stsb" else [0, 1])
