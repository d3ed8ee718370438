"""GGUF files under transformers' names: equal, bit for bit, to what transformers itself loads."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import get_peft_model

from spectune import SpectralConfig, merge_checkpoint
from spectune.checkpoint import open_checkpoint
from spectune.errors import AdapterError, ExportError, MissingExtraError

from ..abilities import needs_gguf
from ..gguf_model import write_gguf
from ..models import MODELS

pytestmark = needs_gguf
pytest.importorskip("gguf")


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(MODELS["llama"].fresh(), tmp_path_factory.mktemp("model") / "tiny.gguf")


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_every_tensor_is_what_transformers_loads(file: Path) -> None:
    import transformers

    live = transformers.AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name).state_dict()
    for path in (file, file.parent):
        checkpoint = open_checkpoint(path)
        assert set(checkpoint.names) == set(live)
        for name in checkpoint.names:
            assert checkpoint.shapes[name] == tuple(live[name].shape)
            assert torch.equal(checkpoint.tensor(name), live[name]), name


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_what_is_wrong_is_one_line(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(AdapterError, match="Did you mean 'model.norm.weight'"):
        open_checkpoint(file).tensor("model.norms.weight")
    (tmp_path / "cut.gguf").write_bytes(file.read_bytes()[:200])
    (tmp_path / "text.gguf").write_bytes(b"this is not a model")
    for name in ("cut.gguf", "text.gguf"):
        with pytest.raises(AdapterError, match="transformers cannot read this GGUF file"):
            open_checkpoint(tmp_path / name)
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'spectune\[gguf\]'"):
        open_checkpoint(file)


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_an_adapter_is_not_merged_into_it(file: Path, tmp_path: Path) -> None:
    model = get_peft_model(MODELS["llama"].fresh(), SpectralConfig(target_modules=["q_proj"], r=2))
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ExportError, match="GGUF files can be read but not written"):
        merge_checkpoint(file, tmp_path / "adapter", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
