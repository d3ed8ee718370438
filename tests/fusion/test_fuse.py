"""From saved adapters to a saved adapter: what goes in comes out, and what does not belong together is refused."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

import spectune
from spectune import export_lora, fuse, merge_checkpoint
from spectune.algebra import dense
from spectune.checkpoint import LoraFile, open_checkpoint
from spectune.errors import AdapterError, ExportError, OptionError, OutputError, SpectuneError
from spectune.fusion import folder
from spectune.fusion.compact import Compact
from spectune.records import Delta

from ..models import MODELS, output
from .parts import base_folder, load_base, lora, random, save_adapter, spectral


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Saved adapters of one tiny base: three with disjoint columns, and others."""
    folder = tmp_path_factory.mktemp("adapters")
    for seed, (name, config) in enumerate(
        {
            "a": spectral("top"),  # keeps a sketch only
            "b": spectral(3),
            "c": spectral([9, 7], r=2),
            "clash": spectral([2, 11], r=2),
            "q_only": spectral([12], r=1, target_modules=["q_proj"]),
            "shifted": spectral([15], r=1, target_modules=["q_proj"], train_singular_values=True),
            "rotated": spectral("top", r=4, method="spectral_r"),
            "lora": lora(4),
            "rslora": lora(2, use_rslora=True),
            "own0": spectral(None, method="orthogonal_adaptation", concept=0),
            "own1": spectral(None, method="orthogonal_adaptation", concept=1),
        }.items()
    ):
        save_adapter(folder, name, config, seed)
    return folder


def update(folder: Path, name: str) -> dict[str, torch.Tensor]:
    """Layer -> the dense update, as PEFT itself gives it."""
    model = PeftModel.from_pretrained(load_base(base_folder(folder)), folder / name)
    layers = {path: module for path, module in model.named_modules() if hasattr(module, "get_delta_weight")}
    with torch.no_grad():
        return {p.removeprefix("base_model.model."): m.get_delta_weight("default") for p, m in layers.items()}


def assert_same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], tolerance: float = 2e-6) -> None:
    assert found.keys() == wanted.keys()
    for layer, update_OI in wanted.items():
        torch.testing.assert_close(found[layer].float(), update_OI, rtol=0, atol=tolerance, msg=layer)
        assert update_OI.abs().max() > 1e-2


def weighted(folder: Path, names: list[str], weights: list[float]) -> dict[str, torch.Tensor]:
    updates = [update(folder, name) for name in names]
    return {layer: sum(w * u[layer] for w, u in zip(weights, updates, strict=True)) for layer in updates[0]}


def test_disjoint_columns_fuse_exactly_at_weight_1(shelf: Path, tmp_path: Path) -> None:
    fused = fuse([shelf / "a", shelf / "b", shelf / "c"], weights=1)
    assert_same(
        {layer: dense(delta) for layer, delta in fused.deltas.items()}, weighted(shelf, ["a", "b", "c"], [1] * 3)
    )
    assert "checked on" in fused.report.base and all(not pair.shared_columns for pair in fused.report.pairs)
    saved = fused.save(tmp_path / "fused")
    config = json.loads((tmp_path / "fused" / "adapter_config.json").read_text())
    assert config["columns"] == [0, 1, 2, 3, 4, 5, 7, 9] and config["r"] == 8 and saved.kind == "spectral_a"
    assert config["format_version"] == 1
    shutil.copytree(tmp_path / "fused", shelf / "fused", dirs_exist_ok=True)
    assert_same(update(shelf, "fused"), weighted(shelf, ["a", "b", "c"], [1] * 3))
    assert saved.max_rank == 16 and saved.error < 1e-6


def test_the_default_weight_is_1_over_n(shelf: Path) -> None:
    fused = fuse([shelf / "a", shelf / "b"])
    assert fused.report.weights == (0.5, 0.5)
    half = fuse([shelf / "a", shelf / "b"], weights=[0.5, 0.5])
    assert_same({n: dense(d) for n, d in fused.deltas.items()}, {n: dense(d).float() for n, d in half.deltas.items()})
    assert 0.3 < fused.report.kept["a"] < 0.6


