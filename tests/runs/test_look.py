"""What the page of a run shows besides its figures: classes, and texts before and after."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from spectune.recipes import parse_config
from spectune.recipes.conversations import question_of
from spectune.recipes.metrics import confused
from spectune.runs import Confusion, look, train_run

from ..recipes import tiny


def test_the_scores_of_each_class_are_those_of_scikit_learn() -> None:
    from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

    generator = torch.Generator().manual_seed(0)
    right, found = (torch.randint(0, 4, (50,), generator=generator).clamp(max=high).tolist() for high in (3, 2))
    counts = confusion_matrix(right, found, labels=range(4)).tolist()
    wanted = precision_recall_fscore_support(right, found, labels=range(4), zero_division=0.0)
    scores = Confusion(split="test", labels=list("abcd"), counts=counts).scores()
    for i, name in enumerate("abcd"):
        assert scores[i] == (name, wanted[3][i], *(pytest.approx(wanted[k][i]) for k in range(3)))


def test_right_classes_are_rows_and_answers_are_columns() -> None:
    assert confused([1, 1, 0], [0, 0, 0], 2) == [[1, 2], [0, 0]]


def test_classes_are_counted_where_the_main_figure_is_measured(tmp_path: Path) -> None:
    test = tiny.reviews(tmp_path / "test.jsonl", 6)
    trained = train_run(parse_config(tiny.text_run(tmp_path, data={"test": test})), tmp_path / "run", looks=True)
    confusion = trained.result.confusion
    assert confusion is not None and confusion.split == "test" and sum(map(sum, confusion.counts)) == 6


def test_counts_that_are_not_square_are_refused() -> None:
    with pytest.raises(ValidationError, match="a row and a column of counts for each label"):
        Confusion(split="test", labels=["a", "b"], counts=[[1, 2]])


@pytest.mark.parametrize("values", [tiny.text_run, tiny.image_run], ids=["texts", "pictures"])
def test_right_and_answered_classes_add_up_to_the_accuracy(values, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    trained = train_run(parse_config(values(tmp_path)), tmp_path / "run", looks=True)
    confusion = trained.result.confusion
    assert confusion is not None and confusion.split == ("test" if "test" in trained.recipe.splits else "validation")
    counts = torch.tensor(confusion.counts)
    assert counts.sum().item() == len(trained.recipe.splits[confusion.split])
    accuracy = trained.result.metrics[confusion.split]["accuracy"]
    assert counts.diagonal().sum().item() / counts.sum().item() == pytest.approx(accuracy)
    right = torch.bincount(torch.tensor(trained.recipe.targets(confusion.split)), minlength=len(counts))
    assert counts.sum(1).tolist() == right.tolist()


def test_a_language_model_writes_before_and_after(tmp_path: Path) -> None:
    trained = train_run(parse_config(tiny.lm_run(tmp_path)), tmp_path / "run")
    model, recipe = trained.model, trained.recipe
    for name, parameter in model.named_parameters():  # type: ignore[union-attr]
        if "spectune" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    samples = look(trained.result, recipe, model).samples
    assert 1 < len(samples) <= 4 and any(sample.before != sample.after for sample in samples)
    asked = {question_of(row): recipe.asked(row) for row in recipe.splits["test"]}
    prompts = [asked[sample.prompt] for sample in samples]
    with model.disable_adapter():  # type: ignore[union-attr]
        assert [sample.before for sample in samples] == [text.strip() for text in recipe.generate(model, prompts)]
    assert {sample.expected for sample in samples} <= {row["completion"].strip() for row in recipe.splits["test"]}


def test_where_every_weight_was_trained_there_is_no_before(tmp_path: Path) -> None:
    trained = train_run(parse_config(tiny.lm_run(tmp_path, adapter="none")), tmp_path / "run", looks=True)
    assert trained.result.samples and not any(sample.before for sample in trained.result.samples)
