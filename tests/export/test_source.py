"""A saved adapter is exported from its folder alone: the base is found, loaded, and checked to be the right one."""

import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file

from spectune.errors import AdapterError, ExportError, OutputError
from spectune.export import export_lora
from spectune.export import source as source_file

from .models import CASES, MODELS, adapted

FROM_FOLDER = [
    "llama-spectral_a",
    "llama-svft-rectangular",
    "bert-classifier",
    "bert-modules_to_save",
    "gpt2-conv1d",
    "t5",
]


@pytest.fixture
def saved(tmp_path):
    """Get a function that saves base and adapter of a case, and gets (model, adapter folder, base folder)."""

    def save(case, **options):
        torch.manual_seed(3)
        base = MODELS[CASES[case][0]]()
        base.save_pretrained(tmp_path / "base")
        base.name_or_path = str(tmp_path / "base")
        model = adapted(case, base, **options)
        model.save_pretrained(tmp_path / "adapter")
        return model, tmp_path / "adapter", tmp_path / "base"

    return save


def same_update(one, two):
    """Both folders hold the same tensors but for roundoff: singular vectors found twice differ by that."""
    a, b = (load_file(folder / "adapter_model.safetensors") for folder in (one, two))
    assert set(a) == set(b)
    for name in a:
        if ".lora_A." in name:
            other = name.replace("lora_A", "lora_B")
            dW, again = (t[other].double() @ t[name].double() for t in (a, b))
            assert (dW - again).abs().max() <= 1e-5 * dW.abs().max()
        elif ".lora_B." not in name:
            assert torch.equal(a[name], b[name])


@pytest.mark.parametrize("case", [*FROM_FOLDER, "method-specadapt", "method-spectral_r"])
def test_a_folder_gives_what_the_live_model_gives(saved, tmp_path, case):
    model, folder, base = saved(case)
    live = export_lora(model, tmp_path / "live")
    again = export_lora(folder, tmp_path / "again")
    assert live.ranks == again.ranks
    same_update(tmp_path / "live", tmp_path / "again")
    configs = [json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in ("live", "again")]
    assert configs[0] == configs[1]
    assert configs[0]["base_model_name_or_path"] == str(base)


