"""What goes to the hub, and what does not; a server of this machine stands for the hub and records what it is asked."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants
from peft import get_peft_model
from typer.testing import CliRunner

from spectune import SpectralConfig
from spectune.cli.app import app
from spectune.errors import SpectuneError
from spectune.export.upload import PATH, plan_upload

from ..models import MODELS
from .test_card import RESULT

NAME = "someone/my-adapter"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Get the folder of a run, with much in it that is nobody else's business."""
    folder = tmp_path_factory.mktemp("home") / "my run"
    live: Any = get_peft_model(MODELS["llama"].fresh(), SpectralConfig(r=2, target_modules=["q_proj"]))
    live.peft_config["default"].base_model_name_or_path = str(folder.parent / "private base")
    live.save_pretrained(folder / "adapter")
    for name in ("optimizer.pt", "train.csv", "tokenizer.json", "events.log"):
        (folder / "adapter" / name).write_text("{}")
    (folder / "adapter" / "tokenizer_config.json").write_text(
        json.dumps({"name_or_path": str(folder / "tok"), "chat_template": "{# /keep/this/here #}", "eos_token": "</s>"})
    )
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints" / "model.safetensors").write_text("x")
    (folder / "run.yaml").write_text(f"model: {folder}\n")
    data = {"train": str(folder / "train.csv")}
    config = {**RESULT["config"], "model": str(folder.parent / "private base"), "data": data}
    (folder / "result.json").write_text(json.dumps({**RESULT, "config": config}))
    return folder


class Hub(BaseHTTPRequestHandler):
    """Answers as the hub's API does, and keeps what it was asked."""

    asked: list[tuple[str, str, str]]
    private = True

    def log_message(self, *words: Any) -> None: ...

    def answer(self, said: Any, status: int = 200) -> None:
        body = json.dumps(said).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        self.asked.append(("GET", self.path, ""))
        self.answer({"id": NAME, "private": self.private, "siblings": []})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"] or 0)).decode()
        assert self.headers["Authorization"] == "Bearer hf_secret"
        self.asked.append(("POST", self.path, body))
        if self.path.endswith("/repos/create"):
            self.answer({"url": f"https://huggingface.co/{NAME}"})
        elif "/preupload/" in self.path:
            files = json.loads(body)["files"]
            self.answer({"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]})
        elif "/commit/" in self.path:
            self.answer({"commitUrl": f"https://huggingface.co/{NAME}/commit/1", "commitOid": "1", "success": True})
        else:
            self.answer({"errors": [], "warnings": []})


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Hub]]:
    class Fresh(Hub):
        asked: list[tuple[str, str, str]] = []

    server = ThreadingHTTPServer(("127.0.0.1", 0), Fresh)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for name in ("ENDPOINT", "_HF_DEFAULT_ENDPOINT"):
        monkeypatch.setattr(constants, name, address, raising=False)
    monkeypatch.setattr("huggingface_hub.hf_api.constants.ENDPOINT", address)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    yield Fresh
    server.shutdown()
    server.server_close()


def invoke(*words: Any) -> str:
    return CliRunner().invoke(app, ["push", *map(str, words)], catch_exceptions=False).stdout


