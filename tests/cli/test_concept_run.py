"""`spectune train` on a YAML file of text_to_image."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml

pytest.importorskip("diffusers")

from examples.glyphs.base import fresh_pipeline
from examples.glyphs.concepts import write_concept
from spectune.cli.app import app, main
from spectune.concepts.file import EXAMPLE, read_concept
from spectune.errors import OptionError


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("concept")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        fresh_pipeline().save_pretrained(folder / "base")
    write_concept("<dax>", folder / "dax", count=3)
    values = {
        "recipe": "text_to_image", "pipeline": str(folder / "base"), "images": str(folder / "dax"), "token": "<dax>",
        "initial_word": "shape", "unet": {"method": "spectral_a", "r": 2, "target_modules": ["to_q"]}, "steps": 2,
        "sampling_steps": 2, "validation_prompts": ["a {token} on the left"], "unet_rate": 1e-2,
    }  # fmt: skip
    (folder / "run.yaml").write_text(yaml.safe_dump(values))
    return folder / "run.yaml"


def test_a_concept_is_trained_and_its_pictures_stand_in_the_report(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["train", config, "steps=1", "-o", tmp_path / "out", "--json"]
    app([str(word) for word in words], standalone_mode=False)
    said = json.loads(capsys.readouterr().out)
    assert said["trainable"]["unet"] > 0 and (tmp_path / "out" / "unet" / "adapter_config.json").exists()
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 2, "before and after"
    assert "step 0: a &lt;dax&gt; on the left" in page


@pytest.mark.parametrize(
    "line, complaint",
    [
        ("step=3", r"step: unknown key. Did you mean 'steps'"),
        ("steps=many", "steps: found 'many', int is wanted"),
        ("guidance=true", "guidance: found True, float is wanted"),
        ("unet=spectral_a", "the options of an adapter are wanted"),
        ("unet.rank=3", "rank"),
    ],
)
def test_a_wrong_key_or_value_is_named(config: Path, line: str, complaint: str) -> None:
    with pytest.raises(OptionError, match=complaint):
        read_concept(config, [line])


def test_what_init_prints_is_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    app(["init", "text_to_image"], standalone_mode=False)
    printed = capsys.readouterr().out
    assert printed == EXAMPLE
    (tmp_path / "run.yaml").write_text(printed)
    options = read_concept(tmp_path / "run.yaml")
    assert options.token == "<my-dog>" and options.unet.r == 8
    # Every option that exists is shown, set or behind a '#'.
    named = {line.lstrip("# ").partition(":")[0] for line in printed.splitlines()}
    assert set(options.__dataclass_fields__) <= named


def test_what_it_cannot_do_is_refused(
    config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for words, complaint in ((["train", str(config), "--resume"], "--resume"), (["check", str(config)], "runs it")):
        monkeypatch.setattr("sys.argv", ["spectune", *words])
        with pytest.raises(SystemExit):
            main()
        assert complaint in capsys.readouterr().err
