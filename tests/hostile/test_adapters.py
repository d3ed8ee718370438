"""Adapters from strangers: what their configs and tensors may try, and how it ends."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from spectune import SpectralConfig, merge_checkpoint
from spectune.adapter import saved_modules
from spectune.checkpoint import AdapterFolder, base_at_hand, find_base, open_checkpoint, read_adapter_folder
from spectune.errors import AdapterError, OptionError, SpectuneError
from spectune.export import source
from spectune.fusion.adapters import open_adapters
from tests.golden.make import HERE, Base

Change = Callable[[dict[str, Any], dict[str, torch.Tensor]], None]


def changed(case: str, target: Path, change: Change) -> Path:
    """A golden adapter with something done to its config and tensors."""
    config = json.loads((HERE / case / "adapter_config.json").read_text())
    tensors = load_file(HERE / case / "adapter_model.safetensors")
    change(config, tensors)
    target.mkdir(exist_ok=True)
    (target / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, target / "adapter_model.safetensors")
    return target


def with_config(**changes: Any) -> Change:
    return lambda config, tensors: config.update(changes)


def key(tensors: dict[str, torch.Tensor], name: str) -> str:
    return next(key for key in tensors if key.endswith("." + name))


def put(name: str, make: Callable[[torch.Tensor], torch.Tensor]) -> Change:
    def change(config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        tensors[key(tensors, name)] = make(tensors[key(tensors, name)]).contiguous()

    return change


def drop(name: str) -> Change:
    return lambda config, tensors: tensors.__delitem__(key(tensors, name))


def surplus(config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    tensors["base_model.model.lin0.spectune_adapter.extra"] = torch.ones(1)


BAD: dict[str, tuple[str, Change, str]] = {
    "unknown method": ("spectral_a", with_config(method="spectral_b"), "unknown method 'spectral_b'"),
    "method is a list": ("spectral_a", with_config(method=["spectral_a"]), "unknown method"),
    "r of a billion": ("spectral_a", with_config(r=10**9), r"r=1000000000 is absurd \(limit 1,048,576"),
    "r is a text": ("spectral_a", with_config(r="2"), "r must be an integer"),
    "another r": ("spectral_a", with_config(r=3), "do not fit the base weight"),
    "d of a trillion": ("svft", with_config(off_diagonals=10**12), "off_diagonals=1000000000000"),
    "seed of 40 bits": ("lidb", with_config(basis_seed=2**40), "basis_seed"),
    "columns of texts": ("spectral_a", with_config(columns=["0", "1"]), "a list of columns must contain only integers"),
    "a column 100,000 times": ("spectral_a", with_config(r=100_000, columns=[1] * 100_000), "occurs twice"),
    "columns is a fraction": ("spectral_a", with_config(columns=0.5), "must be a word, a start index or a list"),
    "rank_pattern is a list": ("spectral_a", with_config(rank_pattern=["lin0"]), "not a map from layers to ranks"),
    "endless pattern": ("spectral_a", with_config(rank_pattern={"(" * 400: 2}), "not a usable pattern"),
    "svd is a number": ("spectral_a", with_config(svd=3), "svd=3 is not a map of options"),
    "solver is a list": ("spectral_a", with_config(svd={"solver": []}), "svd.solver="),
    "dropout is a text": ("specadapt", with_config(weight_dropout="x"), "wrong type"),
    "a tensor is missing": ("spectral_a", drop("A_U"), r"has no tensor 'A_U': it is incomplete"),
    "the sketch is missing": ("spectral_a", drop("sketch"), r"has no tensor 'sketch': it is incomplete"),
    "the shared core is missing": ("specadapt", drop("H"), r"has no tensor 'H': it is incomplete"),
    "half a basis": ("spectral_a-embedded", drop("S_R"), r"has no tensor 'S_R': it is incomplete"),
    "a tensor too many": ("spectral_a", surplus, "extra"),
    "another shape": ("spectral_a", put("A_U", lambda t: t[:, :1]), "do not fit the base weight"),
    "another sketch": ("spectral_a", put("sketch", lambda t: t[:, :2]), "do not fit"),
    "a basis of another rank": ("spectral_a-embedded", put("U_OR", lambda t: t[:, :1]), "but the config needs 8x2"),
    "NaN": ("spectral_a", put("A_U", lambda t: t * float("nan")), "'A_U' contains NaN or infinity"),
    "infinite rotation": ("spectral_r", put("skew_U", lambda t: t + float("inf")), "'skew_U' contains NaN or infinity"),
    "NaN in the sketch": ("spectral_a", put("sketch", lambda t: t * float("nan")), "'sketch' contains NaN or infinity"),
    "NaN in the basis": ("spectral_a-embedded", put("Vh_RI", lambda t: t * float("nan")), "'Vh_RI' contains NaN"),
    "a place outside": ("svft-top_k", put("rows", lambda t: t + 1_000), "places outside of the 8x8 core"),
    "a place twice": ("svft-top_k", put("cols", lambda t: t * 0), "or one twice"),
    "a foreign sketch": ("spectral_a", put("sketch", torch.randn_like), "trained on another base weight"),
    "a foreign basis": ("spectral_a-embedded", put("U_OR", torch.randn_like), "another base"),
}


@pytest.mark.parametrize("bad", BAD)
def test_a_bad_adapter_is_refused_where_it_is_read_without_a_model(bad: str, tmp_path: Path) -> None:
    case, change, words = BAD[bad]
    folder = changed(case, tmp_path / "adapter", change)
    with pytest.raises(SpectuneError, match=words):
        list(saved_modules(read_adapter_folder(folder), open_checkpoint(HERE / "base.safetensors")))
    with pytest.raises(SpectuneError, match=words):
        merge_checkpoint(HERE / "base.safetensors", folder, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


EMBEDDED = [bad for bad, (case, _, _) in BAD.items() if case == "spectral_a-embedded" and bad != "a foreign basis"]


@pytest.mark.parametrize("bad", EMBEDDED)
def test_a_bad_basis_is_refused_where_it_is_fused_from_the_file_alone(bad: str, tmp_path: Path) -> None:
    case, change, _ = BAD[bad]
    (adapter,) = open_adapters([changed(case, tmp_path / "adapter", change)])
    with pytest.raises(AdapterError):
        list(adapter.parts(None))


def test_a_rank_in_the_config_alone_allocates_nothing(tmp_path: Path) -> None:
    """A file of a kilobyte whose config asks for a million directions of a basis that it does not bring."""

    def only_a_scrap(config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        stem = "base_model.model.lin0.spectune_adapter."
        tensors.clear()
        tensors |= {f"{stem}U_OR": torch.ones(8, 2), f"{stem}Vh_RI": torch.ones(2, 8)}
        config.update(r=2**20, columns="top")

    folder = changed("spectral_a-embedded", tmp_path / "adapter", only_a_scrap)
    with pytest.raises(AdapterError, match="incomplete"):
        list(saved_modules(read_adapter_folder(folder), open_checkpoint(HERE / "base.safetensors")))
    with pytest.raises(AdapterError, match="incomplete"):
        list(open_adapters([folder])[0].parts(None))


@pytest.mark.parametrize(
    "changes",
    [
        {"method": []},
        {"method": {"a": 1}},
        {"rank_pattern": ["a"]},
        {"svd": 5},
        {"svd": {"nonsense": 1}},
        {"singular_decay": float("nan")},
        {"singular_decay": "a"},
        {"target_modules": [["lin0"]]},
        {"target_modules": {"a": 1}},
        {"modules_to_save": 3},
        {"columns": ["0"]},
        {"columns": [1] * 100_000, "r": 100_000},
        {"off_diagonals": 10**12, "method": "svft", "pattern": "banded"},
        {"r": 10**9},
        {"layers_pattern": 3, "layers_to_transform": [0]},
        {"save_basis": ["always"]},
        {"format_version": "1"},
        {"rank_pattern": {"(a|aa)+[bc]" * 400: 2}},
    ],
    ids=lambda changes: str(changes)[:40],
)
def test_a_config_of_wrong_types_is_refused_before_peft_uses_it(changes: dict[str, Any]) -> None:
    with pytest.raises(SpectuneError):
        get_peft_model(Base(), SpectralConfig(**{"r": 2, "target_modules": ["lin0"], **changes}))


def test_a_pickle_is_refused_through_peft_too(tmp_path: Path) -> None:
    folder = changed("spectral_a", tmp_path / "adapter", with_config())
    tensors = load_file(folder / "adapter_model.safetensors")
    (folder / "adapter_model.safetensors").unlink()
    torch.save(tensors, folder / "adapter_model.bin")
    with pytest.raises(AdapterError, match=r"adapter_model\.bin is a pickle"):
        PeftModel.from_pretrained(Base(), str(folder))


def test_a_pickled_base_that_an_adapter_names_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers as tf

    config = tf.GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=8, n_positions=8)
    base = tmp_path / "base"
    tf.GPT2LMHeadModel(config).save_pretrained(base)
    torch.save(load_file(base / "model.safetensors"), base / "pytorch_model.bin")
    (base / "model.safetensors").unlink()
    folder = changed(
        "spectral_a", tmp_path / "adapter", with_config(base_model_name_or_path=str(base), task_type="CAUSAL_LM")
    )
    with pytest.raises(SpectuneError, match=r"names the base .*pytorch_model\.bin is a pickle"):
        source.open_source(folder, None, None)


@pytest.mark.parametrize(
    "changes",
    [
        {"auto_mapping": {"parent_library": "os", "base_model_class": "system"}},
        {"auto_mapping": {"parent_library": "transformers..\0", "base_model_class": "x"}},
        {"auto_mapping": {"parent_library": "transformers.utils", "base_model_class": "os"}},
        {"auto_mapping": "transformers"},
        {"auto_mapping": ["a"]},
        {"task_type": ["CAUSAL_LM"]},
        {"task_type": {"a": 1}},
    ],
    ids=str,
)
def test_a_config_chooses_no_class_but_a_model_of_transformers(changes: dict[str, Any], tmp_path: Path) -> None:
    from spectune.errors import ExportError

    folder = changed("spectral_a", tmp_path / "adapter", with_config(base_model_name_or_path="somewhere", **changes))
    with pytest.raises(ExportError, match="does not say which transformers model"):
        source.open_source(folder, None, None)


def test_a_head_without_numbers_chooses_no_count_of_labels(tmp_path: Path) -> None:
    """2^60 labels would be 2^60 names in a dict; an empty tensor of that side costs the file no byte."""
    name = "base_model.model.classifier.weight"
    header = json.dumps({name: {"dtype": "F32", "shape": [2**60, 0], "data_offsets": [0, 0]}}).encode()
    (tmp_path / "adapter_model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "SPECTUNE", "task_type": "SEQ_CLS"}')
    with pytest.raises(AdapterError, match="not a safetensors file"):
        read_adapter_folder(tmp_path)


@pytest.mark.parametrize("name", ["a" * 5_000, "a\0b", "../" * 2_000, "\x1b[2J"])
def test_a_base_name_that_no_disk_can_hold_is_not_there(name: str, tmp_path: Path) -> None:
    folder = read_adapter_folder(changed("spectral_a", tmp_path / "a", with_config(base_model_name_or_path=name)))
    assert base_at_hand(folder) is None
    with pytest.raises(AdapterError, match="its config names the base") as caught:
        find_base(None, folder)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 2_100


@pytest.mark.parametrize("revision", ["../../../../secret", "/etc/hostname", "a\\b", ["main"], {"a": 1}, 7, "a\nb"])
def test_a_revision_that_would_lead_out_of_the_cache_is_refused(revision: Any, tmp_path: Path) -> None:
    change = with_config(base_model_name_or_path="some/model", revision=revision)
    folder = read_adapter_folder(changed("spectral_a", tmp_path / "a", change))
    for looked in (base_at_hand, lambda folder: find_base(None, folder)):
        with pytest.raises(AdapterError, match="is not a valid revision"):
            looked(folder)


@pytest.mark.parametrize("name", [["a"], {"a": 1}, 7, None, ""])
def test_a_base_name_that_is_no_text_names_no_base(name: Any, tmp_path: Path) -> None:
    folder = read_adapter_folder(changed("spectral_a", tmp_path / "a", with_config(base_model_name_or_path=name)))
    assert base_at_hand(folder) is None
    with pytest.raises(AdapterError, match="does not name its base model. Pass --base"):
        find_base(None, folder)


def test_numbers_of_another_kind_are_cast_and_not_believed(tmp_path: Path) -> None:
    """float16 and float64 numbers are what others may save; integers in place of them are cast the same way."""
    for dtype in (torch.float64, torch.float16):
        folder = changed("spectral_a", tmp_path / str(dtype), put("A_U", lambda t, dtype=dtype: t.to(dtype)))
        for *_, module in saved_modules(read_adapter_folder(folder), open_checkpoint(HERE / "base.safetensors")):
            assert module.delta().left_OP.dtype == torch.float32


def test_nothing_reads_pickles_or_runs_code_of_a_file() -> None:
    """No `torch.load`, `pickle`, `eval`, unsafe YAML or `trust_remote_code=True` stands anywhere in the library."""
    import ast

    forbidden = {
        "eval",
        "exec",
        "torch.load",
        "pickle.load",
        "pickle.loads",
        "marshal.loads",
        "joblib.load",
        "os.system",
    }
    forbidden |= {"yaml.unsafe_load", "yaml.full_load", "yaml.unsafe_load_all", "numpy.load", "np.load"}
    found = []
    for path in sorted((Path(__file__).parents[2] / "src" / "spectune").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in forbidden:
                # torch's restricted unpickler, as transformers reads the same files of a checkpoint.
                safe = {("allow_pickle", "False"), ("weights_only", "True")}
                if safe & {(word.arg, ast.unparse(word.value)) for word in node.keywords}:
                    continue
                found.append(f"{path.name}: {ast.unparse(node.func)}")
            if isinstance(node, ast.keyword) and node.arg == "trust_remote_code" and ast.unparse(node.value) != "False":
                found.append(f"{path.name}: trust_remote_code={ast.unparse(node.value)}")
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
                found += [f"{path.name}: import {name}" for name in names if name in ("pickle", "dill", "cloudpickle")]
    # submitit writes jobs, into the folder of the one who runs the sweep.
    assert found == ["on_slurm.py: import cloudpickle"]


def test_the_folder_type_says_what_it_is(tmp_path: Path) -> None:
    folder = read_adapter_folder(changed("spectral_a", tmp_path / "adapter", with_config(peft_type="LORA")))
    assert isinstance(folder, AdapterFolder)
    with pytest.raises(AdapterError, match="this is a LORA one"):
        folder.require("SPECTUNE")
    with pytest.raises(OptionError):
        SpectralConfig(method="spectral_a", nonsense=1)
