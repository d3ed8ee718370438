"""Serve the adapters of a folder, with OpenAI's wire format: `model` names the adapter.

    python -m examples.serving.server BASE ADAPTERS [--port 8000] [--rows 64] [--engine continuous]

BASE is a model that `transformers` loads, ADAPTERS a folder of Spectune folders in one basis; each is served under the
name of its folder, and the base under its own name. Needs `pip install fastapi uvicorn`.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import queue
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from peft import PeftModel
from starlette.exceptions import HTTPException
from transformers import AutoModelForCausalLM, AutoTokenizer

from spectune import AdapterBank
from spectune.errors import AdapterError, SpectuneError, printable

from .batches import BASE, Answered, Asked, Batcher
from .continuous import Continuous
from .wire import Chat, Completion, RefusedError

log = logging.getLogger("serving")


def create(
    model: Any, tokenizer: Any, bank: AdapterBank, base_name: str, engine: Any = Batcher, **options: Any
) -> FastAPI:
    """Get the application; `engine` is `Batcher` or `Continuous`, with its options."""

    @asynccontextmanager
    async def life(app: FastAPI) -> AsyncIterator[None]:
        app.state.batcher = engine(model, tokenizer, bank, **options)
        yield
        await asyncio.to_thread(app.state.batcher.close)

    app = FastAPI(title="Spectune adapters", lifespan=life)
    began = int(time.time())

    def adapter_of(name: str) -> str:
        """Get the resident of a request's name. It is looked up in the bank's table and used for nothing else."""
        if name == base_name:
            return BASE
        if name not in bank:
            raise RefusedError(404, f"The model {printable(name[:80])!r} does not exist.", "model", "model_not_found")
        return name

    async def answers(asked: list[Asked]) -> list[Answered]:
        room = getattr(model.config, "max_position_embeddings", None)
        for one in asked:
            if room is not None and len(one.ids) + one.max_tokens > room:
                said = f"This model has room for {room} tokens, but {len(one.ids)} + {one.max_tokens} are asked for."
                raise RefusedError(400, said, "max_tokens", "context_length_exceeded")
        try:
            futures = [asyncio.wrap_future(app.state.batcher.ask(one)) for one in asked]
            return await asyncio.gather(*futures)
        except queue.Full:
            raise RefusedError(429, "Too many requests are waiting. Try again.", None, "rate_limit_exceeded") from None
        except KeyError:
            raise RefusedError(
                404, "The model was unloaded while this request waited.", "model", "model_not_found"
            ) from None

    def card(name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": began, "owned_by": "spectune"}

    def reply(kind: str, name: str, found: list[Answered], choices: list[dict[str, Any]]) -> dict[str, Any]:
        read, wrote = sum(one.prompt_tokens for one in found), sum(one.new_tokens for one in found)
        usage = {"prompt_tokens": read, "completion_tokens": wrote, "total_tokens": read + wrote}
        head = {"id": f"{'cmpl' if kind == 'text_completion' else 'chatcmpl'}-{uuid.uuid4().hex}", "object": kind}
        return {**head, "created": int(time.time()), "model": name, "choices": choices, "usage": usage}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [card(name) for name in (base_name, *bank.names)]}

    @app.get("/v1/models/{name}")
    async def one_model(name: str) -> dict[str, Any]:
        adapter_of(name)
        return card(name)

    @app.post("/v1/completions")
    async def completions(body: Completion) -> dict[str, Any]:
        adapter, size = adapter_of(body.model), len(tokenizer)
        found = await answers([body.asked(adapter, ids) for ids in body.token_ids(tokenizer, size)])
        choices = [
            {"index": i, "text": one.text, "finish_reason": one.finish, "logprobs": None} for i, one in enumerate(found)
        ]
        return reply("text_completion", body.model, found, choices)

    @app.post("/v1/chat/completions")
    async def chat(body: Chat) -> dict[str, Any]:
        adapter = adapter_of(body.model)
        (one,) = await answers([body.asked(adapter, body.token_ids(tokenizer))])
        message = {"role": "assistant", "content": one.text}
        return reply(
            "chat.completion", body.model, [one], [{"index": 0, "message": message, "finish_reason": one.finish}]
        )

    @app.exception_handler(RefusedError)
    async def refused(_: Request, error: RefusedError) -> JSONResponse:
        return JSONResponse({"error": error.body}, error.status)

    @app.exception_handler(RequestValidationError)
    async def misread(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        named = [part for part in first["loc"][1:2] if isinstance(part, str)]  # a number is a place in broken JSON
        said = ": ".join([*named, first["msg"]])
        return JSONResponse({"error": RefusedError(400, said, *(named or [None]), None).body}, 400)

    @app.exception_handler(HTTPException)
    async def unknown(_: Request, error: HTTPException) -> JSONResponse:
        return JSONResponse(
            {"error": RefusedError(error.status_code, str(error.detail), None, None).body}, error.status_code
        )

    return app


def base_name(base: str) -> str:
    """Get the name under which the base is served: its folder's, or the hub's."""
    return Path(base).name if Path(base).is_dir() else base


def load(base: str, adapters: Path) -> tuple[Any, Any, AdapterBank]:
    """Get the model, its tokenizer and a bank with every adapter of the folder; one that does not fit is left out."""
    folders = sorted(place.parent for place in adapters.glob("*/adapter_config.json"))
    if not folders:
        raise SystemExit(f"error: {adapters}: contains no folder with an adapter. Name the folder above the adapters.")
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folders[0], "__basis__").eval()
    bank = AdapterBank(model, "__basis__")
    for folder in folders:
        try:
            if folder.name == base_name(base):
                raise AdapterError(f"{folder}: has the name of the base. Rename the folder.")
            bank.load(folder.name, folder)
        except SpectuneError as error:
            log.error("not served: %s", error)
    return model, tokenizer, bank


def main() -> None:
    import uvicorn

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base")
    parser.add_argument("adapters", type=Path)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--rows", type=int, default=64, help="rows of the largest batch")
    parser.add_argument("--engine", choices=["generate", "continuous"], default="generate", help="batches by")
    given = parser.parse_args()
    logging.basicConfig(level=logging.INFO)
    model, tokenizer, bank = load(given.base, given.adapters)
    name = base_name(given.base)
    log.info("%d adapters on %s", len(bank), name)
    engine = Continuous if given.engine == "continuous" else Batcher
    app = create(model, tokenizer, bank, name, engine, rows=given.rows)
    uvicorn.run(app, host=given.host, port=given.port)


if __name__ == "__main__":
    main()
