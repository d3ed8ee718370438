"""Every verb finds a base the same way: by its folder, its file, a GGUF file, or its name in the local cache."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file, save_file

from spectune import SpectralConfig, export_lora, fuse, merge_checkpoint
from spectune.algebra import dense
from spectune.checkpoint import base_at_hand, find_base, read_adapter_folder
from spectune.cli.app import app
from spectune.errors import AdapterError, ExportError
from spectune.extraction import extract_adapter
from spectune.surveys import is_adapter, survey_adapter, survey_model

from ..abilities import needs_gguf
from ..gguf_model import write_gguf
from ..models import MODELS

Figures = dict[str, torch.Tensor]
HUB, MISSING = "org/base", "org/missing"
PREFIX = "base_model.model."


@dataclass(frozen=True)
class Shelf:
    """A base in every form, an adapter on it, and a model that was tuned from it."""

    folder: Path
    adapter: Path
    tuned: Path
    kinds: dict[str, str]
    """Kind of base -> what a user or a config calls it."""


def write_repository(cache: Path, name: str, files: dict[str, Path]) -> None:
    """Lay out a repository as the Hugging Face cache does: each revision a folder of links to blobs."""
    place = cache / f"models--{name.replace('/', '--')}"
    for number, (revision, source) in enumerate(files.items()):
        commit = f"{number:040x}"
        for folder in (place / "refs", place / "blobs", place / "snapshots" / commit):
            folder.mkdir(parents=True, exist_ok=True)
        (place / "refs" / revision).write_text(commit)
        for file in source.iterdir():
            blob = place / "blobs" / f"{number}-{file.name}"
            shutil.copy(file, blob)
            (place / "snapshots" / commit / file.name).symlink_to(Path("..", "..", "blobs", blob.name))


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Shelf:
    folder = tmp_path_factory.mktemp("bases")
    base, tuned = MODELS["llama"].fresh(), MODELS["llama"].fresh()
    base.save_pretrained(folder / "base")  # type: ignore[operator]
    MODELS["llama"].fresh(seed=1).save_pretrained(folder / "other")  # type: ignore[operator]
    (folder / "plain").mkdir()
    shutil.copy(folder / "base" / "config.json", folder / "plain")
    shutil.copy(folder / "base" / "model.safetensors", folder / "plain" / "weights.safetensors")
    # The name without a revision is another model, so that a verb that forgets the revision does not pass.
    write_repository(folder / "hub", HUB, {"main": folder / "other", "v1": folder / "base"})
    write_repository(folder / "hub", "org/main-base", {"main": folder / "base"})
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter += 0.01 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2))
    tuned.save_pretrained(folder / "tuned")  # type: ignore[operator]
    config = SpectralConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_weights=False)
    torch.manual_seed(0)
    get_peft_model(base, config).save_pretrained(folder / "adapter")  # type: ignore[arg-type]
    kinds = {
        "folder": str(folder / "base"),
        "file": str(folder / "base" / "model.safetensors"),
        "file of another name": str(folder / "plain" / "weights.safetensors"),
        "gguf": str(folder / "tiny.gguf"),
        "cached": "org/main-base",
        "cached revision": HUB,
    }
    return Shelf(folder, folder / "adapter", folder / "tuned", kinds)


@pytest.fixture(autouse=True)
def cache(shelf: Shelf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(shelf.folder / "hub"))
    monkeypatch.setenv("SPECTUNE_CACHE", str(tmp_path / "spectra"))


def naming(shelf: Shelf, goal: Path, base: str | None, revision: str | None = None) -> Path:
    """Copy the adapter, its config naming this base."""
    shutil.copytree(shelf.adapter, goal)
    path = goal / "adapter_config.json"
    config = json.loads(path.read_text()) | {"base_model_name_or_path": base, "revision": revision}
    path.write_text(json.dumps(config))
    return goal


def exported(adapter: Path, base: str | None, out: Path) -> Figures:
    export_lora(adapter, out, base_model=base, check_logits=False)
    factors = load_file(out / "adapter_model.safetensors")
    names = [name for name in factors if name.endswith("lora_A.weight")]
    return {
        name.removeprefix(PREFIX).removesuffix(".lora_A.weight"): factors[name.replace("lora_A", "lora_B")]
        @ factors[name]
        for name in names
    }


def merged(adapter: Path, base: str | None, out: Path) -> Figures:
    merge_checkpoint(base, adapter, out)
    return load_file(next(out.glob("*.safetensors")))


def inspected(adapter: Path, base: str | None, out: Path) -> Figures:
    survey = survey_adapter(adapter, base, quick=True)
    return {layer.name: torch.tensor([layer.norm, layer.relative or 0]) for layer in survey.layers}


def fused(adapter: Path, base: str | None, out: Path) -> Figures:
    return {name: dense(delta).float() for name, delta in fuse([adapter], weights=1, base=base).deltas.items()}


ADAPTER_VERBS: dict[str, Callable[[Path, str | None, Path], Figures]] = {
    "export": exported,
    "export --to merged": merged,
    "inspect": inspected,
    "fuse": fused,
}


def inspected_model(shelf: Shelf, base: str, out: Path) -> Figures:
    assert not is_adapter(base)
    survey = survey_model(base, 2, include="q_proj", quick=True)
    return {weight.name: torch.tensor(weight.values) for weight in survey.weights}


def decomposed(shelf: Shelf, base: str, out: Path) -> Figures:
    app(["decompose", base, "--r", "2", "--include", "q_proj", "--cache", str(out)], standalone_mode=False)
    app(["inspect", base, "--include", "q_proj", "--quick", "--html", str(out / "a.html")], standalone_mode=False)
    entries = list(out.glob("**/*.safetensors"))
    assert len(entries) == 2
    return {"S": torch.cat([load_file(entry)["S_R"] for entry in sorted(entries)]).sort().values}


def extracted(shelf: Shelf, base: str, out: Path) -> Figures:
    done = extract_adapter(base, shelf.tuned, out, rank=2)
    assert json.loads((out / "adapter_config.json").read_text())["base_model_name_or_path"] == base
    return {layer.name: torch.tensor([layer.change, layer.lost]) for layer in done.layers}


MODEL_VERBS: dict[str, Callable[[Shelf, str, Path], Figures]] = {
    "inspect": inspected_model,
    "decompose": decomposed,
    "extract": extracted,
}
KINDS = [
    "folder",
    "file",
    "file of another name",
    pytest.param("gguf", marks=[needs_gguf, pytest.mark.filterwarnings("ignore::ResourceWarning")]),
    "cached",
]


def base_of(shelf: Shelf, kind: str) -> str:
    place = Path(shelf.kinds[kind])
    if kind == "gguf" and not place.exists():
        write_gguf(MODELS["llama"].fresh(), place)
    return shelf.kinds[kind]


def same(found: Figures, expected: Figures, tolerance: float) -> None:
    assert found.keys() == expected.keys() and found
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=tolerance, atol=tolerance)


@pytest.fixture(scope="module")
def expected(shelf: Shelf, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Figures]:
    """What each verb gives on the base's own folder."""
    place, base = tmp_path_factory.mktemp("expected"), str(shelf.folder / "base")
    return {name: verb(shelf.adapter, base, place / name) for name, verb in ADAPTER_VERBS.items()}


