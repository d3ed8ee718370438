"""Language models on rewards that a program verifies, by trl's GRPO."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback

from ..errors import DataError, OptionError
from ..training.arguments import checked_arguments, loop_arguments
from ..training.loop import Plan, looped
from .answers import continuations
from .causal_lm import CausalLM
from .conversations import fill
from .data import Row, each, limited, load_splits
from .messages import read_messages
from .recipe import Answered, Sampled, Shown, Written
from .reward_config import RewardConfig
from .scoring import COMPLETIONS, SHOWN, Scoring, read_log
from .tokens import IGNORED, Tokens
from .trl_trainers import from_trl, on_tokens, refuse_moved, trl_trainer


class FromRewards(CausalLM):
    """Adapts a language model to rewards: its own answers are scored by rules, without examples to copy."""

    Config = RewardConfig  # type: ignore[assignment]
    title = "Rewards"
    curves = {"reward": "mean reward"}
    example = {
        "model": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "dtype": "bfloat16",
        "adapter": {"method": "spectral_r", "r": 16, "share": "kind", "target_modules": "all-linear"},
        "data": {
            "hub": "openai/gsm8k",
            "hub_config": "main",
            "train": "train",
            "test": "test",
            "prompt": "{question} Give the number after '#### '.",
            "answer": "{answer}",
            "chat": True,
        },
        "rewards": [{"reward": "gsm8k"}],
        "group_size": 8,
        "training": {"steps": 200, "batch_size": 16, "precision": "bfloat16"},
    }
    config: RewardConfig  # type: ignore[assignment]
    _folder: Path | None = None

    @cached_property
    def splits(self) -> dict[str, list[Row]]:
        data, seed = self.config.data, self.config.seed
        rows = limited(load_splits(data, seed), data, seed)
        return {split: self._prepared(part, split) for split, part in rows.items()}

    def _prepared(self, rows: Sequence[Row], split: str) -> list[Row]:
        found = each(rows, split, "a reward run", lambda row: _asked(row, self.config) | {"columns": dict(row)})
        kept = [row for row in found if len(self.asked(row)) <= self.config.data.max_tokens]
        if not kept:
            raise DataError(f"data.{split}: no prompt fits into max_tokens={self.config.data.max_tokens}. Raise it.")
        self._long[split] = len(found) - len(kept)
        return kept

    @cached_property
    def _long(self) -> dict[str, int]:
        return {}

    @cached_property
    def tokens(self) -> Tokens:
        return Tokens(self.processing, "response")

    def prepare(self) -> None:
        if not self.config.rewards:
            raise OptionError("rewards: none is given. Name one, such as {reward: gsm8k}, or give --reward FILE.py:f.")
        super().prepare()

    def ready(self, split: str) -> None:
        self.scoring(split).check(split)

    def scoring(self, split: str) -> Scoring:
        """Get the rewards on the prompts of a split."""
        counted = self.processing
        return Scoring(
            self.config.rewards,
            self.splits[split],
            lambda text: len(counted(text, add_special_tokens=False)["input_ids"]),
        )

    def rows(self, split: str) -> list[dict[str, Any]]:
        """Get the prompt tokens of each row, with room for an answer: what a step holds in memory."""
        room, pad = self.config.generation.max_new_tokens, self.processing.pad_token_id
        found = []
        for row in self.splits[split]:
            asked = self.asked(row)
            ids = asked + [pad] * room
            found.append({"prompt_ids": asked, "input_ids": ids, "labels": [IGNORED] * len(asked) + ids[len(asked) :]})
        return found

    def callbacks(self, model: nn.Module, run: Path) -> list[TrainerCallback]:
        self._folder = run
        return [_DropUnsaved(run)]

    def trainer(
        self, model: nn.Module, plan: Plan, folder: Path, callbacks: Sequence[TrainerCallback] = (), **more: Any
    ) -> Any:
        if plan.ramp is not None:
            raise OptionError("lr: the loss of a reward run does not show whether it learns. Use a sweep.")
        kind, arguments, dataset = from_trl("reward", "GRPOTrainer", "GRPOConfig")
        config, asked = self.config, [self.asked(row) for row in self.splits["train"]]
        drawn = config.generation
        own = {
            "num_generations": config.group_size,
            "max_completion_length": drawn.max_new_tokens,
            "temperature": drawn.temperature,
            "top_p": drawn.top_p,
            "top_k": drawn.top_k,
            "repetition_penalty": drawn.repetition_penalty,
            "beta": config.beta,
            "loss_type": config.loss,
            "scale_rewards": config.scale_rewards,
            "epsilon": config.epsilon,
            "disable_dropout": True,
        }
        scoring = self.scoring("train")
        scoring.log = None if self._folder is None else self._folder / COMPLETIONS
        made = trl_trainer(
            looped(on_tokens(kind)),
            checked_arguments(arguments, loop_arguments(config, folder) | own | more),
            model=model,
            reward_funcs=scoring,
            # A prompt is its place: the tokens are the recipe's, so that the model is asked as everywhere else.
            train_dataset=dataset.from_list([{"prompt": str(i)} for i in range(len(asked))]),
            processing_class=self.processing,
            callbacks=list(callbacks),
            plan=plan,
        )
        made.asked = asked
        if config.beta and not made.is_fsdp_enabled:
            refuse_moved(made.model, self.collate(self.rows("train")[:1]))
        return made

    def evaluate(self, model: nn.Module, split: str) -> dict[str, float]:
        count = max(1, self.config.evaluation.samples)
        places = [i for i in range(len(self.splits[split])) for _ in range(count)]
        with torch.random.fork_rng():
            torch.manual_seed(self.config.seed)
            written = self.generate(model, [self.asked(self.splits[split][i]) for i in places])
        return {name: sum(said) / len(said) for name, said in self.scoring(split).scores(places, written).items()}

    def generate(self, model: nn.Module, prompts: Sequence[Any], **options: Any) -> list[str]:
        drawn, asked = self.config.generation, self.config.evaluation
        given: dict[str, Any] = {"max_new_tokens": drawn.max_new_tokens, "batch_size": asked.batch_size}
        if "temperature" not in options and asked.samples:
            given |= {"temperature": drawn.temperature, "top_p": drawn.top_p, "top_k": drawn.top_k}
            given["repetition_penalty"] = drawn.repetition_penalty
        return continuations(model, self.processing, prompts, **(given | options))

    def show(self) -> Shown:
        row = self.splits["train"][0]
        asked = self.asked(row)
        return Shown(self.pieces(asked, [IGNORED] * len(asked)), answer=row["answer"] or "")

    def warnings(self) -> list[str]:
        self.splits  # noqa: B018 (counts them)
        limit = self.config.data.max_tokens
        return [
            f"{count:,} prompts of {split} have more than {limit:,} tokens and are left out"
            for split, count in self._long.items()
            if count
        ]

    def remarks(self) -> list[str]:
        longest = max(len(self.asked(row)) for row in self.splits["train"])
        group = self.config.group_size
        answers = self.config.training.batch_size * self.config.training.gradient_accumulation
        return [
            f"the longest prompt has {longest:,} tokens, an answer at most {self.config.generation.max_new_tokens:,}",
            f"a step draws {answers} answers, {group} to each of {answers // group} prompts",
        ]

    def answers(self, model: nn.Module, split: str, count: int) -> list[Answered]:
        return []  # the page shows what was written while it learned

    def samples(self, model: nn.Module, split: str, count: int) -> list[Sampled]:
        return []

    def written(self, run: Path) -> list[Written]:
        found = read_log(run)
        steps = sorted({line["step"] for line in found})
        return [
            Written(line["step"], line["prompt"], line["completion"], line["reward"])
            for step in dict.fromkeys([*steps[:1], *steps[-1:]])
            for line in [line for line in found if line["step"] == step][:SHOWN]
        ]


class _DropUnsaved(TrainerCallback):
    """Removes from the log what was written after the checkpoint that a run goes on from."""

    def __init__(self, run: Path) -> None:
        self.run = run

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        path = self.run / COMPLETIONS
        if state.is_world_process_zero and path.is_file():
            kept = read_log(self.run, state.global_step)
            path.write_text("".join(json.dumps(line) + "\n" for line in kept), "utf-8")


def _asked(row: Mapping[str, Any], config: RewardConfig) -> dict[str, Any]:
    """Get the prompt of a row, and its reference answer or None."""
    data = config.data
    if data.format == "messages":
        turns = read_messages(row["messages"] if "messages" in row else row["prompt"])
        last = turns[-1:] if turns and turns[-1]["role"] == "assistant" else []
        turns = turns[: len(turns) - len(last)]
        if not turns:
            raise DataError("the messages contain no question.")
        return {"prompt": turns, "answer": last[0]["content"] if last else None}
    prompt = fill(data.prompt or "{prompt}", row)
    if not prompt.strip():
        raise DataError("the prompt is empty. Fill it in, or remove the row.")
    answer = None if data.answer is None else fill(data.answer, row)
    return {"prompt": [{"role": "user", "content": prompt}] if data.chat else prompt, "answer": answer}
