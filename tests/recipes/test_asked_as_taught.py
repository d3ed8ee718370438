"""What a language model is asked is a beginning of what it was taught, on every road; what is cut or lost is said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from spectune.errors import DataError, OptionError
from spectune.recipes import answers, parse_config
from spectune.recipes.answers import continuations, prompt_ids
from spectune.recipes.conversations import ALPACA, ALPACA_INPUT
from spectune.recipes.table import recipe_class
from spectune.runs import dry_run, run

from . import tiny

ROWS = [{"question": f"what is {i} and {i}", "answer": f"it is {2 * i} then"} for i in range(8)]


def bpe(begins: bool = False) -> Any:
    """A tokenizer whose tokens hold the space before a word, as those of GPT-2 and Llama 3 do."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    words = [f"Question: {row['question']}\nAnswer: {row['answer']} User: Assistant: ### Response:" for row in ROWS]
    special = ["<s>", "</s>", "<|end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(words * 3, trainer)
    if begins:
        made.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    more = {"bos_token": "<s>"} if begins else {}
    return tf.PreTrainedTokenizerFast(tokenizer_object=made, eos_token="</s>", pad_token="<|end|>", **more)


def recipe_of(folder: Path, words: Any, rows: list[dict[str, Any]] = ROWS, **data: Any) -> Any:
    torch.manual_seed(0)
    config = tf.LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, vocab_size=400, eos_token_id=1
    )
    (folder / "llama").mkdir(exist_ok=True)
    values = tiny.lm_run(folder, model=tiny.save(tf.LlamaForCausalLM(config), folder / "bpe"))
    words.save_pretrained(folder / "bpe")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    plain = {"train": str(folder / "rows.jsonl"), "test": str(folder / "rows.jsonl"), "max_tokens": 256}
    values["data"] = values["data"] | plain | {"prompt": None, "completion": None} | data
    parsed = parse_config(values)
    return recipe_class(parsed.recipe)(parsed)


TALK = [
    {"messages": [{"role": "user", "content": row["question"]}, {"role": "assistant", "content": row["answer"]}]}
    for row in ROWS
]
ALPACAS = [{"instruction": row["question"], "output": row["answer"]} for row in ROWS]
ROADS: dict[str, dict[str, Any]] = {
    "a template that ends in a space": {"prompt": "Question: {question}\nAnswer: ", "completion": "{answer}"},
    "a space in the completion": {"prompt": "Question: {question}\nAnswer:", "completion": " {answer}"},
    "words that would merge": {"prompt": "Question: {question} i", "completion": "t is {answer}"},
    "lines that would merge": {"prompt": "Question: {question}\n", "completion": "\n{answer}"},
    "alpaca": {"format": "alpaca", "rows": ALPACAS},
    "plain talk": {"format": "messages", "chat_template": "plain", "rows": TALK},
    "plain talk, every answer": {
        "format": "messages", "chat_template": "plain", "rows": TALK, "loss_on": "assistant"
    },
    "prompts as talk": {"prompt": "{question}", "completion": "{answer}", "chat": True, "chat_template": "plain"},
}  # fmt: skip


@pytest.mark.parametrize("begins", [False, True])
@pytest.mark.parametrize("road", ROADS)
def test_the_tokens_of_a_prompt_begin_those_that_are_taught(road: str, begins: bool, tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, bpe(begins), **ROADS[road])
    for row in recipe.splits["train"]:
        asked, (ids, labels) = recipe.asked(row), recipe.tokens.taught(row)
        assert ids[: len(asked)] == asked and (ids[0] == 0) == begins and ids[1] != 0
        learned = recipe.processing.decode([label for label in labels if label != -100]).strip()
        assert learned.endswith(" then</s>") and labels[len(asked) - 1] == -100 and labels[len(asked)] != -100
    assert recipe.warnings() == []
    assert "prompts have the same tokens as in training (8 examples compared)" in recipe.remarks()


@pytest.mark.parametrize("road", ROADS)
def test_generation_and_figures_ask_what_was_taught(road: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = recipe_of(tmp_path, bpe(True), **ROADS[road])
    model, given = recipe.build_model(), []

    def spy(model: Any, tokenizer: Any, prompts: Any, *more: Any, **options: Any) -> list[str]:
        given.extend(prompt_ids(tokenizer, prompt) for prompt in prompts)
        return ["" for _ in prompts]

    monkeypatch.setattr("spectune.recipes.causal_lm.continuations", spy)
    wanted = [recipe.asked(row) for row in recipe.splits["test"]]
    recipe.config.evaluation.metrics[:] = ["exact_match"]
    recipe.evaluate(model, "test")
    assert given == wanted
    given.clear()
    recipe.answers(model, "test", 8)
    assert given == wanted
    given.clear()
    if "words that" not in road and "lines that" not in road:  # their prompts end in the middle of the user's words
        recipe.generate(model, [recipe.as_prompt(row["question"]) for row in ROWS])
        assert given == wanted


def test_words_of_a_user_go_through_the_prompt_of_the_run(tmp_path: Path) -> None:
    both = recipe_of(tmp_path, bpe(), prompt="{question} of {answer}:", completion="{answer}")
    assert both.as_prompt('{"question": "a", "answer": "b"}') == "a of b:"
    with pytest.raises(OptionError, match="has the columns question, answer. Give a JSON object"):
        both.as_prompt("a")
    alpaca = recipe_of(tmp_path, bpe(), ALPACAS, format="alpaca")
    assert alpaca.as_prompt("do") == ALPACA.format(instruction="do")
    assert alpaca.as_prompt('{"instruction": "do", "input": "x"}') == ALPACA_INPUT.format(instruction="do", input="x")
    assert recipe_of(tmp_path, bpe(), prompt="{question}", format="text").as_prompt("do") == "do"


def template(folder: Path, text: str) -> str:
    (folder / "t.jinja").write_text(text)
    return str(folder / "t.jinja")


TURNS = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}END\n{% endfor %}"


