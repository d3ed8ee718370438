"""Where every option of a run of text_classification, causal_lm and image_classification is seen at work."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from tests.recipes.every_field import Different, Entries, Run, Told
from tests.recipes.short_trainings import logged, saved, step


def near(value: Any) -> Any:
    return pytest.approx(value, rel=1e-3)


def rate_of(run: Run, head: bool) -> set[float]:
    heads = {id(p) for name, p in run.model.named_parameters() if ".modules_to_save." in name}
    return {group["lr"] for group in run.groups if all((id(p) in heads) == head for p in group["params"])}


def decays(run: Run) -> dict[bool, set[float]]:
    """Whether the numbers are vectors (biases, norms) -> their decay."""
    kinds = {(group["params"][0].ndim == 1, group["weight_decay"]) for group in run.groups}
    return {vectors: {decay for kind, decay in kinds if kind == vectors} for vectors, _ in kinds}


def counts(run: Run) -> dict[str, int]:
    return {split: len(rows) for split, rows in run.recipe.splits.items()}


def base_dtypes(run: Run) -> set[torch.dtype]:
    own = ("spectune_", "modules_to_save")
    return {p.dtype for name, p in run.model.named_parameters() if not any(word in name for word in own)}


def drawn(run: Run) -> tuple[Any, ...]:
    """What follows from the seed: the order of the data, what a limit chooses, what is held out."""
    batch = run.batch
    less = run.told("data.limit.train=5", "data.validation=null", "data.validation_share=0.3").recipe.splits
    names = [[str(getattr(row, "name", row)) for row in less[split]] for split in ("train", "validation")]
    return (batch[sorted(batch)[-1 if "pixel_values" in batch else 1]].tolist(), *names)


def drawn_with_head(run: Run) -> tuple[Any, ...]:
    heads = [p for name, p in run.model.named_parameters() if "modules_to_save" in name]
    return *drawn(run), heads[0].flatten()[:4].tolist()


def from_elsewhere(run: Run) -> tuple[Any, ...]:
    """What says which files of the model were read: its config's and its tokenizer's (or its processor's)."""
    processing = run.recipe.processing
    read = getattr(processing, "model_max_length", None) or tuple(processing.image_mean)
    return getattr(run.model.config, "mark", None), read


def trackers(run: Run) -> list[str]:
    names = [type(callback).__name__ for callback in run.trainer.callback_handler.callbacks]
    return [name for name in names if "Tracker" in name]


def words(run: Run, learned: bool = False) -> str:
    """The first example of the Trainer as text, whole or only what carries loss."""
    row = run.trainer.train_dataset[0]
    ids = row["labels"] if learned else row["input_ids"]
    return str(run.recipe.processing.decode([i for i in ids if i >= 0]))


def longest(run: Run) -> int:
    return max(len(row["input_ids"]) for row in run.trainer.train_dataset)


def measured(run: Run) -> list[str]:
    return list(run.recipe.evaluate(run.model, "validation"))


NO_OTHERS = ("data.validation=null", "data.test=null")
COMMON: Entries = {
    "model": Told("model={revision}", lambda run: from_elsewhere(run)[0], "other"),
    "revision": Told("revision=other", lambda run: (*from_elsewhere(run), run.adapter.revision), Different),
    "dtype": Told("dtype=bfloat16", base_dtypes, {torch.bfloat16}),
    "seed": Told("seed=5", drawn_with_head, Different),
    "adapter": Told("adapter=none", lambda run: run.adapter, None),
    "training.steps": Told("training.steps=7", lambda run: run.steps, 7),
    "training.epochs": Told(("training.epochs=3", "training.steps=null"), lambda run: run.steps, 12),
    "training.batch_size": Told(
        "training.batch_size=3",
        lambda run: (len(run.batch["labels"]), len(next(iter(run.trainer.get_eval_dataloader()))["labels"])),
        (3, 3),
        given=("training.validate_every=2",),
    ),
    "training.gradient_accumulation": Told(
        "training.gradient_accumulation=2",
        lambda run: step(run).gradient,
        lambda run: near(step(run.told("training.gradient_accumulation=1", "training.batch_size=8")).gradient),
    ),
    "training.learning_rate": Told("training.learning_rate=0.03", lambda run: rate_of(run, False), {0.03}),
    "training.head_learning_rate": Told("training.head_learning_rate=0.07", lambda run: rate_of(run, True), {0.07}),
    "training.weight_decay": Told("training.weight_decay=0.1", decays, {True: {0.0}, False: {0.1}}),
    "training.warmup": Told("training.warmup=2", lambda run: run.curve, [0.0, 0.5, 1.0, 0.5]),
    "training.schedule": Told(
        "training.schedule=cosine",
        lambda run: run.curve,
        near([1.0, 0.853553, 0.5, 0.146447]),
        given=("training.warmup=0",),
    ),
    "training.max_grad_norm": Told("training.max_grad_norm=0.01", lambda run: step(run).moved, near(0.01)),
    "training.optimizer": Told(
        "training.optimizer=adafactor", lambda run: type(run.trainer.create_optimizer()).__name__, "Adafactor"
    ),
    "training.precision": Told("training.precision=bfloat16", lambda run: step(run).dtype, torch.bfloat16),
    # Recomputed in the backward: every layer runs twice.
    "training.gradient_checkpointing": Told("training.gradient_checkpointing=true", lambda run: step(run).forwards, 2),
    "training.save_every": Told("training.save_every=1", saved, ["checkpoint-1", "checkpoint-2"]),
    "training.keep_checkpoints": Told(
        "training.keep_checkpoints=1", saved, ["checkpoint-2"], given=("training.save_every=1",)
    ),
    "training.validate_every": Told("training.validate_every=1", logged, [1, 2]),
    "training.report_to": Told("training.report_to=[mlflow]", trackers, ["Tracker"]),
    "training.workers": Told("training.workers=1", lambda run: run.trainer.get_train_dataloader().num_workers, 1),
    "data.hub": Told(("data.hub=a/set", "data.train=train"), counts, {"train": 9}, given=NO_OTHERS),
    "data.hub_config": Told(
        "data.hub_config=more", counts, {"train": 11}, given=("data.hub=a/set", "data.train=train", *NO_OTHERS)
    ),
    "data.train": Told("data.train={few}", counts, {"train": 5, "validation": 4, "test": 6}),
    "data.validation": Told("data.validation={few}", counts, {"train": 16, "validation": 5, "test": 6}),
    "data.test": Told("data.test={few}", counts, {"train": 16, "validation": 4, "test": 5}),
    "data.validation_share": Told(
        "data.validation_share=0.5", counts, {"train": 8, "validation": 8, "test": 6}, given=("data.validation=null",)
    ),
    "data.limit": Told("data.limit={train: 3, test: 2}", counts, {"train": 3, "validation": 4, "test": 2}),
}


def kind(recipe: str, wanted: str) -> Entries:
    return {"recipe": Told(f"recipe={recipe}", lambda run: type(run.recipe).__name__, wanted, file="any.yaml")}


TEXT: Entries = COMMON | kind("text_classification", "TextClassification") | {
    "data.glue": Told("data.glue=cola", measured, ["matthews", "accuracy"], given=("data.text=text",)),
    "data.text": Told("data.text=other", words, "[CLS] w20 [SEP]"),
    "data.text_pair": Told("data.text_pair=other", words, "[CLS] w0 bad w3 w4 w5 [SEP] w20 [SEP]"),
    "data.label": Told("data.label=mark", lambda run: run.model.config.id2label, {0: "0", 1: "1", 2: "2"}),
    "data.max_tokens": Told("data.max_tokens=4", longest, 4),
    "evaluation.metrics": Told("evaluation.metrics=[macro_f1]", measured, ["macro_f1"]),
    "problem": Told(
        "problem=regression", lambda run: run.model.config.problem_type, "regression", given=("data.label=mark",)
    ),
    "pooling": Told(
        "pooling=mean", lambda run: type(run.model.get_base_model()).__name__, "BertForTokenClassification"
    ),
    "dropout": Told("dropout=0.3", lambda run: {m.p for m in run.model.modules() if isinstance(m, nn.Dropout)}, {0.3}),
}  # fmt: skip


def generated(run: Run) -> dict[str, Any]:
    """What the model's generate is told for five prompts."""
    asked: list[dict[str, Any]] = []

    def stub(**options: Any) -> torch.Tensor:
        asked.append(options)
        return options["input_ids"]

    run.model.generate = stub
    run.recipe.generate(run.model, ["w1"] * 5)
    return asked[0] | {"batches": [len(options["input_ids"]) for options in asked]}


def scored_together(run: Run) -> int:
    """How many examples pass the model at once when the loss on validation is measured, and when text is written."""
    sizes: list[int] = []
    hook = run.model.register_forward_pre_hook(
        lambda module, args, kwargs: sizes.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    run.recipe.response_loss(run.model, "validation")
    hook.remove()
    assert sizes[0] == min(4, generated(run)["batches"][0])
    return sizes[0]


def harness(run: Run, name: str) -> Any:
    """What lm-eval was told, None where it was not asked."""
    return run.recipe.harness(run.model).get(f"/{name}")


PLAIN = ("data.chat=true", "data.chat_template=plain")
HEAD = "adapter.modules_to_save=[lm_head]"
TASKS = "evaluation.lm_eval.tasks=[arc, gsm8k]"
LM: Entries = COMMON | kind("causal_lm", "CausalLM") | {
    "seed": Told("seed=5", drawn, Different),  # it has no new head
    "training.head_learning_rate": Told(
        "training.head_learning_rate=0.07", lambda run: rate_of(run, True), {0.07}, given=(HEAD,)
    ),
    "training.weight_decay": Told("training.weight_decay=0.1", decays, {False: {0.1}}),
    "data.format": Told(
        "data.format=text", words, "w0 bad w3 w4 w5 [SEP]", given=("data.prompt=null", "data.completion=null")
    ),
    "data.prompt": Told('data.prompt="{other} :"', words, "w20 : w0 #### 1 [SEP]"),
    "data.completion": Told('data.completion=" {other}"', words, "w0 w1 : w20 [SEP]"),
    "data.chat": Told(PLAIN, words, "User : w0 w1 : Assistant : w0 #### 1 [SEP]"),
    "data.chat_template": Told(
        "data.chat_template={here}/loud.jinja", words, "good w0 w1 : good w0 #### 1", given=PLAIN
    ),
    "data.loss_on": Told("data.loss_on=all", lambda run: words(run, True), "w0 w1 : w0 #### 1 [SEP]"),
    "data.max_tokens": Told("data.max_tokens=5", longest, 5),
    "data.packing": Told("data.packing=true", lambda run: len(run.trainer.train_dataset), Different),
    "evaluation.metrics": Told(
        "evaluation.metrics=[gsm8k]", measured, ["gsm8k"],
        given=("evaluation.max_new_tokens=2",),
    ),
    "evaluation.max_new_tokens": Told(
        "evaluation.max_new_tokens=3", lambda run: generated(run)["max_new_tokens"], 3
    ),
    "evaluation.batch_size": Told("evaluation.batch_size=2", scored_together, 2),
    "evaluation.lm_eval.tasks": Told(TASKS, lambda run: harness(run, "tasks"), 2.0),
    "evaluation.lm_eval.few_shot": Told(
        "evaluation.lm_eval.few_shot=5", lambda run: harness(run, "num_fewshot"), 5.0, given=(TASKS,)
    ),
    "evaluation.lm_eval.limit": Told(
        "evaluation.lm_eval.limit=3", lambda run: harness(run, "limit"), 3.0, given=(TASKS,)
    ),
}  # fmt: skip


def as_stored(run: Run) -> bool:
    """Whether the Trainer is given the pixels as they are."""
    shown, plain = run.trainer.train_dataset[0], run.recipe.plain_rows("train")[0]
    return torch.equal(shown["pixel_values"], plain["pixel_values"])


HUB = ("data.hub=a/pictures", "data.train=train", *NO_OTHERS)
IMAGE: Entries = COMMON | kind("image_classification", "ImageClassification") | {
    "data.hub": Told(HUB[:2], counts, {"train": 9}, given=NO_OTHERS),
    "data.hub_config": Told("data.hub_config=more", counts, {"train": 11}, given=HUB),
    "data.packaged": Told(
        ("data.packaged=digits", "data.train=null", *NO_OTHERS), counts, {"train": 1500, "test": 297}
    ),
    "data.image_size": Told("data.image_size=16", lambda run: tuple(run.batch["pixel_values"].shape[2:]), (16, 16)),
    "data.augment": Told("data.augment=true", as_stored, False),
    "evaluation.metrics": Told("evaluation.metrics=[macro_f1]", measured, ["macro_f1"]),
}  # fmt: skip

ENTRIES: dict[str, Entries] = {"text_classification": TEXT, "causal_lm": LM, "image_classification": IMAGE}
