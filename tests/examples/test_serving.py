"""The serving example: rows of one batch have different adapters, and answer as each adapter alone."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from packaging import version
from peft import PeftModel, get_peft_model

from examples.serving.batches import Asked, Batcher, fitting
from examples.serving.wire import Completion, RefusedError
from spectune import AdapterBank

from ..models import MODELS
from ..recipes import tiny
from ..tuner.conftest import config_for, train

LLAMA = MODELS["llama"]
NAMES = ("anna", "ben", "carl")
PROMPTS = ("w1", "w2 w3 w1", "w4 w4")
CHAT = "{% for m in messages %}{{ m.content }} {% endfor %}"


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("adapters")
    for seed, name in enumerate(NAMES):
        model = get_peft_model(LLAMA.fresh(), config_for(LLAMA, "spectral_r"))
        train(model, scale=1.0, seed=seed)
        model.save_pretrained(place / name)
    return place


@pytest.fixture
def served(adapters: Path) -> tuple[Any, Any, AdapterBank]:
    """A model in float64, so that the width of a batch decides no token."""
    model = PeftModel.from_pretrained(LLAMA.fresh().double(), adapters / "anna", "__basis__").eval()
    bank = AdapterBank(model, "__basis__")
    for name in NAMES:
        bank.load(name, adapters / name)
    return model, tiny.tokenizer(), bank


@pytest.fixture
def batcher(served: Any) -> Iterator[Batcher]:
    made = Batcher(*served, window=0.2)
    yield made
    made.close()


@pytest.fixture(scope="module")
def lone(adapters: Path) -> dict[str, Any]:
    """A model for each adapter, without a bank."""
    loaded = {name: PeftModel.from_pretrained(LLAMA.fresh().double(), adapters / name).eval() for name in NAMES}
    return {"__base__": LLAMA.fresh().double(), **loaded}


def alone(lone: dict[str, Any], name: str, prompt: list[int], length: int) -> list[int]:
    """What transformers generates with one adapter."""
    model = lone[name]
    found = model.generate(input_ids=torch.tensor([prompt]), max_new_tokens=length, do_sample=False, eos_token_id=None)
    return list(found[0, len(prompt) :].tolist())


def words(tokenizer: Any, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=True))


def test_one_batch_answers_as_each_adapter_alone(batcher: Batcher, lone: dict[str, Any]) -> None:
    batcher.ends, sizes, answer = [], [], batcher.answer
    batcher.answer = lambda batch: sizes.append(len(batch)) or answer(batch)  # type: ignore[method-assign,func-returns-value,assignment]
    rows = [
        ("anna", [3, 4], 5),
        ("ben", [5, 6, 7, 8], 9),
        ("carl", [9], 3),
        ("__base__", [3, 4], 5),
        ("ben", [3, 4], 5),
    ]
    futures = [batcher.ask(Asked(name, ids, length)) for name, ids, length in rows]
    found = [future.result(60) for future in futures]
    expected = [alone(lone, *row) for row in rows]
    assert [one.text for one in found] == [words(batcher.tokenizer, ids) for ids in expected]
    assert [one.new_tokens for one in found] == [5, 9, 3, 5, 5] and {one.finish for one in found} == {"length"}
    assert sizes == [5] and len({tuple(ids) for ids in expected[3:] + expected[:1]}) == 3  # the adapters do differ


def test_a_seed_gives_the_same_draw_in_any_batch(batcher: Batcher) -> None:
    drawn = Asked("ben", [3, 4], 8, temperature=1.5, top_p=0.9, seed=1)
    (first,) = batcher.answer([drawn])
    other = [Asked("anna", [5, 6, 7], 12, temperature=2.0), drawn, Asked("carl", [3], 2)]
    assert batcher.answer(other)[1] == first
    seeds = {batcher.answer([Asked("ben", [3, 4], 8, temperature=1.5, seed=seed)])[0].text for seed in range(4)}
    assert len(seeds) > 1
    (best,) = batcher.answer([Asked("ben", [3, 4], 8)])
    (narrow,) = batcher.answer([Asked("ben", [3, 4], 8, temperature=2.0, top_p=1e-9)])
    assert narrow == best  # of the likeliest word alone, every draw is greedy


def test_draws_follow_the_models_own_probabilities() -> None:
    from examples.serving.batches import OwnDraws

    logits = torch.tensor([2.0, 1.0, 0.0, -1.0])
    count = 4000
    draws = OwnDraws([Asked("a", [1], temperature=0.5, seed=seed) for seed in range(count)])
    chosen = draws(torch.zeros(count, 1), logits.repeat(count, 1)).argmax(1)
    shares = torch.bincount(chosen, minlength=4) / count
    # Six deviations of a share of one half.
    torch.testing.assert_close(shares, (logits / 0.5).softmax(0), rtol=0, atol=6 * 0.5 / count**0.5)


def test_a_row_ends_at_its_own_stop_word(batcher: Batcher) -> None:
    batcher.ends = []
    (whole,) = batcher.answer([Asked("anna", [3, 4], 12)])
    word = whole.text.split()[3]
    first = whole.text.index(word)
    one, other = batcher.answer([Asked("anna", [3, 4], 12, stop=(word,)), Asked("anna", [3, 4], 12)])
    assert other == whole and one.text == whole.text[:first] and one.finish == "stop" and one.new_tokens < 12


def test_an_adapter_that_is_unloaded_while_a_request_waits_fails_its_row_alone(batcher: Batcher) -> None:
    gone, kept = batcher.ask(Asked("ben", [3], 2)), batcher.ask(Asked("anna", [3], 2))
    cancelled = batcher.ask(Asked("anna", [3], 2))
    cancelled.cancel()  # its client has left
    batcher.bank.unload("ben")
    with pytest.raises(KeyError, match="ben"):
        gone.result(60)
    assert kept.result(60).new_tokens <= 2 and batcher.ask(Asked("anna", [3], 2)).result(60)


def test_only_so_many_requests_wait(served: Any) -> None:
    batcher, go_on = Batcher(*served, rows=1, window=0, waiting=1), threading.Event()
    begun, answer = threading.Event(), batcher.answer
    batcher.answer = lambda batch: (begun.set(), go_on.wait(60), answer(batch))[2]  # type: ignore[method-assign]
    futures = [batcher.ask(Asked("anna", [3], 1))]
    assert begun.wait(60)
    futures.append(batcher.ask(Asked("ben", [3], 1)))
    with pytest.raises(queue.Full):
        batcher.ask(Asked("carl", [3], 1))
    go_on.set()
    assert all(future.result(60) for future in futures)
    batcher.close()
    with pytest.raises(RuntimeError, match="closed"):
        batcher.ask(Asked("anna", [3], 1))


@pytest.fixture
def client(served: Any) -> Iterator[Any]:
    pytest.importorskip("fastapi", reason="the example needs fastapi")
    pytest.importorskip("httpx", reason="fastapi's TestClient needs httpx")
    from fastapi.testclient import TestClient

    from examples.serving.server import create

    model, tokenizer, bank = served
    tokenizer.chat_template = CHAT
    with TestClient(create(model, tokenizer, bank, "tiny-llama", window=0.2)) as made:
        yield made


def test_requests_at_one_time_answer_as_each_adapter_alone(client: Any, lone: dict[str, Any], served: Any) -> None:
    tokenizer, end = served[1], served[0].generation_config.eos_token_id
    bodies = [
        {"model": name, "prompt": prompt, "max_tokens": 6, "temperature": 0}
        for name in (*NAMES, "tiny-llama")
        for prompt in PROMPTS
    ]
    with ThreadPoolExecutor(len(bodies)) as pool:
        replies = list(pool.map(lambda body: client.post("/v1/completions", json=body).json(), bodies))
    for body, reply in zip(bodies, replies, strict=True):
        name = "__base__" if body["model"] == "tiny-llama" else body["model"]
        ids = alone(lone, str(name), tokenizer(body["prompt"]).input_ids, 6)
        ended = ids.index(end) if end in ids else len(ids)
        assert reply["choices"][0]["text"] == words(tokenizer, ids[:ended]), body
        assert reply["usage"]["completion_tokens"] == ended and reply["model"] == body["model"]
        assert reply["object"] == "text_completion"


def test_a_chat_is_answered_and_several_prompts_are(client: Any) -> None:
    asked = {"model": "ben", "temperature": 0, "max_tokens": 4}
    chat = client.post("/v1/chat/completions", json={**asked, "messages": [{"role": "user", "content": "w1"}]}).json()
    both = client.post("/v1/completions", json={**asked, "prompt": ["w2", "w1"]}).json()
    assert chat["choices"][0]["message"] == {"role": "assistant", "content": both["choices"][1]["text"]}
    assert [choice["index"] for choice in both["choices"]] == [0, 1]


def test_the_models_are_the_base_and_the_residents(client: Any) -> None:
    assert [card["id"] for card in client.get("/v1/models").json()["data"]] == ["tiny-llama", *NAMES]
    assert client.get("/v1/models/ben").json()["id"] == "ben" and client.get("/v1/models/dora").status_code == 404


@pytest.mark.parametrize("name", ["dora", "../anna", "/etc/passwd", "__basis__", "__base__", "", "\x1b[2J" * 500])
def test_another_name_is_not_found(client: Any, name: str) -> None:
    reply = client.post("/v1/completions", json={"model": name, "prompt": "w1"})
    error = reply.json()["error"]
    assert reply.status_code == 404 and error["code"] == "model_not_found" and error["param"] == "model"
    assert error["type"] == "invalid_request_error" and error["message"].isprintable() and len(error["message"]) < 500


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"stream": True}, "stream"),
        ({"n": 2}, "n"),
        ({"logit_bias": {}}, "logit_bias"),
        ({"temperature": -1}, "temperature"),
        ({"max_tokens": 4000}, "max_tokens"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [10**6]}, "prompt"),
        ({"stop": [""]}, "stop"),
    ],
)
def test_what_cannot_be_done_is_refused_in_openais_form(client: Any, change: dict[str, Any], param: str) -> None:
    reply = client.post("/v1/completions", json={"model": "ben", "prompt": "w1", **change})
    assert reply.status_code == 400 and reply.json()["error"]["param"] == param, reply.text


def test_the_server_loads_a_folder_of_adapters(adapters: Path, tmp_path: Path, caplog: Any) -> None:
    pytest.importorskip("fastapi", reason="the example needs fastapi")
    from examples.serving.server import load

    base = tiny.save(LLAMA.fresh(), tmp_path / "base")
    places = tmp_path / "adapters"
    places.mkdir()
    for name in NAMES:
        (places / name).symlink_to(adapters / name)
    other = get_peft_model(LLAMA.fresh(), config_for(LLAMA, "svft"))
    other.save_pretrained(places / "other")
    _, _, bank = load(base, places)
    assert bank.names == NAMES and "other" in caplog.text  # of another method: left out with a line


@pytest.fixture
def engine(served: Any) -> Iterator[Any]:
    if version.parse(transformers.__version__) < version.parse("5.23"):
        pytest.skip("transformers' continuous batching was tried from 5.23 on")
    from examples.serving.continuous import Continuous

    made = Continuous(*served, rows=3)  # fewer than requests: some are taken up when others end
    yield made
    made.close()  # its thread would keep the process alive


def test_transformers_continuous_batches_answer_as_each_adapter_alone(
    engine: Any, served: Any, lone: dict[str, Any]
) -> None:
    model, tokenizer, bank = served
    end = model.generation_config.eos_token_id
    steps, forward = [], engine._forward
    engine._forward = lambda *a, **k: steps.append(len(k["cu_seq_lens_q"]) - 1) or forward(*a, **k)
    same = [3, 4, 5] * 100  # longer than a page of the cache, which requests of other adapters must not share
    rows = [(name, ids, length) for name in ("anna", "ben", "__base__") for ids, length in ((same, 3), ([9, 4], 5))]
    futures = [engine.ask(Asked(*row)) for row in rows]
    drawn = Asked("ben", [3, 4], 4, temperature=1.5, top_p=0.9, seed=1)
    draws = [engine.ask(drawn), engine.ask(drawn)]
    for row, future in zip(rows, futures, strict=True):
        ids = alone(lone, *row)
        expected = ids[: ids.index(end)] if end in ids else ids
        assert future.result(60).text == words(tokenizer, expected), row[0]
    assert draws[0].result(60) == draws[1].result(60)
    assert max(steps) == 3  # requests of different adapters ran in one forward
    gone = engine.ask(Asked("ben", [3], 8))
    bank.unload("ben")
    with pytest.raises(KeyError, match="ben"):
        gone.result(60)
    engine.close()
    (batched,) = Batcher(*served).answer([Asked("anna", [9, 4], 5)])
    assert batched == futures[1].result(60)  # the model is as before


def test_rows_that_do_not_fit_into_the_model_together_are_batches_of_their_own() -> None:
    rows: Any = [(Asked("a", [1] * ids, max_tokens), None) for ids, max_tokens in ((60, 4), (1, 60), (2, 4), (30, 30))]
    sizes = [[(len(asked.ids), asked.max_tokens) for asked, _ in part] for part in fitting(rows, 64)]
    assert sizes == [[(1, 60), (2, 4)], [(30, 30)], [(60, 4)]]
    assert len(fitting(rows, None)) == 1


def test_a_prompt_that_is_not_text_and_tokens_that_are_not_numbers_are_refused() -> None:
    with pytest.raises(RefusedError, match="prompt: this is not valid Unicode"):
        Completion(model="a", prompt="\ud800").token_ids(tiny.tokenizer(), 10)
    with pytest.raises(ValueError, match="valid integer"):
        Completion.model_validate({"model": "a", "prompt": [True]})