def test_the_number_of_labels_is_read_from_the_trained_head(saved, tmp_path):
    _, folder, base = saved("bert-classifier")
    config = json.loads((base / "config.json").read_text())
    for name in ("id2label", "label2id", "num_labels"):
        config.pop(name, None)
    (base / "config.json").write_text(json.dumps(config))
    tensors = load_file(base / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if "classifier" not in name}
    save_file(kept, base / "model.safetensors", metadata={"format": "pt"})
    export_lora(folder, tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert tensors["base_model.model.classifier.weight"].shape == (3, 32)


def test_a_live_base_model_is_copied_and_left_alone(saved, tmp_path):
    _, folder, _ = saved("llama-spectral_a")
    torch.manual_seed(3)
    base = MODELS["llama"]()
    names = [name for name, _ in base.named_modules()]
    export_lora(folder, tmp_path / "out", base_model=base)
    assert names == [name for name, _ in base.named_modules()]
    assert all(parameter.requires_grad for parameter in base.parameters())


def test_the_trained_numbers_of_a_bfloat16_base_are_not_rounded(saved, tmp_path):
    model, folder, base = saved("llama-spectral_a")
    export_lora(model, tmp_path / "live")
    MODELS["llama"]().from_pretrained(base, dtype=torch.bfloat16).save_pretrained(base)
    loaded = source_file.open_source(folder, str(base), None).model
    assert next(loaded.parameters()).dtype == torch.bfloat16
    for _, _, module in source_file.spectral_modules(loaded):
        saved_numbers = load_file(folder / "adapter_model.safetensors")
        key = f"base_model.model.{module.name}.spectune_adapter.A_U"
        assert torch.equal(module.A_U, saved_numbers[key])


def refused(error, adapter, tmp_path, output="out", **options):
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(error) as caught:
        export_lora(adapter, tmp_path / output, **options)
    assert sorted(os.listdir(tmp_path)) == before
    assert "\n" not in str(caught.value)
    return str(caught.value)


def edit(folder, **values):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_another_base_is_refused(saved, tmp_path):
    _, folder, base = saved("llama-spectral_a")
    torch.manual_seed(4)
    other = MODELS["llama"]()
    assert "trained on another base weight" in refused(AdapterError, folder, tmp_path, base_model=other)
    assert "no module of BertForSequenceClassification" in refused(
        ValueError, folder, tmp_path, base_model=MODELS["bert"]()
    )


def test_a_base_with_fewer_layers_is_refused(saved, tmp_path):
    _, folder, base = saved("llama-spectral_a")
    model = MODELS["llama"]().from_pretrained(base, num_hidden_layers=1)
    found = refused(AdapterError, folder, tmp_path, base_model=model)
    assert "has no place for the tensor 'base_model.model.model.layers.1." in found


def test_a_base_that_is_not_there_is_one_clear_line(saved, tmp_path):
    _, folder, base = saved("llama-spectral_a")
    assert "there is no such folder or file" in refused(AdapterError, folder, tmp_path, base_model=tmp_path / "no")
    edit(folder, base_model_name_or_path=None)
    assert "does not name its base model" in refused(AdapterError, folder, tmp_path)


def test_only_transformers_is_imported_on_the_word_of_a_file(saved, tmp_path):
    _, folder, base = saved("llama-svft-random")
    for mapping in (
        {"parent_library": "os", "base_model_class": "system"},
        {"parent_library": "transformers.utils", "base_model_class": "logging"},
        {"parent_library": "transformers.no_such", "base_model_class": "X"},
        None,
    ):
        edit(folder, auto_mapping=mapping, base_model_name_or_path=str(base))
        assert "Pass the model itself as base_model" in refused(ExportError, folder, tmp_path)


def test_a_base_that_carries_adapters_is_refused(saved, tmp_path):
    model, folder, _ = saved("llama-spectral_a")
    assert "has adapters already" in refused(ExportError, folder, tmp_path, base_model=model)
    assert "has no load_adapter" in refused(ExportError, folder, tmp_path, base_model=torch.nn.Linear(2, 2))


def test_damaged_and_foreign_adapters_are_refused(saved, tmp_path):
    _, folder, _ = saved("llama-spectral_a")
    assert "holds only one adapter" in refused(ExportError, folder, tmp_path, adapter_name="default")
    tensors = load_file(folder / "adapter_model.safetensors")
    missing = {
        name: tensor
        for name, tensor in tensors.items()
        if not name.endswith("layers.0.self_attn.q_proj.spectune_adapter.A_U")
    }
    save_file(missing, folder / "adapter_model.safetensors")
    assert "layers.0.self_attn.q_proj: the adapter file " in refused(AdapterError, folder, tmp_path)
    (folder / "adapter_model.safetensors").write_bytes(b"12345678901")
    assert "not a safetensors file" in refused(AdapterError, folder, tmp_path)


def test_an_adapter_of_another_method_is_named(saved, tmp_path):
    _, folder, _ = saved("llama-spectral_a")
    edit(folder, peft_type="LORA")
    assert "a SPECTUNE adapter is needed, but this is a LORA one" in refused(AdapterError, folder, tmp_path)


@pytest.mark.parametrize("output", ["adapter", "."])
def test_the_adapter_itself_is_never_replaced(saved, tmp_path, output):
    _, folder, _ = saved("llama-spectral_a")
    found = refused(OutputError, folder, tmp_path, output=output, overwrite=True)
    assert "would replace" in found
    assert (folder / "adapter_model.safetensors").exists()


@pytest.mark.parametrize("how", ["live", "named by the config", "passed"])
def test_the_base_is_never_replaced(saved, tmp_path, how):
    model, folder, base = saved("llama-spectral_a")
    options = {"base_model": str(base)} if how == "passed" else {}
    adapter = model if how == "live" else folder
    with pytest.raises(OutputError, match="would replace .*base, a source"):
        export_lora(adapter, base, overwrite=True, **options)
    assert (base / "model.safetensors").exists()