def test_a_fused_adapter_fuses_exports_and_merges_as_any_other(shelf: Path, tmp_path: Path) -> None:
    base = base_folder(shelf)
    fuse([shelf / "a", shelf / "b"], weights=1).save(tmp_path / "ab")
    fuse([tmp_path / "ab", shelf / "c"], weights=1).save(tmp_path / "abc")
    together = weighted(shelf, ["a", "b", "c"], [1, 1, 1])
    done = export_lora(tmp_path / "abc", tmp_path / "lora", base_model=base, check_logits=False)
    assert done.max_rank == 16
    merged = merge_checkpoint(base, tmp_path / "abc", tmp_path / "merged")
    before, after = open_checkpoint(base), open_checkpoint(merged.path)
    for layer, update_OI in together.items():
        name = next(name for name in before.names if name.endswith(f"{layer}.weight"))
        torch.testing.assert_close(after.tensor(name), before.tensor(name) + update_OI, rtol=0, atol=1e-5)


def test_layers_with_different_columns_are_given_the_same_by_the_base(shelf: Path, tmp_path: Path) -> None:
    fused = fuse([shelf / "b", shelf / "q_only"], weights=1)
    assert {part.columns for part in fused.parts.values()} == {(3, 4, 5, 12)}
    both, q_only = update(shelf, "b"), update(shelf, "q_only")
    wanted = {layer: both[layer] + q_only.get(layer, torch.tensor(0.0)) for layer in both}
    assert_same({layer: dense(delta) for layer, delta in fused.deltas.items()}, wanted)
    fused.save(tmp_path / "fused")
    model = PeftModel.from_pretrained(load_base(base_folder(shelf)), tmp_path / "fused")
    assert sum(hasattr(module, "get_delta_weight") for module in model.modules()) == len(both)


def test_trained_singular_values_are_fused_saved_and_exported_exactly(shelf: Path, tmp_path: Path) -> None:
    fused = fuse([shelf / "b", shelf / "shifted"], weights=1)
    saved = fused.save(shelf / "with_shifts", overwrite=True)
    both, shifted = update(shelf, "b"), update(shelf, "shifted")
    wanted = {layer: both[layer] + shifted.get(layer, torch.tensor(0.0)) for layer in both}
    assert_same(update(shelf, "with_shifts"), wanted)
    assert saved.kind == "spectral_a" and saved.error < 1e-6
    export_lora(shelf / "with_shifts", shelf / "with_shifts_lora", overwrite=True)
    assert_same(update(shelf, "with_shifts_lora"), wanted)


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_error_of_a_saved_lora_covers_the_rounding_of_either_factor(side: str) -> None:
    S_P = torch.tensor([4.0, 1.0], dtype=torch.float64)  # their roots are exact in float32
    X_OP, Yh_PI = torch.linalg.qr(random(8, 2))[0], torch.linalg.qr(random(8, 2, seed=1))[0].mT
    exact = torch.eye(8, dtype=torch.float64)[:2]
    X_OP, Yh_PI = (X_OP, exact) if side == "left" else (exact.mT, Yh_PI)
    B_OP, A_PI, _ = Compact(X_OP, S_P, Yh_PI).factors(2)
    missing = torch.linalg.matrix_norm(B_OP.float().double() @ A_PI.float().double() - B_OP @ A_PI)
    assert 0 < float(missing) / float(S_P.norm()) <= folder._rounding(B_OP, A_PI, float(S_P.norm())) < 1e-6


def test_average_takes_every_method_and_rank(shelf: Path, tmp_path: Path) -> None:
    names, weights = ["a", "rotated", "lora", "rslora"], [0.5, 0.25, 1.0, -0.3]
    fused = fuse([shelf / name for name in names], rule="average", weights=weights)
    saved = fused.save(shelf / "averaged", overwrite=True)
    assert saved.kind == "lora" and 4 + 4 + 2 < saved.max_rank <= 6 + 4 + 4 + 2 and saved.error < 1e-6
    assert_same(update(shelf, "averaged"), weighted(shelf, names, weights))
    assert "for a LoRA, only names and shapes" in fused.report.base


def test_a_fused_lora_has_one_rank_unless_told_not_to(shelf: Path) -> None:
    fused = fuse([shelf / "b", shelf / "q_only"], rule="average", weights=1)
    plain = fused.save(shelf / "several", pad=False, overwrite=True)
    saved = fused.save(shelf / "one", overwrite=True)
    assert len(set(plain.ranks.values())) > 1 and set(saved.ranks.values()) == {max(plain.ranks.values())}
    assert_same(update(shelf, "one"), update(shelf, "several"))


