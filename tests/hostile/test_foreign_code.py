"""Models that bring Python code of their own: no door runs it, and none asks whether it may."""

from __future__ import annotations

import ast
import builtins
import json
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from peft import get_peft_model

from spectune import SpectralConfig
from spectune.cli import main
from spectune.errors import AdapterError, SpectuneError
from tests.recipes import tiny

AUTO = (
    "AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoModelForSequenceClassification", "AutoImageProcessor",
    "AutoModelForTokenClassification", "AutoModelForImageClassification", "AutoFeatureExtractor", "AutoProcessor",
)  # fmt: skip
CODE = "open({mark!r}, 'w').write('run')\nclass Anything: pass\n"


def strange(folder: Path, mark: Path) -> None:
    """Make a model need code that stands beside it: of its config, its class, its tokenizer, its processor."""
    (folder / "evil.py").write_text(CODE.format(mark=str(mark)))
    config = json.loads((folder / "config.json").read_text())
    changes = {
        "model_type": "stranger",
        "auto_map": dict.fromkeys(AUTO, "evil.Anything"),
        "architectures": ["Anything"],
    }
    (folder / "config.json").write_text(json.dumps(config | changes))
    auto_map = {"auto_map": {"AutoTokenizer": ["evil.Anything", "evil.Anything"]}, "tokenizer_class": "Anything"}
    (folder / "tokenizer_config.json").write_text(json.dumps(auto_map))
    image = {"auto_map": {"AutoImageProcessor": "evil.Anything"}, "image_processor_type": "Anything"}
    (folder / "preprocessor_config.json").write_text(json.dumps(image))


def command(*words: str) -> int:
    """Run a command in this process and get its exit status."""
    handler, argv = signal.getsignal(signal.SIGINT), sys.argv
    try:
        sys.argv = ["spectune", *words]
        main()
    except SystemExit as ended:
        return int(ended.code or 0)
    finally:
        sys.argv = argv
        signal.signal(signal.SIGINT, handler)


def written(path: Path, run: dict[str, Any]) -> str:
    path.write_text(yaml.safe_dump(run))
    return str(path)


