"""Headers of very many tensors: parsed once for each file, however many are read; counted, not timed."""

from __future__ import annotations

import json
import shutil
import struct
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig, PeftModel, get_peft_model

from spectune import SpectralConfig
from spectune.checkpoint import open_checkpoint, read_adapter_folder, tensor_file, tensor_header
from spectune.errors import AdapterError
from tests.hostile.test_foreign_code import command
from tests.recipes import tiny

# Empty tensors cost a file no byte but their names.
MANY = 20_000


def fatten(folder: Path, name: str, file: str = "adapter_model.safetensors") -> Path:
    """Add empty tensors to a file; `name` has a place for their numbers."""
    path = folder / file
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header, body = json.loads(raw[8 : 8 + length]), raw[8 + length :]
    place = {"dtype": "F32", "shape": [0], "data_offsets": [len(body), len(body)]}
    header |= {name.format(i): place for i in range(MANY)}
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)
    return folder


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    here = tmp_path_factory.mktemp("shelf")
    base = tiny.llama(here / "base")
    kinds: dict[str, Any] = {
        "spectral": SpectralConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", init_weights=False),
        "lora": LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"),
    }
    for name, config in kinds.items():
        get_peft_model(tiny.tf.AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(here / name)
        for more in ("fat", "other"):
            shutil.copytree(here / name, here / f"{more}-{name}")
            if more == "fat":
                fatten(here / f"fat-{name}", "base_model.model.x{}.bias")
    shutil.copytree(base, here / "fat-base")
    fatten(here / "fat-base", "model.layers.0.x{}.weight", "model.safetensors")
    return here


@pytest.fixture
def parses(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often the header of each file is parsed, here and by safetensors for us."""
    found: Counter[str] = Counter()
    parsed, opened = tensor_header._parsed, tensor_file.safe_open
    monkeypatch.setattr(tensor_header, "RECENT", {})

    def counted(path: Path, *rest: Any) -> Any:
        found[str(path)] += 1
        return parsed(path, *rest)

    def also_counted(path: str, *rest: Any, **more: Any) -> Any:
        found[f"safetensors: {path}"] += 1
        return opened(path, *rest, **more)

    monkeypatch.setattr(tensor_header, "_parsed", counted)
    monkeypatch.setattr(tensor_file, "safe_open", also_counted)
    return found


DOORS: dict[str, Callable[[Path, Path], list[str]]] = {
    "inspect an adapter": lambda at, to: ["inspect", f"{at}/fat-spectral", "--quick"],
    "inspect a lora": lambda at, to: ["inspect", f"{at}/fat-lora", "--quick"],
    "inspect a model": lambda at, to: ["inspect", f"{at}/fat-base", "--quick", "--include", "q_proj"],
    "export": lambda at, to: ["export", f"{at}/fat-spectral", "-o", f"{to}"],
    "merge": lambda at, to: ["export", f"{at}/fat-spectral", "-o", f"{to}", "--to", "merged"],
    "fuse": lambda at, to: ["fuse", f"{at}/fat-spectral", f"{at}/other-spectral", "-o", f"{to}", "--rule", "average"],
    "fuse loras": lambda at, to: ["fuse", f"{at}/fat-lora", f"{at}/other-lora", "-o", f"{to}", "--rule", "average"],
    "resize": lambda at, to: ["resize", f"{at}/fat-lora", "-o", f"{to}", "--rank", "1"],
    "extract": lambda at, to: ["extract", f"{at}/base", f"{at}/fat-base", "-o", f"{to}", "--rank", "1"],
    "decompose": lambda at, to: ["decompose", f"{at}/fat-base", "--r", "2", "--cache", f"{to}", "--include", "q_proj"],
}


@pytest.mark.parametrize("door", DOORS)
def test_a_header_is_parsed_once_at_every_door(door: str, shelf: Path, tmp_path: Path, parses: Counter[str]) -> None:
    assert command(*DOORS[door](shelf, tmp_path / "out")) in (0, 1)
    fat = {name: count for name, count in parses.items() if "/fat-" in name}
    assert any(name.startswith(str(shelf)) for name in fat)
    assert all(count <= (3 if name.startswith("safetensors") else 1) for name, count in fat.items()), fat


def test_a_header_is_parsed_once_for_a_live_load(shelf: Path, parses: Counter[str]) -> None:
    base = tiny.tf.AutoModelForCausalLM.from_pretrained(shelf / "base")
    with pytest.raises(AdapterError, match=r"its 20,00\d tensors are too many for the \d+ parts of"):
        PeftModel.from_pretrained(base, str(shelf / "fat-spectral"))
    fat = {name: count for name, count in parses.items() if "/fat-" in name}
    assert all(count <= (3 if name.startswith("safetensors") else 1) for name, count in fat.items()), fat


@pytest.mark.parametrize("door", ["inspect an adapter", "inspect a lora", "export", "merge"])
def test_far_more_tensors_than_the_base_has_places_are_one_line(
    door: str, shelf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(*DOORS[door](shelf, tmp_path / "out")) == 1
    said = capsys.readouterr()
    assert "are too many for the" in said.err and len(said.err) + len(said.out) < 5_000


def test_reading_tensors_parses_nothing(shelf: Path, parses: Counter[str]) -> None:
    folder, base = read_adapter_folder(shelf / "fat-lora"), open_checkpoint(shelf / "fat-base")
    before = dict(parses)
    for name in folder.names[:500]:
        folder.tensor(name)
    for name in base.names[:500]:
        base.tensor(name)
    assert dict(parses) == before


def test_a_file_that_is_written_again_is_parsed_again(shelf: Path, tmp_path: Path) -> None:
    """Also where neither its size nor its time tells."""
    folder = Path(shutil.copytree(shelf / "fat-lora", tmp_path / "copy"))
    path = folder / "adapter_model.safetensors"
    first = read_adapter_folder(folder).names
    path.write_bytes(path.read_bytes().replace(b"x77.bias", b"y77.bias"))
    second = read_adapter_folder(folder).names
    assert "base_model.model.x77.bias" in first and "base_model.model.y77.bias" in second
    assert "base_model.model.x77.bias" not in second


def test_bytes_that_stand_for_two_tensors_are_not_read(tmp_path: Path) -> None:
    """A megabyte read a hundred thousand times over would take hours."""
    place = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}
    text = json.dumps({"a": place, "b": place}).encode()
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + b"\0" * 16)
    with pytest.raises(AdapterError, match="not a safetensors file"):
        open_checkpoint(tmp_path).tensor("a")
