"""The Space: adapters and models are inspected; nothing in a stranger's file names a path, runs or steers the page."""

from __future__ import annotations

import html
import json
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from examples.space import inspecting
from examples.space.inspecting import Shown, inspect_files, inspect_hub
from spectune import SpectralConfig

from ..models import MODELS
from ..tuner.conftest import train
from ..warm import script

LLAMA = MODELS["llama"]
FOLDER = Path(inspecting.__file__).parent
TARGETS = ["q_proj", "v_proj"]


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stand-in of the hub: a base, a LoRA and a spectral adapter that name another place as their base."""
    place = tmp_path_factory.mktemp("hub")
    LLAMA.fresh().save_pretrained(place / "base")  # type: ignore[operator]
    for name, config in (
        ("lora", LoraConfig(r=4, target_modules=TARGETS, init_lora_weights=False)),
        ("spectral", SpectralConfig(r=4, target_modules=TARGETS)),
    ):
        model = get_peft_model(LLAMA.fresh(), config)
        train(model)
        model.save_pretrained(place / name)
        edit(place / name, base_model_name_or_path=str(place / "base"))
    return place


def edit(folder: Path, **changes: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def uploaded(folder: Path) -> list[Path]:
    return [folder / "adapter_model.safetensors", folder / "adapter_config.json"]


def page_of(shown: Shown) -> str:
    assert shown.page.startswith("<iframe sandbox srcdoc=") and shown.page.count("<") == 2, shown.words
    return html.unescape(shown.page)


def test_a_lora_with_its_base_shows_all_four_figures(hub: Path) -> None:
    shown = inspect_files(uploaded(hub / "lora"), "someone/base", fetch=lambda name: hub / name.rpartition("/")[2])
    for words in ("4 layers", "suggested LoRA rank", "intruder directions of 40", "top 8 input directions"):
        assert words in shown.words
    page = page_of(shown)
    assert "Singular values of the update" in page and "someone/base" in page and str(hub) not in page


def test_without_a_base_the_rest_is_shown(hub: Path) -> None:
    shown = inspect_files(uploaded(hub / "lora"))
    assert "suggested LoRA rank" in shown.words and "intruders and" not in shown.words.partition(".")[0]
    assert "Type the hub name of the base" in shown.words and "Singular values of the update" in page_of(shown)
    assert "keeps the scaling in adapter_config.json" in inspect_files(uploaded(hub / "lora")[:1]).words


def test_a_spectral_adapter_is_inspected_with_its_base(hub: Path) -> None:
    assert "A spectral adapter is inspected with its base" in inspect_files(uploaded(hub / "spectral")).words
    shown = inspect_hub("a/spectral", "a/base", fetch=lambda name: hub / name.rpartition("/")[2])
    assert "4 layers" in shown.words and "a/spectral" in page_of(shown)


def test_a_model_of_the_hub_is_shown(hub: Path) -> None:
    shown = inspect_hub("a/base", fetch=lambda name: hub / "base")
    assert shown.words == "a model: 14 of 14 weights looked at" and "a/base" in page_of(shown)


@pytest.mark.parametrize("named", ["/etc", "../base", "base", "C:\\base", "~/base", ["a"], "a/b\x1b[2J<script>"])
def test_a_file_names_no_base_on_this_disk(named: Any, hub: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """The base is there under the name, and is not read."""
    monkeypatch.chdir(hub)
    for kind in ("lora", "spectral"):
        shutil.copytree(hub / kind, tmp_path / kind)
        edit(tmp_path / kind, base_model_name_or_path=named, revision="../..")
        said = inspect_files(uploaded(tmp_path / kind))
        assert "intruder directions of" not in said.words and said.words.isprintable()
        assert named == "base" or str(named) not in said.words  # only a hub's name is repeated


def test_what_a_visitor_types_is_a_hub_name_and_no_path(hub: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(hub)
    for name in ("/etc", str(hub / "base"), "../hub", "a/b/c", "", "-x y"):
        assert "not the name of a hub repository" in inspect_hub(name).words
    asked: list[str] = []

    def offline(name: str) -> Path:
        asked.append(name)
        raise inspecting.NotInspectableError(f"{name}: the hub does not give this repository")

    assert "hub does not give" in inspect_hub("base", fetch=offline).words and asked == ["base"]  # a folder here


def test_names_in_files_cannot_steer_the_page(hub: Path, tmp_path: Path) -> None:
    evil = '</iframe><script>alert(1)</script>"'
    tensors = load_file(hub / "lora" / "adapter_model.safetensors")
    renamed = {name.replace("model.layers.0", f"model.{evil}.0"): tensor for name, tensor in tensors.items()}
    file = tmp_path / f"{evil.replace('/', '')}.safetensors"
    save_file(renamed, file)
    page = inspect_files([file, hub / "lora" / "adapter_config.json"]).page
    assert "alert(1)" in page and page.count("<") == 2 and page.endswith("></iframe>")  # of our frame alone
    assert "<script" not in html.unescape(page).removeprefix("<iframe sandbox").replace("</iframe>", "")


def test_pickles_and_broken_files_end_in_one_line(hub: Path, tmp_path: Path) -> None:
    good = hub / "lora" / "adapter_model.safetensors"
    (tmp_path / "adapter_model.bin").write_bytes(b"\x80\x04")
    (tmp_path / "short.safetensors").write_bytes(b"\x08")
    (tmp_path / "adapter_config.json").write_text("[" * 5000)
    (tmp_path / "list").mkdir()
    (tmp_path / "list" / "adapter_config.json").write_text("[]")
    for files, said in [
        ([tmp_path / "adapter_model.bin"], "pickles are never read"),
        ([], "One .safetensors file is needed, but there are 0"),
        ([good, good], "there are 2"),
        ([good, tmp_path / "adapter_config.json"], "adapter_config.json: is not JSON"),
        ([good, tmp_path / "list" / "adapter_config.json"], "is not an object"),
        ([tmp_path / "short.safetensors"], "the adapter"),
    ]:
        shown = inspect_files(files)
        assert said in shown.words and shown.page == "" and "/tmp" not in shown.words, shown.words


def test_nan_is_refused(hub: Path, tmp_path: Path) -> None:
    tensors = load_file(hub / "lora" / "adapter_model.safetensors")
    save_file({name: tensor * torch.nan for name, tensor in tensors.items()}, tmp_path / "x.safetensors")
    assert "NaN" in inspect_files([tmp_path / "x.safetensors", hub / "lora" / "adapter_config.json"]).words


def test_a_repository_of_another_size_or_place_is_refused(monkeypatch: Any) -> None:
    class Api:
        def model_info(self, name: str, files_metadata: bool) -> Any:
            size = 2**40
            files = [type("File", (), {"rfilename": n, "size": size}) for n in ("model.safetensors", "x/y.safetensors")]
            return type("Info", (), {"siblings": files, "sha": "0" * 40})

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    assert "has 1024.0 GiB, and this page downloads 4 at most" in inspect_hub("a/huge").words


def test_the_front_matter_and_the_page_fit_together() -> None:
    _, front, text = (FOLDER / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    said = yaml.safe_load(front)
    assert said["sdk"] == "gradio" and (FOLDER / said["app_file"]).is_file() and len(said["short_description"]) <= 60
    assert "spectune[report]" in (FOLDER / "requirements.txt").read_text() and text.strip()


def test_gradios_page_builds(tmp_path: Path) -> None:
    if find_spec("gradio") is None:
        pytest.skip("gradio is not installed")
    lines = [
        f"import runpy, sys; sys.path.insert(0, {str(FOLDER)!r})",
        f"made = runpy.run_path({str(FOLDER / 'app.py')!r}, run_name='app')",
        "print(made['looked_at'](None, ' ', '', True))",
    ]
    done = script("\n".join(lines), cwd=tmp_path, GRADIO_ANALYTICS_ENABLED="False")
    assert done.stdout.strip() == "('Upload files, or name a repository: one of them.', '')", done.stderr