@pytest.mark.parametrize("as_lora", [False, True])
@pytest.mark.parametrize("output", ["b", "link", "x/../b", "base", "."])
def test_saving_never_replaces_a_source(output: str, as_lora: bool, shelf: Path, tmp_path: Path) -> None:
    for name in ("b", "c"):
        shutil.copytree(shelf / name, tmp_path / name)
    shutil.copytree(base_folder(shelf), tmp_path / "base")
    (tmp_path / "x").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "b")
    fused = fuse([tmp_path / "b", tmp_path / "c"], weights=1, base=tmp_path / "base")
    with pytest.raises(OutputError, match="the output would replace .*, a source"):
        fused.save(tmp_path / output, as_lora=as_lora, overwrite=True)
    assert all((tmp_path / name / "adapter_config.json").exists() for name in ("b", "c"))
    assert open_checkpoint(tmp_path / "base").names


def test_saving_refuses_nan_in_a_module_trained_in_full(shelf: Path, tmp_path: Path) -> None:
    shutil.copytree(shelf / "b", tmp_path / "b")
    path = tmp_path / "b" / "adapter_model.safetensors"
    save_file({**load_file(path), "base_model.model.lm_head.weight": torch.full((2, 2), torch.nan)}, path)
    with pytest.raises(AdapterError, match=r"lm_head.weight: the fused adapter contains NaN"):
        fuse([tmp_path / "b"]).save(tmp_path / "out")


def test_stacked_factors_lose_their_duplicates(shelf: Path, tmp_path: Path) -> None:
    shutil.copytree(shelf / "lora", tmp_path / "copy")
    saved = fuse([shelf / "lora", tmp_path / "copy"], rule="average").save(shelf / "same", overwrite=True)
    assert saved.max_rank == 4
    assert_same(update(shelf, "same"), update(shelf, "lora"))


def test_cutting_the_rank_needs_the_word(shelf: Path, tmp_path: Path) -> None:
    fused = fuse([shelf / "lora", shelf / "rslora"], rule="average")
    with pytest.raises(ExportError, match=r"cutting to rank 3 loses .*% of this update.*--allow-lossy"):
        fused.save(tmp_path / "cut", max_rank=3)
    assert not (tmp_path / "cut").exists()
    saved = fused.save(tmp_path / "cut", max_rank=3, allow_lossy=True)
    assert saved.max_rank == 3 and 0 < max(saved.lost.values()) < 1
    with pytest.raises(OutputError, match="the output folder must be empty"):
        fused.save(tmp_path / "cut")
    with pytest.raises(OptionError, match="a spectral_a adapter cannot be cut"):
        fuse([shelf / "a"]).save(tmp_path / "more", max_rank=3)


def test_a_spectral_result_is_also_written_as_lora(shelf: Path) -> None:
    saved = fuse([shelf / "a", shelf / "b"], weights=1).save(shelf / "as_lora", as_lora=True, overwrite=True)
    assert saved.kind == "lora" and saved.max_rank == 12
    assert_same(update(shelf, "as_lora"), weighted(shelf, ["a", "b"], [1, 1]))


def test_orthogonal_adapters_add_up(shelf: Path) -> None:
    fused = fuse([shelf / "own0", shelf / "own1"], rule="orthogonal", weights=1)
    fused.save(shelf / "own", overwrite=True)
    assert_same(update(shelf, "own"), weighted(shelf, ["own0", "own1"], [1, 1]))
    assert all(pair.input_cross < 1e-6 for pair in fused.report.pairs)
    assert fused.report.kept["own0"] == pytest.approx(1, abs=1e-5)


def test_gradient_reproduces_every_adapter_on_its_own_inputs(shelf: Path) -> None:
    names, batches = ["a", "lora"], [{"input_ids": torch.arange(3, 9)[None]}, {"input_ids": torch.arange(20, 29)[None]}]
    models = [PeftModel.from_pretrained(load_base(base_folder(shelf)), shelf / name) for name in names]
    grams = [spectune.collect_grams(model, [batch]) for model, batch in zip(models, batches, strict=True)]
    fused = fuse([shelf / name for name in names], rule="gradient", activations=grams, eps=0)
    fused.save(shelf / "gradient", overwrite=True)
    merged = PeftModel.from_pretrained(load_base(base_folder(shelf)), shelf / "gradient")
    # 6 and 9 tokens span 15 of 32 features, so both fit exactly, layer by layer and so in the whole model.
    for model, batch in zip(models, batches, strict=True):
        torch.testing.assert_close(output(merged, batch), output(model, batch), rtol=1e-3, atol=1e-3)
    average = fuse([shelf / name for name in names], rule="average")
    assert fused.report.kept["a"] != average.report.kept["a"]


def refused(error: type[SpectuneError], line: str, *args: Any, **kwargs: Any) -> None:
    with pytest.raises(error, match=line):
        fuse(*args, **kwargs)


