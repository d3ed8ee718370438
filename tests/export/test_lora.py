"""An exported folder is an ordinary LoRA: plain PEFT gives the outputs of the spectral adapter."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from spectune.errors import ExportError, OutputError
from spectune.export import export_lora
from spectune.export import lora as lora_file

from ..abilities import LOADS_MODULES_NATIVELY
from .models import CASES, MODELS, adapted, batch

# Two roads to the same logits in float32 on models of two layers and sums of at most 48 terms:
# sqrt(6 layers) * (1 + sqrt(48)) * 6e-8 = 1.2e-6 of the largest logit, and 16 for amplification: 4 are met where a
# processor adds without fused multiplications.
TOLERANCE = 2e-5


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """Case -> (our logits, the export, plain PEFT's logits, transformers' own, the base's)."""
    root = tmp_path_factory.mktemp("exports")
    jobs, ours = {}, {}
    for case, (kind, _) in CASES.items():
        folder = root / case
        base = MODELS[kind]()
        base.save_pretrained(folder / "base")
        model = adapted(case, base)
        exported = export_lora(model, folder / "lora")
        torch.save(batch(kind), folder / "batch")
        with torch.no_grad():
            ours[case] = model(**batch(kind)).logits, exported
        for native in (False, True):
            jobs[f"{case} {native}"] = {
                "class": type(base).__name__,
                "base": str(folder / "base"),
                "lora": str(folder / "lora"),
                "batch": str(folder / "batch"),
                "native": native,
            }
    (root / "jobs.json").write_text(json.dumps(jobs))
    script = Path(__file__).with_name("plain_peft.py")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, str(script), str(root / "jobs.json"), str(root / "answers")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    theirs = torch.load(root / "answers")
    return {
        case: (
            *ours[case],
            theirs[f"{case} False"]["lora"],
            theirs[f"{case} True"]["lora"],
            theirs[f"{case} False"]["plain"],
        )
        for case in CASES
    }


def trained_whole(case):
    """Whether modules outside of the adapter are trained with it."""
    return "modules_to_save" in CASES[case][1] or CASES[case][1].get("task_type") == "SEQ_CLS"


@pytest.mark.parametrize("case", CASES)
def test_plain_peft_gives_the_logits_of_the_spectral_adapter(answers, case):
    ours, exported, theirs, native, plain = answers[case]
    largest = ours.abs().max()
    assert (ours - theirs).abs().max() <= TOLERANCE * largest
    if LOADS_MODULES_NATIVELY or not trained_whole(case):
        assert (ours - native).abs().max() <= TOLERANCE * largest
    # The adapter does something, so agreeing means something.
    assert (ours - plain).abs().max() > 1e-3 * largest
    assert exported.proof.max_relative_error < 1e-6
    assert exported.proof.logits.skipped is None


def test_the_ranks_are_those_of_the_algebra(answers):
    def ranks(case):
        return {".".join(name.split(".")[-2:]): rank for name, rank in answers[case][1].exact_ranks.items()}

    assert set(ranks("llama-spectral_a").values()) == {6}
    assert ranks("llama-svft-rectangular") == {"self_attn.q_proj": 32, "self_attn.k_proj": 16, "mlp.down_proj": 32}
    assert set(ranks("llama-svft-random").values()) <= set(range(1, 13))
    # 2r = 28 directions of a 16x32 weight: no LoRA needs more than 16.
    assert ranks("llama-wider-than-the-weight") == {"self_attn.q_proj": 28, "self_attn.k_proj": 16}
    assert sorted(answers["llama-rank_pattern"][1].exact_ranks.values()) == [4, 4, 4, 10, 14, 14]


def test_the_export_says_what_a_server_must_allow(answers):
    exported = answers["llama-rank_pattern"][1]
    assert (exported.max_rank, exported.vllm_max_lora_rank) == (14, 16)


@pytest.mark.parametrize(("case", "expected"), [("gpt2-conv1d", True), ("llama-spectral_a", False)])
def test_transposed_layers_are_declared(answers, case, expected):
    config = json.loads((answers[case][1].path / "adapter_config.json").read_text())
    assert config["fan_in_fan_out"] is expected


def test_a_folder_holds_card_config_and_tensors_and_nothing_else(tmp_path):
    exported = export_lora(adapted("llama-spectral_a"), tmp_path / "out")
    assert sorted(os.listdir(tmp_path / "out")) == ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    assert exported.path == tmp_path / "out"
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    stem = "base_model.model.model.layers.0.self_attn.v_proj.lora_"
    assert tensors[stem + "A.weight"].shape == (6, 32)
    assert tensors[stem + "B.weight"].shape == (16, 6)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}


