"""Verbs that take an adapter or a model take the folder of the run that trained it, with the same result."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from spectune import export_lora
from spectune.checkpoint import find_base, read_adapter_folder
from spectune.errors import AdapterError, OutputError
from tests.recipes import tiny

from .test_runs import spectune

LORA = {"peft_type": "LORA", "r": 4, "target_modules": ["q_proj"]}
SECOND = {"method": "spectral_a", "r": 2, "columns": [4, 5], "target_modules": ["q_proj", "v_proj"]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four finished runs on one base, and one that was only begun."""
    import yaml

    folder = tmp_path_factory.mktemp("runs")
    for name, adapter in {"first": None, "second": SECOND, "lora": LORA, "whole": "none"}.items():
        values = tiny.lm_run(folder)
        values["adapter"] = adapter or values["adapter"]
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(values))
        done = spectune("train", f"{name}.yaml", "training.steps=3", "-o", name, "--json", cwd=folder)
        assert done.returncode == 0, done.stderr
    (folder / "begun").mkdir()
    shutil.copy(folder / "first" / "run.yaml", folder / "begun")
    return folder


# Verb -> its words; {x} is the folder of a run or the folder inside it.
VERBS = {
    "export": ("export", "{first}", "-o", "{out}", "--json"),
    "export --to merged": ("export", "{first}", "--to", "merged", "-o", "{out}", "--json"),
    "inspect": ("inspect", "{first}", "--json"),
    "inspect a LoRA": ("inspect", "{lora}", "--json"),
    "inspect a model": ("inspect", "{whole}", "--quick", "--json"),
    "fuse": ("fuse", "{first}", "{second}", "--weights", "1", "-o", "{out}", "--json"),
    "resize": ("resize", "{lora}", "--rank", "1", "-o", "{out}", "--json"),
    "extract": ("extract", "llama", "{whole}", "--rank", "2", "-o", "{out}", "--json"),
    "decompose": ("decompose", "{whole}", "--r", "2", "--cache", "{out}", "--json"),
    "export onto a run": ("export", "{first}", "--base", "{base}", "-o", "{out}", "--json"),
}


def figures(value: Any) -> Any:
    """What a verb printed, without paths, names of adapters and times."""
    if isinstance(value, dict):
        named = ("path", "seconds", "cache", "base", "adapters", "adapter", "first", "second", "kept")
        return {key: figures(part) for key, part in value.items() if key not in named}
    return [figures(part) for part in value] if isinstance(value, list) else value


@pytest.mark.parametrize("verb", VERBS)
def test_a_run_gives_what_the_folder_inside_it_gives(verb: str, folder: Path, tmp_path: Path) -> None:
    said, tensors = [], []
    inner = {"first": "first/adapter", "second": "second/adapter", "lora": "lora/adapter", "whole": "whole/model"}
    for number, places in enumerate(({name: name for name in inner}, inner)):
        words = [word.format(**places, base="llama", out=tmp_path / str(number)) for word in VERBS[verb]]
        done = spectune(*words, cwd=folder)
        assert done.returncode == 0, done.stderr
        said.append(figures(json.loads(done.stdout)))
        tensors.append([load_file(file) for file in sorted((tmp_path / str(number)).glob("*.safetensors"))])
    assert said[0] == said[1] and said[0]
    for one, other in zip(*tensors, strict=True):
        assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_a_run_of_a_whole_model_is_a_base(folder: Path) -> None:
    found = find_base(folder / "whole")
    assert found.path == folder / "whole" / "model" and found.name == str(found.path)


def test_adapters_of_runs_are_called_after_their_runs(folder: Path) -> None:
    done = spectune("fuse", str(folder / "first"), str(folder / "second"), "--weights", "1", "--json", cwd=folder)
    assert json.loads(done.stdout)["adapters"] == ["first", "second"]


WRONG = {
    "a whole model for an adapter": (("export", "whole", "-o", "out"), "this run trained the whole model"),
    "an adapter for a model": (("extract", "llama", "first", "-o", "out"), "this run trained an adapter"),
    "an adapter for a base": (("export", "first", "--base", "lora", "-o", "out"), "this run trained an adapter"),
    "a run that was only begun": (("inspect", "begun"), "the run is not finished"),
    "a run of another kind of adapter": (("resize", "first", "--rank", "1", "-o", "out"), "a LORA adapter is needed"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_a_run_does_not_have_is_one_line(case: str, folder: Path) -> None:
    words, line = WRONG[case]
    done = spectune(*words, cwd=folder)
    assert done.returncode == 1 and line in done.stderr and "Traceback" not in done.stderr
    assert not (folder / "out").exists()


def test_the_adapter_in_a_run_is_never_replaced_by_what_is_made_of_it(folder: Path) -> None:
    for output in ("first", "first/adapter"):
        with pytest.raises(OutputError, match="would replace"):
            export_lora(folder / "first", folder / output, overwrite=True)
    assert read_adapter_folder(folder / "first").peft_type == "SPECTUNE"


def test_a_run_file_beside_a_model_or_an_adapter_changes_nothing(folder: Path, tmp_path: Path) -> None:
    for inner in ("first/adapter", "whole/model"):
        shutil.copytree(folder / inner, tmp_path / inner)
        shutil.copy(folder / "first" / "run.yaml", tmp_path / inner)
    assert read_adapter_folder(tmp_path / "first" / "adapter").path == tmp_path / "first" / "adapter"
    assert find_base(tmp_path / "whole" / "model").path == tmp_path / "whole" / "model"
    with pytest.raises(AdapterError, match="has no adapter_config.json"):
        read_adapter_folder(tmp_path / "whole" / "model")