def test_a_template_that_asks_in_other_words_is_said(tmp_path: Path) -> None:
    text = TURNS.replace("END", "</s>") + "{% if add_generation_prompt %}assistant: <think> {% endif %}"
    recipe = recipe_of(tmp_path, bpe(), TALK, format="messages", chat_template=template(tmp_path, text))
    assert [said for said in recipe.warnings() if "in 8 of 8 examples the prompt differs from training" in said]
    assert not any("same tokens as in training" in said for said in recipe.remarks())


def test_an_end_that_is_never_taught_is_said(tmp_path: Path) -> None:
    text = TURNS.replace("END", "<|end|>") + "{% if add_generation_prompt %}assistant:{% endif %}"
    recipe = recipe_of(tmp_path, bpe(), TALK, format="messages", chat_template=template(tmp_path, text))
    assert [said for said in recipe.warnings() if "the model does not learn to stop: generation ends at '</s>'" in said]


@pytest.mark.parametrize(("mark", "line"), [("", "8 of 8 examples do not begin with '<s>'"), ("<s><s>", "'<s>' twice")])
def test_a_beginning_of_its_own_is_said(mark: str, line: str, tmp_path: Path) -> None:
    text = mark + TURNS.replace("END", "</s>") + "{% if add_generation_prompt %}assistant:{% endif %}"
    recipe = recipe_of(tmp_path, bpe(True), TALK, format="messages", chat_template=template(tmp_path, text))
    assert any(line in said for said in recipe.warnings())


def test_answers_that_max_tokens_cuts_are_said_by_check_and_train(tmp_path: Path) -> None:
    rows = [*ROWS, {"question": "what " * 30, "answer": "it"}]
    recipe = recipe_of(tmp_path, bpe(), rows, prompt="{question}", completion=" {answer}", max_tokens=25)
    line = "1 of 9 examples of train are cut at 25 tokens"
    assert any(line in said for said in dry_run(recipe.config).remarks)
    assert "1 of them lose their whole answer and are left out. Raise data.max_tokens" in recipe.warnings()
    said: list[str] = []
    from spectune.runs import train_run

    values = recipe.config.plain()
    values["training"] |= {"steps": 1}
    train_run(parse_config(values), tmp_path / "run", on_warning=said.append)
    assert any(line in one for one in said) and any("examples of test" in one for one in said)


def test_a_tokenizer_without_an_end_is_refused(tmp_path: Path) -> None:
    words = bpe()
    words.eos_token = None
    with pytest.raises(OptionError, match="has no end token"):
        recipe_of(tmp_path, words, prompt="{question}", completion="{answer}").prepare()


def test_an_empty_prompt_is_refused_where_it_is_continued(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, bpe(), prompt="{question}", completion="{answer}")
    with pytest.raises(DataError, match="prompt 2 of 2 is empty"):
        continuations(recipe.build_model(), recipe.processing, ["a", " "], 1, 2)


def test_generation_stops_at_the_end_that_was_taught(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, bpe(), prompt="{question}", completion="{answer}")
    model = recipe.build_model()
    model.generation_config.eos_token_id = 7
    assert answers.end_ids(recipe.processing, model.generation_config) == [1, 7]


def test_the_harness_begins_texts_as_training_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    given: dict[str, Any] = {}
    fake, wrapper = type(sys)("lm_eval"), type(sys)("lm_eval.models.huggingface")
    fake.simple_evaluate = lambda **_: {"results": {}}  # type: ignore[attr-defined]
    wrapper.HFLM = lambda **options: given.update(options)  # type: ignore[attr-defined]
    for name, module in (("lm_eval", fake), ("lm_eval.models", fake), ("lm_eval.models.huggingface", wrapper)):
        monkeypatch.setitem(sys.modules, name, module)
    for begins, chat in ((False, False), (True, False), (True, True)):
        answers.harness_scores(
            torch.nn.Linear(1, 1), bpe(begins), [], few_shot=None, limit=None, batch_size=1, chat=chat, seed=0
        )
        assert given["add_bos_token"] is (begins and not chat)


def test_a_model_is_trained_and_asked_through_a_prompt_that_ends_in_a_space(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, bpe(), **ROADS["a template that ends in a space"])
    values = recipe.config.plain() | {
        "evaluation": {"metrics": ["exact_match"], "max_new_tokens": 16},
        "adapter": "none",
    }
    values["training"] |= {"steps": 120, "learning_rate": 1e-2, "save_every": 200, "batch_size": 8}
    assert run(parse_config(values), tmp_path / "run").metrics["test"]["exact_match"] == 1.0