def test_only_what_belongs_goes_up(run: Path) -> None:
    plan = plan_upload(run, NAME)
    wanted = [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert [file.name for file in plan.files] == wanted
    assert set(plan.left_out) == {"optimizer.pt", "train.csv", "events.log"}
    for file in plan.files:
        content = file.source.read_bytes() if file.content is None else file.content
        assert file.size == len(content) and file.sha256 == hashlib.sha256(content).hexdigest()
        assert str(run.parent).encode() not in content, file.name
    config = json.loads(next(f for f in plan.files if f.name == "adapter_config.json").content or b"{}")
    assert config["base_model_name_or_path"] == "private base"
    words = json.loads(next(f for f in plan.files if f.name == "tokenizer_config.json").content or b"{}")
    assert words == {"name_or_path": "tok", "chat_template": "{# /keep/this/here #}", "eos_token": "</s>"}
    assert any(line.startswith("adapter_config.json: ") and line.endswith("-> private base") for line in plan.rewritten)
    assert "| data | train: train.csv |" in plan.card


def test_paths_are_told_from_addresses_and_words() -> None:
    for text in ("/home/me/base", "see /tmp/a/b.csv.", "C:\\me\\x.csv", "(~/models/base/x)"):
        assert PATH.search(text), text
    for text in ("https://hub/a/b/c", "and/or/both", "</s>", "openai/gsm8k", "1/2", "PATH/OF/THIS"):
        assert not PATH.search(text), text


def test_a_card_that_somebody_wrote_keeps_its_words_and_loses_its_paths(tmp_path: Path) -> None:
    live: Any = get_peft_model(MODELS["llama"].fresh(), SpectralConfig(r=2, target_modules=["q_proj"]))
    live.save_pretrained(tmp_path / "mine")
    (tmp_path / "mine" / "README.md").write_text("Trained on /home/me/secret/rows.csv, see https://a.b/c/d.\n")
    plan = plan_upload(tmp_path / "mine", NAME)
    assert plan.card == "Trained on rows.csv, see https://a.b/c/d.\n"
    assert any("/home/me/secret/rows.csv -> rows.csv" in line for line in plan.rewritten)


def test_a_dry_run_shows_everything_and_asks_nobody(run: Path, hub: type[Hub], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    before = sorted((p, p.stat().st_mtime_ns) for p in run.rglob("*"))
    said = invoke(run, NAME, "--dry-run")
    size = (run / "adapter" / "adapter_model.safetensors").stat().st_size
    digest = hashlib.sha256((run / "adapter" / "adapter_model.safetensors").read_bytes()).hexdigest()
    assert f"adapter_model.safetensors  {size:,} bytes  sha256 {digest}" in said
    assert "stays here: events.log, optimizer.pt, train.csv" in said and "rewritten in adapter_config.json" in said
    assert "## How to load this adapter" in said and "nothing was sent" in said
    assert hub.asked == [] and sorted((p, p.stat().st_mtime_ns) for p in run.rglob("*")) == before


def test_a_push_is_one_commit_of_these_files(run: Path, hub: type[Hub]) -> None:
    said = invoke(run, NAME, "--private", "--revision", "v2")
    assert f"pushed: https://huggingface.co/{NAME}/commit/1" in said
    created = json.loads(next(body for _, path, body in hub.asked if path.endswith("/repos/create")))
    assert (created["name"], created["organization"]) == ("my-adapter", "someone")
    assert created.get("private") is True or created.get("visibility") == "private"  # newer clients say the second
    (sent,) = [(path, body) for _, path, body in hub.asked if "/commit/" in path]
    assert sent[0].endswith("/commit/v2") and any(path.endswith("/branch/v2") for _, path, _ in hub.asked)
    lines = [json.loads(line) for line in sent[1].splitlines()]
    files = {
        line["value"]["path"]: base64.b64decode(line["value"]["content"]) for line in lines if line["key"] == "file"
    }
    plan = plan_upload(run, NAME)
    assert {name: hashlib.sha256(content).hexdigest() for name, content in files.items()} == {
        file.name: file.sha256 for file in plan.files
    }


def test_a_public_repository_is_not_written_to_in_private(run: Path, hub: type[Hub]) -> None:
    hub.private = False
    with pytest.raises(SpectuneError, match="exists and is public"):
        invoke(run, NAME, "--private")
    assert not any("/commit/" in path for _, path, _ in hub.asked)


def test_what_the_hub_refuses_is_one_line(run: Path, hub: type[Hub], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "do_POST", lambda self: self.answer({"error": "no\nrights"}, 403))
    with pytest.raises(SpectuneError, match="the hub refused: ") as refused:
        invoke(run, NAME)
    assert "\n" not in str(refused.value)


def test_what_is_wrong_is_refused_before_the_network(
    run: Path, tmp_path: Path, hub: type[Hub], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("adapter", "a/b/c", "https://hub/a/b", "../x/y", "a/..", "a b/c", "/abs/x"):
        with pytest.raises(SpectuneError, match="is not OWNER/NAME"):
            invoke(run, name)
    for folder, why in ((tmp_path, "no adapter and no model"), (tmp_path / "none", "nothing here")):
        with pytest.raises(SpectuneError, match=why):
            invoke(folder, NAME)
    with pytest.raises(SpectuneError, match="not the name of a branch"):
        invoke(run, NAME, "--revision", "a b")
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(SpectuneError, match="not logged in.*hf auth login"):
        invoke(run, NAME)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(SpectuneError, match="HF_HUB_OFFLINE is set"):
        invoke(run, NAME)
    assert hub.asked == []