@pytest.mark.parametrize("said", [True, False], ids=["said", "named"])
@pytest.mark.parametrize("kind", [*KINDS, "cached revision"])
@pytest.mark.parametrize("verb", ADAPTER_VERBS)
def test_every_verb_on_an_adapter_finds_every_kind_of_base(
    verb: str, kind: str, said: bool, shelf: Shelf, expected: dict[str, Figures], tmp_path: Path
) -> None:
    base = base_of(shelf, kind)
    adapter = naming(shelf, tmp_path / "a", base, "v1" if kind == "cached revision" else None)
    found = lambda: ADAPTER_VERBS[verb](adapter, base if said else None, tmp_path / "out")  # noqa: E731
    if (verb, kind) == ("export --to merged", "gguf"):
        with pytest.raises(ExportError, match="GGUF files can be read but not written"):
            found()
        return
    same(found(), expected[verb], 1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("verb", MODEL_VERBS)
def test_every_verb_on_a_model_finds_every_kind_of_it(verb: str, kind: str, shelf: Shelf, tmp_path: Path) -> None:
    run = MODEL_VERBS[verb]
    found = run(shelf, base_of(shelf, kind), tmp_path / "out")
    # Of the GGUF file one kind of weight is in float16.
    same(found, run(shelf, str(shelf.folder / "base"), tmp_path / "again"), 1e-2 if kind == "gguf" else 1e-5)


@pytest.mark.parametrize("verb", ADAPTER_VERBS)
def test_a_base_that_is_nowhere_is_the_same_line_at_every_verb(verb: str, shelf: Shelf, tmp_path: Path) -> None:
    adapter = naming(shelf, tmp_path / "a", MISSING, "v2")
    lines = []
    for said in (None, MISSING):
        with pytest.raises(AdapterError) as caught:
            ADAPTER_VERBS[verb](adapter, said, tmp_path / "out")
        lines.append(str(caught.value))
    looked = (
        f"there is no folder or file {Path.cwd() / MISSING}, it is not in the cache {shelf.folder / 'hub'}, and "
        "HF_HUB_OFFLINE is set, so the hub was not asked."
    )
    remedy = "Pass --base with a folder, a safetensors or GGUF file, or a hub name."
    assert lines[0].startswith(f"{adapter}: its config names the base '{MISSING}' (revision v2), but {looked} {remedy}")
    assert (
        lines[1]
        == f"{MISSING} (revision v2): as the base of {adapter}, a model is needed, but {looked} Check the name."
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("verb", MODEL_VERBS)
def test_a_model_that_is_nowhere_is_the_same_line_at_every_verb(verb: str, shelf: Shelf, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=f"^{MISSING}: a model is needed, but there is no .* HF_HUB_OFFLINE is set"):
        MODEL_VERBS[verb](shelf, MISSING, tmp_path / "out")


@pytest.mark.parametrize("cached", [True, False], ids=["cached", "folder"])
@pytest.mark.parametrize("verb", [*ADAPTER_VERBS, *(f"{verb} a model" for verb in MODEL_VERBS)])
def test_pickled_weights_are_refused_by_every_verb(
    verb: str, cached: bool, shelf: Shelf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "old").mkdir()
    shutil.copy(shelf.folder / "base" / "config.json", tmp_path / "old")
    torch.save({}, tmp_path / "old" / "pytorch_model.bin")
    write_repository(tmp_path / "hub", "org/old", {"main": tmp_path / "old"})
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    base = "org/old" if cached else str(tmp_path / "old")
    with pytest.raises(AdapterError, match=r"pytorch_model\.bin is a pickle, and reading it would run code"):
        if verb in ADAPTER_VERBS:
            ADAPTER_VERBS[verb](naming(shelf, tmp_path / "a", base), None, tmp_path / "out")
        else:
            MODEL_VERBS[verb.removesuffix(" a model")](shelf, base, tmp_path / "out")


@pytest.mark.parametrize("half", ["config alone", "a shard is missing"])
def test_half_a_model_in_the_cache_is_downloaded_at_the_revision_of_the_adapter(
    half: str, shelf: Shelf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "half").mkdir()
    shutil.copy(shelf.folder / "base" / "config.json", tmp_path / "half")
    if half == "a shard is missing":
        index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
        (tmp_path / "half" / "model.safetensors.index.json").write_text(json.dumps(index))
        save_file({"a": torch.ones(2, 2)}, tmp_path / "half" / "model-00001-of-00002.safetensors")
    write_repository(tmp_path / "hub", "org/half", {"v3": tmp_path / "half"})
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    folder = read_adapter_folder(naming(shelf, tmp_path / "a", "org/half", "v3"))
    assert base_at_hand(folder) is None
    with pytest.raises(AdapterError, match="it is not usable in the cache .* HF_HUB_OFFLINE is set"):
        find_base(None, folder)
    asked: dict[str, Any] = {}

    def download(name: str, **options: Any) -> str:
        asked.update(options, name=name)
        return str(shelf.folder / "base")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    found = find_base(None, folder)
    assert (found.name, found.path, found.revision) == ("org/half", shelf.folder / "base", "v3")
    assert (asked["name"], asked["revision"]) == ("org/half", "v3")
    assert {"*.safetensors", "*.json", "*.jinja"} <= set(asked["allow_patterns"]) and "*/*" in asked["ignore_patterns"]
    assert not any(pattern.endswith((".bin", ".pt", "*")) for pattern in asked["allow_patterns"])


def test_what_the_hub_answers_is_part_of_the_line(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(name: str, **options: Any) -> str:
        raise ConnectionError("the network is down\nand more")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with pytest.raises(
        AdapterError, match="it cannot be downloaded: ConnectionError: the network is down and more. Check"
    ):
        find_base(MISSING)


def test_a_relative_name_starts_at_the_working_directory_and_never_at_the_adapter(
    shelf: Shelf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = naming(shelf, tmp_path / "a", "./base")
    shutil.copytree(shelf.folder / "other", adapter / "base")
    with pytest.raises(AdapterError, match=f"no folder or file {Path.cwd() / 'base'}, and it is not a hub name either"):
        find_base(None, read_adapter_folder(adapter))
    monkeypatch.chdir(shelf.folder)
    assert find_base(None, read_adapter_folder(adapter)).path.resolve() == shelf.folder / "base"
    # A folder wins over a repository of the same name, as in transformers.
    shutil.copytree(shelf.folder / "base", tmp_path / "org" / "base")
    monkeypatch.chdir(tmp_path)
    assert not find_base(HUB).from_hub


def test_an_adapter_is_no_base(shelf: Shelf) -> None:
    with pytest.raises(AdapterError, match="this is an adapter and not a model"):
        find_base(shelf.adapter)


def test_adapters_of_two_revisions_are_not_fused(shelf: Shelf, tmp_path: Path) -> None:
    paths = [naming(shelf, tmp_path / name, HUB, name) for name in ("v1", "main")]
    with pytest.raises(AdapterError, match="main was trained on the base 'org/base' and v1 on 'org/base@v1'"):
        fuse(paths)
    twice = [
        naming(shelf, tmp_path / name, place) for name, place in (("x", "base"), ("y", str(shelf.folder / "base")))
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(shelf.folder)
        assert fuse(twice, allow_overlap=True).report.base.startswith("checked on base")