def test_clashing_columns_are_refused_with_the_layer(shelf: Path) -> None:
    paths = [shelf / "a", shelf / "clash"]
    refused(AdapterError, r"layers\.0\.mlp\.down_proj: a and clash both tuned the singular columns 2, where", paths)
    report = fuse(paths, allow_overlap=True, weights=1).report
    assert all(pair.shared_columns == (2,) and pair.spectral_cross > 0 for pair in report.pairs)


def test_another_base_is_refused(shelf: Path, tmp_path: Path) -> None:
    other = save_adapter(tmp_path, "other", spectral(6), 3, base_folder(tmp_path, seed=1))
    refused(
        AdapterError, "other was trained on the base '.*llama-1' and a on '.*llama-0'.*--base", [shelf / "a", other]
    )
    refused(
        AdapterError,
        r"other: model\.layers\.0\.mlp\.down_proj: the adapter was trained on another base weight",
        [shelf / "a", other],
        base=base_folder(shelf),
    )


def test_without_the_base_saved_directions_are_compared(shelf: Path, tmp_path: Path) -> None:
    foreign = save_adapter(tmp_path, "foreign", spectral(6), 3, base_folder(tmp_path, seed=1))
    copies = [nameless(path, tmp_path / path.name / "copy") for path in (shelf / "b", shelf / "c", foreign)]
    fused = fuse([tmp_path / "b" / "copy", tmp_path / "c" / "copy"][:1], weights=1)
    assert "fit one base" in fused.report.base
    names = [rename(copy, tmp_path / name) for copy, name in zip(copies, ("bb", "cc", "ff"), strict=True)]
    both = fuse(names[:2], weights=1)
    assert_same({n: dense(d) for n, d in both.deltas.items()}, weighted(shelf, ["b", "c"], [1, 1]))
    refused(AdapterError, "the singular directions of bb and ff come from different weights", [names[0], names[2]])


def nameless(path: Path, goal: Path) -> Path:
    """Copy an adapter whose config does not name its base."""
    shutil.copytree(path, goal, dirs_exist_ok=True)
    config = json.loads((goal / "adapter_config.json").read_text()) | {"base_model_name_or_path": None}
    (goal / "adapter_config.json").write_text(json.dumps(config))
    return goal


def rename(path: Path, goal: Path) -> Path:
    return Path(shutil.copytree(path, goal))


def test_a_sketch_without_its_base_is_refused(shelf: Path, tmp_path: Path) -> None:
    lost = nameless(shelf / "a", tmp_path / "lost")
    refused(
        AdapterError, "lost: its config does not name its base model. Pass --base .* directions of model.layers", [lost]
    )
    assert fuse([lost], base=base_folder(shelf)).report.kept["lost"] == pytest.approx(1)


def test_shapes_that_differ_are_refused(shelf: Path, tmp_path: Path) -> None:
    path = nameless(shelf / "rslora", tmp_path / "wide")
    tensors = load_file(path / "adapter_model.safetensors")
    name = next(name for name in tensors if "layers.1.self_attn.q_proj.lora_B" in name)
    save_file({**tensors, name: torch.zeros(40, 2)}, path / "adapter_model.safetensors")
    line = r"layers\.1\.self_attn\.q_proj: the weight is 32x32 in lora and 40x32 in wide"
    plain = nameless(shelf / "lora", tmp_path / "lora")
    refused(AdapterError, line, [plain, path], rule="average")


def test_wrong_requests_are_refused(shelf: Path) -> None:
    a, b = shelf / "a", shelf / "b"
    refused(OptionError, "no adapters to fuse", [])
    refused(OptionError, r"weights=\[1.0\]: expected 2 finite numbers", [a, b], weights=[1.0])
    refused(OptionError, "rule 'spectral' has no option 'eps'", [a, b], eps=0.1)
    refused(OptionError, "activations: rule 'average' does not use them", [a, b], rule="average", activations=[{}, {}])
    refused(OptionError, "activations: 1 were given for 2 adapters", [a, b], rule="gradient", activations=[{}])
    refused(OptionError, "needs the inputs that a sees in this layer", [a, b], rule="gradient")
    refused(OptionError, "the same adapter is named twice", [a, a], rule="average")
    refused(AdapterError, "an adapter folder is needed", [shelf / "nowhere"])
    refused(
        AdapterError,
        "rule 'spectral' only takes spectral_a adapters, but rotated is spectral_r",
        [a, shelf / "rotated"],
    )


