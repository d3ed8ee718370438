"""`Batcher`: requests for different adapters -> one batch of `generate`, and an answer for each.

Requests that arrive within a short window share a batch; `AdapterBank` gives every row its adapter. Each row has its
own length, stop words, temperature and seed. A batch ends with its longest row, and what arrives meanwhile waits.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from spectune import AdapterBank

BASE = "__base__"  # PEFT's word for a row without an adapter


@dataclass(frozen=True)
class Asked:
    """One row: which adapter (`__base__` for none), the tokens of the prompt, and how to go on."""

    adapter: str
    ids: list[int]
    max_tokens: int = 16
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()


@dataclass(frozen=True)
class Answered:
    """What a row got; `finish` is `stop` or `length`, as in OpenAI's answers."""

    text: str
    finish: str
    prompt_tokens: int
    new_tokens: int


Waiting = tuple[Asked, "Future[Answered]"]


class Batcher:
    """Answer requests in batches, in a thread of its own.

    `rows` is the largest batch, `window` how many seconds the first request of a batch waits for others, `waiting` how
    many requests may wait: one more raises `queue.Full`. All three are chosen, not measured.
    """

    def __init__(
        self, model: Any, tokenizer: Any, bank: AdapterBank, rows: int = 64, window: float = 0.005, waiting: int = 1024
    ) -> None:
        self.model, self.tokenizer, self.bank = model, tokenizer, bank
        self.rows, self.window = rows, window
        self.ends, self.room = ends_of(model, tokenizer), getattr(model.config, "max_position_embeddings", None)
        self._queue: queue.Queue[tuple[Asked, Future[Answered]] | None] = queue.Queue(waiting)
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="batches", daemon=True)
        self._thread.start()

    def ask(self, asked: Asked) -> Future[Answered]:
        """Get the answer, later."""
        if self._closed:
            raise RuntimeError("The batcher is closed.")
        future: Future[Answered] = Future()
        self._queue.put_nowait((asked, future))
        return future

    def close(self) -> None:
        """Answer what waits, then end the thread."""
        self._closed = True
        self._queue.put(None)
        self._thread.join()

    def _work(self) -> None:
        going_on = True
        while going_on:
            batch, going_on = self._collect()
            # Its adapter may have been unloaded while a request waited: that is one row's error and not the batch's.
            batch = [(asked, future) for asked, future in batch if future.set_running_or_notify_cancel()]
            for asked, future in batch:
                if asked.adapter != BASE and asked.adapter not in self.bank:
                    future.set_exception(KeyError(asked.adapter))
            batch = [(asked, future) for asked, future in batch if not future.done()]
            for part in fitting(batch, self.room):
                try:
                    for (_, future), answer in zip(part, self.answer([asked for asked, _ in part]), strict=True):
                        future.set_result(answer)
                except Exception as error:
                    for _, future in part:
                        future.set_exception(error)

    def _collect(self) -> tuple[list[tuple[Asked, Future[Answered]]], bool]:
        """Get the next batch, and whether there may be another."""
        batch: list[tuple[Asked, Future[Answered]]] = []
        end = None
        while len(batch) < self.rows:
            try:
                item = self._queue.get(timeout=None if end is None else max(0.0, end - time.monotonic()))
            except queue.Empty:
                break
            if item is None:
                return batch, False
            batch.append(item)
            end = time.monotonic() + self.window if end is None else end
        return batch, True

    @torch.inference_mode()
    def answer(self, batch: Sequence[Asked]) -> list[Answered]:
        """Answer one batch: padded on the left, each row with its own adapter."""
        longest = max(len(asked.ids) for asked in batch)
        pad = self.ends[0] if self.ends else 0
        ids = torch.tensor([[pad] * (longest - len(asked.ids)) + asked.ids for asked in batch])
        mask = torch.tensor([[0] * (longest - len(asked.ids)) + [1] * len(asked.ids) for asked in batch])
        config = GenerationConfig(
            max_new_tokens=max(asked.max_tokens for asked in batch),
            do_sample=False,
            pad_token_id=pad,
            eos_token_id=self.ends or None,
        )
        device = self.model.device
        with self.bank([asked.adapter for asked in batch]):
            found = self.model.generate(
                input_ids=ids.to(device),
                attention_mask=mask.to(device),
                generation_config=config,
                logits_processor=LogitsProcessorList([OwnDraws(batch)]),
                stopping_criteria=StoppingCriteriaList([OwnEnds(batch, self.tokenizer, longest)]),
            )
        rows = found[:, longest:].tolist()
        return [cut(self.tokenizer, self.ends, asked, row) for asked, row in zip(batch, rows, strict=True)]


