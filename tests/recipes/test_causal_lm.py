"""Language models: which tokens carry loss, one template from training to generation, answers by the official rule."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from spectune.errors import DataError, MissingExtraError, OptionError
from spectune.recipes import parse_config
from spectune.recipes.answers import continuations, gsm8k_answer, is_gsm8k_right
from spectune.recipes.conversations import ALPACA, fill, prepared
from spectune.recipes.table import recipe_class
from spectune.runs import dry_run, load_run, run
from spectune.runs.building import build

from . import tiny

pytest.importorskip("trl")
TALK = [
    {"role": "system", "content": "w9"},
    {"role": "user", "content": "w1"},
    {"role": "assistant", "content": "good w2"},
    {"role": "user", "content": "w3"},
    {"role": "assistant", "content": "bad w4"},
]


def recipe_of(values: dict[str, Any]) -> Any:
    config = parse_config(values)
    return recipe_class(config.recipe)(config)


def learned(recipe: Any) -> str:
    return " ".join(piece.strip() for piece, carries in recipe.show().pieces if carries)


def talks(folder: Path, **more: Any) -> dict[str, Any]:
    (folder / "talk.jsonl").write_text(json.dumps({"messages": TALK}) + "\n")
    data = {"train": str(folder / "talk.jsonl"), "test": None, "prompt": None, "completion": None, "format": "messages"}
    return tiny.lm_run(folder, data=data | {"chat_template": "plain", "max_tokens": 64} | more)


def test_only_the_response_carries_loss(tmp_path: Path) -> None:
    recipe = recipe_of(tiny.lm_run(tmp_path))
    assert learned(recipe) == "w0 #### 1 [SEP]"
    assert "".join(p for p, _ in recipe.show().pieces).startswith("Question:w0w1Answer:")
    assert (
        learned(recipe_of(tiny.lm_run(tmp_path, data={"loss_on": "all"})))
        == "Question : w0 w1 Answer : w0 #### 1 [SEP]"
    )


@pytest.mark.parametrize(
    ("loss_on", "wanted"), [("response", "bad w4 [SEP]"), ("assistant", "good w2 [SEP] bad w4 [SEP]")]
)
def test_answers_of_a_conversation_carry_loss(loss_on: str, wanted: str, tmp_path: Path) -> None:
    assert learned(recipe_of(talks(tmp_path, loss_on=loss_on))) == wanted


def test_the_trainer_trains_on_the_labels_that_check_shows(tmp_path: Path) -> None:
    recipe = recipe_of(tiny.lm_run(tmp_path))
    model, plan = build(recipe)
    trainer = recipe.trainer(model, plan, tmp_path / "out")
    batch = next(iter(trainer.get_train_dataloader()))
    wanted = {tuple(label for label in row["labels"] if label != -100) for row in recipe.rows("train")}
    for row in batch["labels"].tolist():
        assert tuple(label for label in row if label != -100) in wanted
    trl = trainer.compute_loss(model, dict(batch))
    labels = batch["labels"][:, 1:]
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    torch.testing.assert_close(trl, torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()))


def test_packed_examples_do_not_see_each_other(tmp_path: Path) -> None:
    recipe = recipe_of(tiny.lm_run(tmp_path, data={"packing": True}, training={"batch_size": 8}))
    model, plan = build(recipe)
    trainer = recipe.trainer(model, plan, tmp_path / "out")
    assert len(trainer.train_dataset) < len(recipe.rows("train"))
    with torch.no_grad():
        losses = [trainer.compute_loss(model, dict(b), num_items_in_batch=1) for b in trainer.get_train_dataloader()]
    total = float(sum(losses))
    count = sum(label != -100 for row in recipe.rows("train") for label in row["labels"][1:])
    assert total / count == pytest.approx(recipe.response_loss(model, "train")["loss"], rel=1e-4)


def test_the_chat_template_travels_with_the_adapter(tmp_path: Path) -> None:
    run(parse_config(talks(tmp_path)), tmp_path / "run")
    saved = importlib.import_module("transformers").AutoTokenizer.from_pretrained(tmp_path / "run" / "adapter")
    recipe, model = load_run(tmp_path / "run")
    assert saved.chat_template == recipe.processing.chat_template and "generation" in saved.chat_template
    assert recipe.as_prompt("w1") == [{"role": "user", "content": "w1"}]
    written = recipe.generate(model, [recipe.as_prompt("w1"), recipe.as_prompt("w1 w2 w3")], max_new_tokens=3)
    assert len(written) == 2


def test_left_padding_does_not_change_what_is_written(tmp_path: Path) -> None:
    recipe = recipe_of(tiny.lm_run(tmp_path))
    model = recipe.build_model().eval()
    prompts = ["w1", "w1 w2 w3 w4 w5", "Question : w1"]
    alone = [continuations(model, recipe.processing, [p], 5, 1)[0] for p in prompts]
    assert continuations(model, recipe.processing, prompts, 5, 3) == alone


def test_gsm8k_answers_follow_the_official_rule() -> None:
    assert gsm8k_answer("so #### 1,234") == "1234" and gsm8k_answer("#### -3.5 apples") == "-3.5"
    assert gsm8k_answer("the answer is 7") is None and gsm8k_answer("#### seven") is None
    assert is_gsm8k_right("first #### 12 then #### 13", "x #### 12") and not is_gsm8k_right("12", "#### 12")
    assert not is_gsm8k_right("#### 42.", "#### 42") and not is_gsm8k_right("no", "no")


def test_a_model_that_learned_its_answers_scores(tmp_path: Path) -> None:
    more = {"steps": 80, "learning_rate": 2e-2, "save_every": 200, "batch_size": 8}
    values = tiny.lm_run(
        tmp_path, adapter="none", training=more, evaluation={"metrics": ["loss", "gsm8k", "exact_match"]}
    )
    found = run(parse_config(values), tmp_path / "run").metrics["test"]
    assert found["gsm8k"] == 1.0 and found["exact_match"] == 1.0 and found["loss"] < 0.1
    assert found["perplexity"] == pytest.approx(torch.tensor(found["loss"]).exp().item())


def test_every_form_of_data_becomes_prompt_and_completion() -> None:
    alpaca = prepared([{"instruction": "do", "input": "", "output": "done"}], "alpaca", None, None, False)[0]
    assert alpaca == {"prompt": fill(ALPACA, {"instruction": "do"}), "completion": "done"}
    sharegpt = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    talk = prepared([{"conversations": sharegpt}], "messages", None, None, False)[0]
    assert talk["prompt"] == [{"role": "user", "content": "a"}] and talk["completion"][0]["content"] == "b"
    chat = prepared([{"q": "a", "a": "b"}], "prompt_completion", "{q}?", "{a}", True)[0]
    assert chat["prompt"] == [{"role": "user", "content": "a?"}]
    assert prepared([{"t": "x"}], "text", "<{t}>", None, False) == [{"text": "<x>"}]
    with pytest.raises(DataError, match="the template's column 'qq'"):
        fill("{qq}", {"q": 1})
    with pytest.raises(DataError, match="the template's column"):
        fill("{q.__class__}", {"q": 1})  # a template reaches columns, never attributes
    with pytest.raises(DataError, match="must end with an answer of the assistant"):
        prepared([{"messages": TALK[:2]}], "messages", None, None, False)


def test_examples_that_are_cut_are_counted(tmp_path: Path) -> None:
    found = dry_run(parse_config(tiny.lm_run(tmp_path, data={"max_tokens": 8})))
    assert any("16 of 16 examples of train are cut at 8 tokens" in remark for remark in found.remarks)
    with pytest.raises(DataError, match="no response fits into max_tokens=5"):
        dry_run(parse_config(tiny.lm_run(tmp_path, data={"max_tokens": 5})))


@pytest.mark.parametrize(
    ("data", "line"),
    [
        ({"chat": True}, "has no chat template. Give data.chat_template"),
        ({"chat_template": "plain"}, "chat_template works only with format messages or chat: true"),
        ({"loss_on": "assistant"}, "loss_on: assistant needs messages"),
        ({"format": "alpaca"}, "is a template for formats? prompt_completion"),
        ({"chat": True, "chat_template": "nowhere.jinja"}, "the file nowhere.jinja does not exist"),
    ],
)
def test_options_that_do_not_fit_are_refused(data: dict[str, Any], line: str, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=line):
        dry_run(parse_config(tiny.lm_run(tmp_path, data=data)))


def test_an_unmarked_template_cannot_say_which_part_is_the_assistants(tmp_path: Path) -> None:
    (tmp_path / "t.jinja").write_text("{% for m in messages %}{{ m['content'] }} {% endfor %}")
    with pytest.raises(OptionError, match="does not mark the assistant's part"):
        dry_run(parse_config(talks(tmp_path, loss_on="assistant", chat_template=str(tmp_path / "t.jinja"))))


def test_missing_extras_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    recipe = recipe_of(tiny.lm_run(tmp_path, evaluation={"lm_eval": {"tasks": ["gsm8k"]}}))
    with pytest.raises(MissingExtraError, match=r"pip install 'spectune\[llm\]'"):
        recipe.harness(recipe.build_model())
    monkeypatch.setitem(sys.modules, "trl", None)
    with pytest.raises(MissingExtraError, match=r"trl, which trains language models"):
        run(parse_config(tiny.lm_run(tmp_path)), tmp_path / "run")


def test_the_harness_scores_the_model_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """lm-eval is replaced by its interface: the real one brings forty packages and loads its tasks from the hub."""
    asked: dict[str, Any] = {}

    def evaluate(**options: Any) -> dict[str, Any]:
        asked.update(options)
        return {"results": {"gsm8k": {"exact_match,strict-match": 0.5, "alias": "gsm8k", "acc,none": 1.0}}}

    class LM:
        def __init__(self, **options: Any) -> None:
            self.options = options

    fake = type(sys)("lm_eval")
    fake.simple_evaluate = evaluate  # type: ignore[attr-defined]
    wrapper = type(sys)("lm_eval.models.huggingface")
    wrapper.HFLM = LM  # type: ignore[attr-defined]
    for name, module in (("lm_eval", fake), ("lm_eval.models", fake), ("lm_eval.models.huggingface", wrapper)):
        monkeypatch.setitem(sys.modules, name, module)
    tasks = {"tasks": ["gsm8k"], "few_shot": 5, "limit": 3}
    recipe = recipe_of(tiny.lm_run(tmp_path, evaluation={"lm_eval": tasks}))
    model = recipe.build_model()
    assert recipe.harness(model) == {"gsm8k/exact_match/strict-match": 0.5, "gsm8k/acc": 1.0}
    assert asked["model"].options["pretrained"] is model and asked["num_fewshot"] == 5 and asked["limit"] == 3