@pytest.fixture(scope="module")
def honest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base with a finished run, and two adapters, before the base turns strange."""
    here = tmp_path_factory.mktemp("honest")
    run = tiny.lm_run(here)
    written(here / "run.yaml", run)
    for name in ("one", "other"):
        model = tiny.tf.AutoModelForCausalLM.from_pretrained(run["model"])
        get_peft_model(
            model, SpectralConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", init_weights=False)
        ).save_pretrained(here / name)
    assert command("train", str(here / "run.yaml"), "-o", str(here / "run")) == 0
    (here / "texts.txt").write_text("w1 w2\n")
    return here


Words = Callable[[Path], list[str]]
DOORS: dict[str, Words] = {
    "check": lambda here: ["check", str(here / "run.yaml")],
    "train": lambda here: ["train", str(here / "run.yaml"), "-o", str(here / "new")],
    "lr": lambda here: ["lr", str(here / "run.yaml")],
    "check text": lambda here: ["check", written(here / "text.yaml", tiny.text_run(here) | {"model": base(here)})],
    "check images": lambda here: ["check", written(here / "image.yaml", tiny.image_run(here) | {"model": base(here)})],
    "evaluate": lambda here: ["evaluate", str(here / "run")],
    "generate": lambda here: ["generate", str(here / "run"), "--prompt", "w1"],
    "export": lambda here: ["export", str(here / "one"), "-o", str(here / "lora")],
    "export with base": lambda here: ["export", str(here / "one"), "-o", str(here / "lora"), "--base", base(here)],
    "fuse": lambda here: [
        *("fuse", str(here / "one"), str(here / "other"), "-o", str(here / "ab"), "--rule", "gradient"),
        *("--examples", str(here / "texts.txt"), "--examples", str(here / "texts.txt")),
    ],
}
# These read tensors by their names where no class of transformers tells them.
WITHOUT_A_CLASS: dict[str, Words] = {
    "inspect": lambda here: ["inspect", base(here), "--quick"],
    "inspect an adapter": lambda here: ["inspect", str(here / "one"), "--quick"],
    "decompose": lambda here: ["decompose", base(here), "--r", "2", "--cache", str(here / "bases")],
    "extract": lambda here: ["extract", base(here), str(here / "tuned"), "-o", str(here / "out"), "--rank", "1"],
    "merge": lambda here: ["export", str(here / "one"), "-o", str(here / "merged"), "--to", "merged"],
    "fuse": lambda here: ["fuse", str(here / "one"), str(here / "other"), "-o", str(here / "ab"), "--rule", "average"],
}


def base(here: Path) -> str:
    return str(yaml.safe_load((here / "run.yaml").read_text())["model"])


@pytest.mark.parametrize("door", [*DOORS, *(f"{name}, by names" for name in WITHOUT_A_CLASS)])
def test_no_door_runs_code_of_a_model_or_asks_to(
    door: str, honest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    here, mark = tmp_path / "here", tmp_path / "mark"
    shutil.copytree(honest, here)
    for path in [here / "run.yaml", here / "run" / "run.yaml", *here.rglob("adapter_config.json")]:
        path.write_text(path.read_text().replace(str(honest), str(here)))
    shutil.copytree(base(here), here / "tuned")
    strange(Path(base(here)), mark)
    strange(here / "tuned", mark)
    asked: list[Any] = []
    monkeypatch.setattr(builtins, "input", lambda *words: asked.append(words) or "y")
    words = (DOORS.get(door) or WITHOUT_A_CLASS[door.removesuffix(", by names")])(here)
    status = command(*words)
    assert not mark.exists() and asked == []
    if door in DOORS:
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("spectune:")]
        assert status == 1
        assert "which spectune never runs" in line, line


PASSES_ON = {"super().from_pretrained", "PeftModel.from_pretrained", "peft.PeftModel.from_pretrained"}
CONCRETE = {"SpectralConfig.from_pretrained", "kind.config_class.from_pretrained", "type(me.model).from_pretrained"}
CONCRETE |= {
    "type(model.config).from_pretrained",
    "DDPMScheduler.from_config",
    "GenerationConfig.from_pretrained",
    "PeftConfig.from_pretrained",
}


def test_every_call_that_may_meet_code_forbids_it() -> None:
    """Where `trust_remote_code` is left out, transformers asks on the terminal, and `yes |` answers."""
    found = []
    for path in sorted((Path(__file__).parents[2] / "src" / "spectune").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            name = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            if name.endswith((".from_pretrained", ".from_config")) and name not in PASSES_ON | CONCRETE:
                assert isinstance(node, ast.Call)
                told = {word.arg: ast.unparse(word.value) for word in node.keywords}
                if told.get("trust_remote_code") != "False":
                    found.append(f"{path.name}:{node.lineno}: {name}")
    assert found == []


INDEXES: dict[str, dict[str, Any]] = {
    "a module": {"unet": ["antigravity", "fly"]},
    "a file beside it": {"unet": ["evil", "Anything"]},
    "a class of its own": {"_class_name": ["evil", "Anything"]},
    "a class that chooses": {"text_encoder": ["transformers", "AutoModel"]},
    "a tokenizer that chooses": {"tokenizer": ["transformers", "AutoTokenizer"]},
    "a file of the pipeline's name": {"_class_name": "evil"},
    "a list too long": {"unet": ["diffusers", "UNet2DConditionModel", "x"]},
    "no texts": {"unet": [{}, 3]},
}


@pytest.mark.parametrize("case", INDEXES)
def test_a_pipeline_names_known_classes_only(case: str, tmp_path: Path) -> None:
    pytest.importorskip("diffusers")
    from spectune.concepts.pipeline import open_pipeline

    mark = tmp_path / "mark"
    (tmp_path / "unet").mkdir()
    for place in (tmp_path, tmp_path / "unet"):
        (place / "evil.py").write_text(CODE.format(mark=str(mark)))
    index = {"_class_name": "StableDiffusionPipeline", "_diffusers_version": "0.32.0"} | INDEXES[case]
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(AdapterError, match="needs its own code, which spectune never runs"):
        open_pipeline(tmp_path)
    assert not mark.exists()


def test_a_pipeline_without_parts_is_one_line(tmp_path: Path) -> None:
    pytest.importorskip("diffusers")
    from spectune.concepts.pipeline import open_pipeline

    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline", "unet": None}))
    with pytest.raises(SpectuneError) as refused:
        open_pipeline(tmp_path)
    assert str(refused.value).isprintable()