def fitting(batch: Sequence[Waiting], room: int | None) -> list[list[Waiting]]:
    """Get the rows in batches whose longest prompt and longest answer fit into the model together, as each row does."""
    parts: list[list[Waiting]] = []
    for row in sorted(batch, key=lambda one: len(one[0].ids)):
        for part in parts:
            together = [asked for asked, _ in [*part, row]]
            if room is None or max(len(one.ids) for one in together) + max(one.max_tokens for one in together) <= room:
                part.append(row)
                break
        else:
            parts.append([row])
    return parts


def ends_of(model: Any, tokenizer: Any) -> list[int]:
    """Get the end tokens: the model's, else the tokenizer's."""
    ends = model.generation_config.eos_token_id
    ends = tokenizer.eos_token_id if ends is None else ends
    return [] if ends is None else list(ends) if isinstance(ends, list) else [ends]


def cut(tokenizer: Any, ends: Sequence[int], asked: Asked, row: list[int]) -> Answered:
    """Get a row's own tokens: up to its end token, its length or its stop words."""
    ended = next((place for place, token in enumerate(row) if token in ends), len(row))
    row = row[: min(ended, asked.max_tokens)]
    text = tokenizer.decode(row, skip_special_tokens=True)
    places = [place for word in asked.stop if (place := text.find(word)) >= 0]
    if places:  # what follows is padding, while other rows went on
        row = next(row[:n] for n in range(1, len(row) + 1) if stopped(tokenizer, row[:n], asked.stop))
    finish = "stop" if places or len(row) < asked.max_tokens else "length"
    return Answered(text[: min(places)] if places else text, finish, len(asked.ids), len(row))


def stopped(tokenizer: Any, row: list[int], words: Sequence[str]) -> bool:
    """Ask whether the text of these tokens has one of the words."""
    text = tokenizer.decode(row, skip_special_tokens=True)
    return any(word in text for word in words)


def draw(scores_V: torch.Tensor, asked: Asked, generator: torch.Generator) -> torch.Tensor:
    """Get scores whose largest is a sample at a row's own temperature.

    The largest of logits / T + Gumbel noise is a sample of softmax(logits / T) (the Gumbel-max trick). The noise comes
    from the row's own generator: a seed gives the same draws in whatever batch the row is.
    """
    logits = scores_V.double() / asked.temperature
    if asked.top_p < 1:
        best, order = logits.sort(descending=True)
        before = best.softmax(0).cumsum(0) - best.softmax(0)
        logits[order[before >= asked.top_p]] = float("-inf")
    even = torch.rand(len(logits), generator=generator, dtype=torch.float64).clamp_min(1e-300)
    return (logits - (-even.log()).log().to(logits.device)).to(scores_V.dtype)


def generator_of(asked: Asked) -> torch.Generator:
    """Get a row's own generator."""
    generator = torch.Generator()
    generator.seed() if asked.seed is None else generator.manual_seed(asked.seed)
    return generator


class OwnDraws(LogitsProcessor):
    """Give each row a draw at its own temperature, so that the greedy choice of `generate` is a sample."""

    def __init__(self, batch: Sequence[Asked]) -> None:
        self.drawn = [(row, asked, generator_of(asked)) for row, asked in enumerate(batch) if asked.temperature > 0]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        for row, asked, generator in self.drawn:
            scores[row] = draw(scores[row], asked, generator)
        return scores


class OwnEnds(StoppingCriteria):
    """End a row at its own length or stop words, whatever the others do."""

    def __init__(self, batch: Sequence[Asked], tokenizer: Any, begin: int) -> None:
        self.batch, self.tokenizer, self.begin = batch, tokenizer, begin

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        new = input_ids.shape[1] - self.begin
        ended = [asked.max_tokens <= new for asked in self.batch]
        for row, asked in enumerate(self.batch):
            if asked.stop and not ended[row]:
                ended[row] = stopped(self.tokenizer, input_ids[row, self.begin :].tolist(), asked.stop)
        return torch.tensor(ended, device=input_ids.device)