def test_modules_trained_in_full_must_be_equal(tmp_path: Path) -> None:
    options = {"task_type": "SEQ_CLS", "target_modules": ["query"]}
    for name, columns, seed in (("a", 0, 0), ("b", 3, 1)):
        save_adapter(tmp_path, name, spectral(columns, **options), seed, model="bert")
    refused(
        AdapterError, "classifier.*: trained in full, but not the same in a and b", [tmp_path / "a", tmp_path / "b"]
    )
    told: list[int] = []
    with pytest.raises(AdapterError, match="classifier"):
        fuse([tmp_path / "a", tmp_path / "b"], rule="average", on_layers=lambda done, layers: told.append(done))
    assert told == []  # before the work
    saved = fuse([tmp_path / "a"], weights=1).save(tmp_path / "again")
    again, a = (load_file(path / "adapter_model.safetensors") for path in (saved.path, tmp_path / "a"))
    assert all(torch.equal(again[name], tensor) for name, tensor in a.items() if "classifier" in name)


def test_a_layer_stored_in_x_out_is_written_so(tmp_path: Path) -> None:
    options = {"target_modules": ["c_attn", "c_fc"]}
    for name, columns, seed in (("a", 0, 0), ("b", 3, 1)):
        save_adapter(tmp_path, name, spectral(columns, **options), seed, model="gpt2")
    fused = fuse([tmp_path / "a", tmp_path / "b"], weights=1)
    fused.save(tmp_path / "spectral"), fused.save(tmp_path / "lora", as_lora=True)
    assert json.loads((tmp_path / "lora" / "adapter_config.json").read_text())["fan_in_fan_out"]
    base = base_folder(tmp_path, "gpt2")
    found = [PeftModel.from_pretrained(load_base(base, "gpt2"), tmp_path / name) for name in ("spectral", "lora")]
    inputs = MODELS["gpt2"].inputs()
    torch.testing.assert_close(output(found[0], inputs), output(found[1], inputs), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(output(found[0], inputs), output(load_base(base, "gpt2"), inputs), atol=1e-2)


def test_convolutions_are_written_with_their_kernels(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base, x = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3)), torch.randn(2, 3, 6, 6)
    (tmp_path / "base").mkdir()
    save_file(base.state_dict(), tmp_path / "base" / "model.safetensors")
    wanted = -base(x)
    for name, config in (("a", spectral("top", r=2)), ("b", lora(2)), ("c", spectral(4, r=2))):
        config.target_modules, config.task_type = {"0"}, None
        config.init_weights = config.init_lora_weights = False
        adapted = get_peft_model(copy.deepcopy(base), config)
        adapted.save_pretrained(tmp_path / name)
        wanted = wanted + adapted(x) if name != "c" else wanted
    base_path = tmp_path / "base"
    fuse([tmp_path / "a", tmp_path / "b"], rule="average", weights=1, base=base_path).save(tmp_path / "ab")
    found = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ab")(x)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found, base(x), atol=1e-2)
    fuse([tmp_path / "a", tmp_path / "c"], weights=1, base=base_path).save(tmp_path / "ac")
    PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ac")


def test_loras_are_read_layer_by_layer_and_progress_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders = [save_adapter(tmp_path, name, lora(3), seed) for seed, name in enumerate("ab")]
    told, read = list[tuple[int, int]](), list[tuple[int, str]]()
    delta = LoraFile.delta

    def reading(self: LoraFile, layer: str, dtype: torch.dtype = torch.float32) -> Delta:
        read.append((len(told), layer))
        return delta(self, layer, dtype)

    monkeypatch.setattr(LoraFile, "delta", reading)
    fused = fuse(folders, rule="task_singular", on_layers=lambda done, layers: told.append((done, layers)))
    layers = list(fused.parts)
    assert told == [(place, len(layers)) for place in range(1, len(layers) + 1)]
    # Once to check that the shapes agree, before anything is told; then each layer in its turn, and then no more.
    merging = [layer for when, layer in read[2 * len(layers) :]]
    assert merging == [layer for layer in layers for _ in folders]
    assert [when for when, _ in read[2 * len(layers) :]] == [place for place in range(len(layers)) for _ in folders]


def test_targets_in_another_order_are_the_same_targets(tmp_path: Path) -> None:
    folders = [save_adapter(tmp_path, name, lora(3), seed) for seed, name in enumerate("ab")]
    for saved, names in zip(folders, (["q_proj", "down_proj"], ["down_proj", "q_proj"]), strict=True):
        path = saved / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"target_modules": names}))
    written = fuse(folders, rule="average").save(tmp_path / "fused").path / "adapter_config.json"
    assert json.loads(written.read_text())["target_modules"] == ["down_proj", "q_proj"]
