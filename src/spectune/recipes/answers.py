"""Scores of generated text: exact match, and GSM8K by the official answer rule; lm-eval for every task it knows."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..checkpoint.chat_rendering import rendered
from ..errors import DataError, MissingExtraError, OptionError, nearest, one_line

# openai/grade-school-math, dataset.py: the number after "#### ", without its commas; the texts must be equal. A full
# stop right after the number counts as part of it, so "#### 42." is wrong; kept, so that figures are comparable.
GSM8K_ANSWER = re.compile(r"#### (\-?[0-9\.\,]+)")


def gsm8k_answer(text: str) -> str | None:
    """Get the answer in a GSM8K solution by the official rule, or None without one."""
    found = GSM8K_ANSWER.search(text)
    return None if found is None else found.group(1).strip().replace(",", "")


def is_gsm8k_right(written: str, reference: str) -> bool:
    """Ask whether a solution ends in the reference's number; one without an answer is wrong."""
    wanted = gsm8k_answer(reference)
    return wanted is not None and gsm8k_answer(written) == wanted


def is_exact(written: str, reference: str) -> bool:
    """Ask whether two texts are equal, ignoring white space around them."""
    return written.strip() == reference.strip()


GENERATED: dict[str, Callable[[str, str], bool]] = {"exact_match": is_exact, "gsm8k": is_gsm8k_right}
"""Name -> whether a written text is right, given the reference."""


# Tokens contain the space before a word, so a space at a prompt's end belongs to the answer's first token.
SPACES = " \t"


@torch.no_grad()
def continuations(
    model: Any, tokenizer: Any, prompts: Sequence[Any], max_new_tokens: int, batch_size: int, temperature: float = 0.0,
    **sampling: Any,
) -> list[str]:  # fmt: skip
    """Get what the model writes after each prompt (text, messages or tokens): greedy at temperature 0, else sampled."""
    model.eval()
    device = next(model.parameters()).device
    rows = [prompt_ids(tokenizer, prompt) for prompt in prompts]
    if not all(rows):
        raise DataError(f"prompt {rows.index([]) + 1} of {len(rows)} is empty: it has no token to continue.")
    drawn = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    written: dict[int, str] = {}
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    for start in range(0, len(order), batch_size):
        places = order[start : start + batch_size]
        width = max(len(rows[i]) for i in places)
        # Padding is on the left, so that every row ends where its continuation begins.
        ids = torch.tensor([[pad] * (width - len(rows[i])) + rows[i] for i in places], device=device)
        mask = torch.tensor([[0] * (width - len(rows[i])) + [1] * len(rows[i]) for i in places], device=device)
        found = model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=max_new_tokens,
            pad_token_id=pad,
            eos_token_id=end_ids(tokenizer, getattr(model, "generation_config", None)) or None,
            **(_neutral(model) | drawn | sampling),
        )
        texts = tokenizer.batch_decode(found[:, width:], skip_special_tokens=True)
        written |= dict(zip(places, texts, strict=True))
    return [written[i] for i in range(len(rows))]


def end_ids(tokenizer: Any, settings: Any) -> list[int]:
    """Get the tokens that end an answer: the tokenizer's, which training uses, and the model's own."""
    own = getattr(settings, "eos_token_id", None)
    found = [tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])]
    return sorted({token for token in found if token is not None})


def _neutral(model: Any) -> dict[str, Any]:
    """Reset the sampling settings of a base's generation_config, which greedy decoding would complain about."""
    return {"top_p": 1.0, "top_k": 50, "num_beams": 1} if getattr(model, "generation_config", None) else {}


def prompt_ids(tokenizer: Any, prompt: Any, tools: Any = None) -> list[int]:
    """Get the tokens of a prompt (a text, messages, or tokens as they are), ready for the model to continue.

    Without the spaces at its end: see SPACES.
    """
    if isinstance(prompt, list) and all(isinstance(token, int) for token in prompt):
        return list(prompt)
    if isinstance(prompt, str):
        ids = list(tokenizer(prompt.rstrip(SPACES))["input_ids"])
        return ids[:-1] if ids[-1:] == [tokenizer.eos_token_id] else ids
    text = rendered(tokenizer, prompt, tools=tools, add_generation_prompt=True, tokenize=False)
    return list(tokenizer(text.rstrip(SPACES), add_special_tokens=False)["input_ids"])


def begins_texts(tokenizer: Any) -> bool:
    """Ask whether a tokenizer puts its beginning token before a text."""
    first = tokenizer("a")["input_ids"][:1]
    return tokenizer.bos_token_id is not None and list(first) == [tokenizer.bos_token_id]


def harness_ready(tasks: Sequence[str]) -> None:
    """Check before training that lm-eval is installed and knows every task."""
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise _no_harness(error) from None
    known = TaskManager().all_tasks
    for name in tasks:
        if name not in known and not Path(name).exists():  # a task may also be a YAML file
            raise OptionError(f"evaluation.lm_eval: task {name!r} does not exist. {nearest(name, known)}")


def _no_harness(error: ImportError) -> MissingExtraError:
    return MissingExtraError(f"evaluation.lm_eval: cannot import lm-eval ({error}). Run: pip install 'spectune[llm]'")


def harness_scores(
    model: nn.Module, tokenizer: Any, tasks: Sequence[str], *, few_shot: int | None, limit: int | None, batch_size: int,
    chat: bool, seed: int,
) -> dict[str, float]:  # fmt: skip
    """Get `task/metric` -> figure from EleutherAI's lm-evaluation-harness, with the model in memory."""
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
    except ImportError as error:
        raise _no_harness(error) from None
    model.eval()
    try:
        found = simple_evaluate(
            model=HFLM(
                pretrained=model,
                tokenizer=tokenizer,
                batch_size=batch_size,
                # By default, lm-eval would leave it out; a chat template writes its own.
                add_bos_token=begins_texts(tokenizer) and not chat,
            ),
            tasks=list(tasks),
            num_fewshot=few_shot,
            limit=limit,
            apply_chat_template=chat,
            random_seed=seed,
            numpy_random_seed=seed,
            torch_random_seed=seed,
            fewshot_random_seed=seed,
        )
    except (KeyError, ValueError) as error:
        raise OptionError(f"evaluation.lm_eval: {tasks}: {one_line(error)}.") from error
    return {
        f"{task}/{metric.removesuffix(',none').replace(',', '/')}": float(value)
        for task, figures in found["results"].items()
        for metric, value in figures.items()
        # lm-eval lists the number of questions among the figures.
        if isinstance(value, (int, float)) and not isinstance(value, bool) and metric != "sample_len"
    }


def before_and_after(model: Any, write: Callable[[], list[str]], count: int) -> tuple[list[str], list[str]]:
    """Get what is written with the model's adapter off, empty if it has none, and with it on."""
    after = [text.strip() for text in write()]
    if not hasattr(model, "disable_adapter"):
        return [""] * count, after
    with model.disable_adapter():
        return [text.strip() for text in write()], after
