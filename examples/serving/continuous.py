"""`Continuous`: the same answers by transformers' own continuous batching, where no request waits for a longer one.

Its engine puts the next tokens of all running requests into one long row, and takes up a new request as soon as one
ends. The model's forward is wrapped so that `AdapterBank` gives each token the adapter of its request. Pages of the
cache are never shared between requests, whose adapters differ; graphs and the asynchronous mode are off, since both
would run ahead of the table of adapters. Tried with transformers 5.23.
"""

from __future__ import annotations

import queue
import threading
import uuid
from concurrent.futures import Future
from functools import wraps
from typing import Any

import torch
from transformers import GenerationConfig
from transformers.generation.configuration_utils import ContinuousBatchingConfig

from spectune import AdapterBank

from .batches import BASE, Answered, Asked, cut, draw, ends_of, generator_of


class Continuous:
    """Answer requests as `Batcher` does; `rows` run at once, `pages` of 256 tokens are their cache.

    On a CPU the engine keeps a mask of the tokens of a step times those of the cache, so both are kept small: longer
    prompts are read in several steps. Both numbers are chosen, not measured.
    """

    def __init__(
        self, model: Any, tokenizer: Any, bank: AdapterBank, rows: int = 64, pages: int = 64, waiting: int = 1024
    ) -> None:
        self.tokenizer, self.bank, self.waiting = tokenizer, bank, waiting
        self.model, self.ends = model.get_base_model(), ends_of(model, tokenizer)
        self._running: dict[str, tuple[Asked, Future[Answered], torch.Generator]] = {}
        self._gone: set[str] = set()
        self._forward = self.model.forward

        @wraps(self._forward)  # the engine reads its signature
        def forward(*args: Any, **kwargs: Any) -> Any:
            return self._in_bank(*args, **kwargs)

        self.model.forward = forward
        config = GenerationConfig(do_sample=False, eos_token_id=self.ends or -1, pad_token_id=(self.ends or [0])[0])
        engine = ContinuousBatchingConfig(
            num_blocks=pages,
            max_batch_tokens=max(256, rows),
            max_requests_per_batch=rows,
            allow_block_sharing=False,
            use_async_batching=False,
            use_cuda_graph=False,
            auto_switch_to_flash=False,
        )
        self._manager = self.model.init_continuous_batching(config, engine)
        self._manager.start()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._deliver, name="answers", daemon=True)
        self._thread.start()

    def ask(self, asked: Asked) -> Future[Answered]:
        """Get the answer, later."""
        if self._closed.is_set():
            raise RuntimeError("The engine is closed.")
        if len(self._running) >= self.waiting:
            raise queue.Full
        future: Future[Answered] = Future()
        future.set_running_or_notify_cancel()
        name = uuid.uuid4().hex
        self._running[name] = (asked, future, generator_of(asked))
        self._manager.add_request(asked.ids, name, max_new_tokens=asked.max_tokens, eos_token_id=self.ends or -1)
        return future

    def close(self) -> None:
        """End the engine; requests that still run get an error. A second call does nothing."""
        if self._closed.is_set():
            return
        self._closed.set()
        self._thread.join()
        self._manager.stop(block=True)
        self._manager.destroy()
        del self.model.forward
        for name in list(self._running):
            self._running.pop(name)[1].set_exception(RuntimeError("The engine is closed."))

    def _in_bank(self, *args: Any, **kwargs: Any) -> Any:
        """Run one forward of the engine: each token with the adapter of its request, each draw with its own seed."""
        batch = self._manager.batch_processor.inputs_and_outputs.requests_in_batch
        running = [self._running[one.state.request_id] for one in batch]
        names = [asked.adapter for asked, _, _ in running]
        for place, (one, name) in enumerate(zip(batch, names, strict=True)):
            if name != BASE and name not in self.bank:  # unloaded while it ran: its answer is an error
                self._gone.add(one.state.request_id)
                names[place] = BASE
        with self.bank(names, tokens=kwargs["cu_seq_lens_q"].diff().tolist()):
            found = self._forward(*args, **kwargs)
        drawing = [given for one, given in zip(batch, running, strict=True) if one.has_new_token]
        scores_NV = found.logits[0]
        for place, (asked, _, generator) in enumerate(drawing):
            if asked.temperature > 0:
                row = place if len(scores_NV) == len(drawing) else int(kwargs["logits_indices"][place])
                scores_NV[row] = draw(scores_NV[row], asked, generator)
        return found

    def _deliver(self) -> None:
        while not self._closed.is_set():
            result = self._manager.get_result(timeout=0.05)
            if result is None or not result.is_finished():
                continue
            asked, future, _ = self._running.pop(result.request_id)
            if result.request_id in self._gone:
                self._gone.discard(result.request_id)
                future.set_exception(KeyError(asked.adapter))
            elif result.error is not None:
                future.set_exception(RuntimeError(result.error))
            else:
                future.set_result(cut(self.tokenizer, self.ends, asked, list(result.generated_tokens)))
