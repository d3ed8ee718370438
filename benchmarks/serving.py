"""Requests a second of examples/serving with 10,000 adapters resident, beside the base and PEFT's mixed batch.

    python benchmarks/serving.py [--rounds 7] [--residents 10000]     # needs fastapi, uvicorn and httpx

A random Llama (4 layers of width 512), `spectral_r` with r = 8 on every linear layer; prompts of 16 tokens and 16 new
ones, greedy, 64 requests at a time, each for another adapter. The batches take turns; then the same requests go to
the real server through HTTP. PEFT has 64 LoRAs of r = 8, the ones that are asked for. Writes
benchmarks/results/serving.json.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import resource
import statistics
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import transformers
from bank import filled_bank
from peft import LoraConfig, get_peft_model
from provenance import provenance
from rounds import spread
from tokenizers import Tokenizer, models, pre_tokenizers

sys.path.insert(0, str(Path(__file__).parents[1]))

from examples.serving.batches import BASE, Answered, Asked, Batcher
from examples.serving.continuous import Continuous
from spectune import SpectralConfig

RESULTS = Path(__file__).parent / "results" / "serving.json"
ROWS, PROMPT, NEW, R, WORDS = 64, 16, 16, 8, 4096
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def base() -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=512, intermediate_size=1408, num_hidden_layers=4, num_attention_heads=8, vocab_size=WORDS
    )
    model = transformers.LlamaForCausalLM(config).eval()
    model.generation_config.eos_token_id = None  # every answer has its full length
    return model


def tokenizer() -> Any:
    made = Tokenizer(models.WordLevel({f"w{i}": i for i in range(WORDS)}, "w0"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, unk_token="w0")


def asked(residents: int, spread_over: int) -> list[Asked]:
    """Get one batch, for `spread_over` different adapters out of the residents; 0: the base."""
    ids = torch.randint(1, WORDS, (ROWS, PROMPT), generator=torch.Generator().manual_seed(1)).tolist()
    step = residents // max(spread_over, 1)
    names = [f"adapter{row % spread_over * step}" if spread_over else BASE for row in range(ROWS)]
    return [Asked(name, row, NEW) for name, row in zip(names, ids, strict=True)]


class MixedLora(Batcher):
    """The same batches by PEFT's own mixed batch."""

    def __init__(self, tokenizer: Any) -> None:
        config = LoraConfig(r=R, target_modules=TARGETS, init_lora_weights=False)
        model = get_peft_model(base(), config, adapter_name="lora0")
        for place in range(1, ROWS):
            model.add_adapter(f"lora{place}", config)
        super().__init__(model.eval(), tokenizer, lambda names: nullcontext())  # type: ignore[arg-type]
        self.numbers = sum(p.numel() for name, p in model.named_parameters() if ".lora0." in name)
        generate = model.generate
        model.generate = lambda **more: generate(adapter_names=[f"lora{row}" for row in range(ROWS)], **more)


class OneLongRow(Continuous):
    """The same batches by transformers' continuous batching."""

    def answer(self, batch: list[Asked]) -> list[Answered]:
        """Send all, and wait for the last."""
        return [future.result() for future in [self.ask(one) for one in batch]]


def resident_bytes() -> int:
    """Get what this process holds in memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


@contextmanager
def running(app: Any) -> Iterator[str]:
    """Run the server on a free port of this machine."""
    import uvicorn

    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join()


async def over_http(url: str, batch: list[Asked]) -> float:
    """Send all requests at once, and get the seconds until the last answer."""
    import httpx

    limits = httpx.Limits(max_connections=len(batch))
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits) as client:
        await client.get("/v1/models/tiny")
        bodies = [{"model": a.adapter, "prompt": a.ids, "max_tokens": NEW, "temperature": 0} for a in batch]
        began = time.perf_counter()
        replies = await asyncio.gather(*(client.post("/v1/completions", json=body) for body in bodies))
        seconds = time.perf_counter() - began
    assert all(reply.json()["usage"]["completion_tokens"] == NEW for reply in replies)
    return seconds


def main() -> None:
    from examples.serving.server import create

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--residents", type=int, default=10_000)
    given = parser.parse_args()
    torch.set_num_threads(1)
    words, plain = tokenizer(), base()
    config = SpectralConfig(method="spectral_r", r=R, target_modules=TARGETS)
    model = get_peft_model(base(), config, adapter_name="__basis__").eval()
    before, began = resident_bytes(), time.perf_counter()
    bank = filled_bank(model, given.residents, "__basis__")
    filled = {"seconds": round(time.perf_counter() - began, 1), "grown_bytes": resident_bytes() - before}
    filled["core_bytes"] = sum(layer.cores.nbytes for layer in bank._layers.values())
    banked, lora = Batcher(model, words, bank), MixedLora(words)
    alone = Batcher(plain, words, lambda names: nullcontext())  # type: ignore[arg-type]
    continuous_model = get_peft_model(base(), config, adapter_name="__basis__").eval()
    continuous = OneLongRow(continuous_model, words, filled_bank(continuous_model, given.residents, "__basis__"), ROWS)
    arms = {
        "base, no adapters": (alone, asked(1, 0)),
        "bank, 64 adapters of the residents": (banked, asked(given.residents, ROWS)),
        "bank, one adapter": (banked, asked(given.residents, 1)),
        "bank, 64 adapters, continuous batching": (continuous, asked(given.residents, ROWS)),
        "PEFT's LoRA, 64 adapters": (lora, asked(ROWS, ROWS)),
    }
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    with running(create(model, words, bank, "tiny", rows=ROWS, window=0.05)) as url:
        http = []
        for number in range(given.rounds + 1):
            for name, (batcher, batch) in arms.items():
                started = time.perf_counter()
                found = batcher.answer(batch)
                if number:
                    seconds[name].append(time.perf_counter() - started)
                assert all(one.new_tokens == NEW for one in found)
            took = asyncio.run(over_http(url, arms["bank, 64 adapters of the residents"][1]))
            if number:
                http.append(took)
    seconds["bank, 64 adapters, through HTTP"] = http
    rows = [
        {
            "what": name,
            "requests_per_second": round(ROWS / statistics.median(times), 1),
            "to_base": spread(seconds["base, no adapters"], times),
            "to_lora": spread(seconds["PEFT's LoRA, 64 adapters"], times),
        }
        for name, times in seconds.items()
    ]
    record = {**provenance(), "threads": 1, "rows": ROWS, "residents": given.residents, "rounds": given.rounds}
    record |= {"numbers_of_a_lora": lora.numbers, "filled": filled, "served": rows}
    RESULTS.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record, indent=1))
    for batcher in (alone, banked, continuous, lora):
        batcher.close()


if __name__ == "__main__":
    main()