def test_an_update_of_zero_is_exported_as_zero(tmp_path):
    exported = export_lora(adapted("llama-svft-rectangular", init_weights=True), tmp_path / "out")
    assert all(rank >= 1 for rank in exported.ranks.values())
    assert {row[2:] for row in exported.proof.table()} == {(0.0, 0.0)}
    assert exported.proof.logits.error == 0.0


def test_fully_trained_modules_stand_under_the_keys_that_peft_writes(tmp_path):
    model = adapted("bert-modules_to_save")
    model.save_pretrained(tmp_path / "spectral")
    export_lora(model, tmp_path / "lora")
    saved = load_file(tmp_path / "spectral" / "adapter_model.safetensors")
    exported = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    kept = {name: tensor for name, tensor in saved.items() if ".spectune_" not in name}
    assert {name for name in exported if ".lora_" not in name} == set(kept)
    assert len(kept) == 4
    assert all(torch.equal(exported[name], tensor) for name, tensor in kept.items())


def test_layers_of_several_ranks_get_the_largest_unless_told_not_to(tmp_path):
    model = adapted("llama-rank_pattern")
    padded = export_lora(model, tmp_path / "padded")
    plain = export_lora(model, tmp_path / "plain", pad=False)
    assert set(padded.ranks.values()) == {14} and padded.exact_ranks == plain.ranks == plain.exact_ranks
    assert sorted(plain.ranks.values()) == [4, 4, 4, 10, 14, 14]
    configs = [json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in ("padded", "plain")]
    assert (configs[0]["r"], configs[0]["lora_alpha"], configs[0]["rank_pattern"]) == (14, 14, {})
    assert configs[1]["rank_pattern"] == configs[1]["alpha_pattern"] != {}
    with pytest.raises(ExportError, match="pad_to=16: with pad=False no layer is padded"):
        export_lora(model, tmp_path / "other", pad_to=16, pad=False)


def test_padding_gives_every_layer_one_rank_and_changes_nothing(tmp_path):
    model = adapted("llama-rank_pattern")
    exported = export_lora(model, tmp_path / "out", pad_to=16)
    assert set(exported.ranks.values()) == {16}
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["rank_pattern"]) == (16, 16, {})
    assert exported.proof.max_relative_error < 1e-6
    with pytest.raises(ExportError, match="pad_to=13 is less than the rank of this update .14."):
        export_lora(model, tmp_path / "other", pad_to=13)


@pytest.mark.parametrize(("dtype", "worst"), [(torch.bfloat16, 2**-6), (torch.float16, 2**-9)])
def test_half_precision_factors_are_off_by_their_rounding_and_no_more(tmp_path, dtype, worst):
    exported = export_lora(adapted("llama-svft-rectangular"), tmp_path / "out", dtype=dtype)
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {dtype}
    assert 1e-6 < exported.proof.max_relative_error < worst


def test_one_of_several_adapters_is_exported_whichever_is_active(tmp_path):
    model = adapted("llama-spectral_a")
    model.add_adapter("other", model.peft_config["default"])
    model.set_adapter("other")
    with pytest.raises(ExportError, match="several spectral adapters: default, other. Choose one"):
        export_lora(model, tmp_path / "out")
    with pytest.raises(ExportError, match="no spectral adapter 'defualt'. Did you mean 'default'"):
        export_lora(model, tmp_path / "out", adapter_name="defualt")
    exported = export_lora(model, tmp_path / "out", adapter_name="default")
    assert exported.adapter_name == "default"
    assert exported.proof.logits.layers_run == 4


def test_exporting_leaves_the_model_as_it_was(tmp_path):
    model = adapted("llama-spectral_a").train()
    model.add_adapter("other", model.peft_config["default"])
    model.set_adapter("other")
    x = batch("llama")
    before = model(**x).logits
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    export_lora(model, tmp_path / "out", adapter_name="default")
    assert all(module.training for module in model.modules())
    assert flags == {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    assert model.active_adapter == "other"
    assert torch.equal(model(**x).logits, before)


@pytest.mark.parametrize("moment", ["save_tensors", "write_atomically", "verify_lora"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_export_leaves_nothing_behind(tmp_path, monkeypatch, moment, error):
    def interrupted(*args, **kwargs):
        raise error("stopped")

    monkeypatch.setattr(lora_file, moment, interrupted)
    with pytest.raises(error, match="stopped"):
        export_lora(adapted("llama-spectral_a"), tmp_path / "new" / "out")
    assert os.listdir(tmp_path) == []


def test_a_folder_that_holds_something_is_refused_before_any_work(tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").touch()
    worked = []
    monkeypatch.setattr(lora_file, "open_source", lambda *args: worked.append(args))
    with pytest.raises(OutputError, match="contains 1 entry"):
        export_lora(adapted("llama-spectral_a"), tmp_path / "out")
    assert not worked
    monkeypatch.undo()
    export_lora(adapted("llama-spectral_a"), tmp_path / "out", overwrite=True)
    assert "precious" not in os.listdir(tmp_path / "out")


def refused(model, folder, **options):
    with pytest.raises(ExportError) as caught:
        export_lora(model, folder / "out", **options)
    assert os.listdir(folder) == []
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_is_not_exact_is_refused(tmp_path):
    model = adapted("llama-spectral_a")
    assert "no spectral adapter" in refused(torch.nn.Linear(2, 2), tmp_path)
    assert "bias='all'" in refused(adapted("bert-classifier", bias="all"), tmp_path)
    assert "dtype=torch.int8" in refused(model, tmp_path, dtype=torch.int8)
    assert "Leave base_model out" in refused(model, tmp_path, base_model="somewhere")
    layer = model.get_submodule("base_model.model.model.layers.1.self_attn.q_proj")
    layer.merge()
    assert "layers.1.self_attn.q_proj: default is merged into the base" in refused(model, tmp_path)
    layer.unmerge()
    layer.base_layer = torch.nn.Conv2d(3, 3, 1)
    assert "a Conv2d has no exact LoRA" in refused(model, tmp_path)


def test_a_broken_adapter_is_named_by_its_layer(tmp_path):
    model = adapted("llama-spectral_a")
    layer = model.get_submodule("base_model.model.model.layers.1.self_attn.v_proj")
    layer.spectune_adapter["default"].A_U.data[0, 0] = float("nan")
    assert "layers.1.self_attn.v_proj: the update in float32 contains NaN" in refused(model, tmp_path)
    layer.spectune_adapter["default"].A_U.data[0, 0] = 1e6
    assert "in float16" in refused(model, tmp_path, dtype=torch.float16)


def test_nan_in_a_module_trained_in_full_is_not_exported(tmp_path):
    model = adapted("bert-classifier")
    with torch.no_grad():
        model.base_model.model.classifier.modules_to_save["default"].bias[0] = float("nan")
    with pytest.raises(ExportError, match="classifier.bias: trained in full, and contains NaN"):
        export_lora(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()
