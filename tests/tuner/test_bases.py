"""Where the bases of an adapter come from: found together, from the cache, or from other processes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from peft import PeftModel, get_peft_model
from torch import nn

from spectune import SpectralConfig
from spectune.adapter import spectral_modules
from spectune.errors import WeightError
from spectune.tuner import bases

from ..abilities import needs_fsdp2_on_a_cpu
from ..models import MODELS

LLAMA = MODELS["llama"]

TARGETS = ["q_proj", "up_proj"]


def adapted(**options: Any) -> PeftModel:
    return get_peft_model(LLAMA.fresh(), SpectralConfig(r=4, target_modules=TARGETS, **options))


def spectra(model: nn.Module) -> dict[str, Any]:
    return {path: module.spectrum for path, _, module in spectral_modules(model)}


def test_all_bases_are_found_in_one_call_before_the_first_layer_is_touched(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[list[str]] = []
    obtain = bases.obtain
    monkeypatch.setattr(
        bases, "obtain", lambda weights, *a, **k: calls.append([w.name for w in weights]) or obtain(weights, *a, **k)
    )
    model = adapted()
    assert len(calls) == 1 and len(calls[0]) == len(spectra(model))


@pytest.mark.parametrize("targets", ["all-linear", r".*layers\.0\..*_proj"])
def test_every_way_to_name_targets_finds_its_bases_together(targets: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bases, "find_basis", lambda *a: pytest.fail("found alone"))
    monkeypatch.setattr("spectune.tuner.layer.find_basis", lambda *a: pytest.fail("found alone"))
    get_peft_model(LLAMA.fresh(), SpectralConfig(r=4, target_modules=targets))


def test_a_second_adapter_finds_its_bases_together_too(monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted()
    monkeypatch.setattr("spectune.tuner.layer.find_basis", lambda *a: pytest.fail("found alone"))
    model.add_adapter("second", SpectralConfig(method="svft", basis_rank=6, target_modules=["q_proj", "down_proj"]))
    assert {name for _, name, _ in spectral_modules(model)} == {"default", "second"}


def test_a_named_cache_is_filled_and_read(tmp_path: Path) -> None:
    first = spectra(adapted(svd={"cache_dir": str(tmp_path)}))
    again = spectra(adapted(svd={"cache_dir": str(tmp_path)}))
    assert not any(one.quality.cached for one in first.values())
    assert all(one.quality.cached for one in again.values())
    for path in first:
        assert torch.equal(first[path].U_OR, again[path].U_OR)


def test_off_reads_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapted(svd={"cache_dir": str(tmp_path)})
    monkeypatch.setenv("SPECTUNE_CACHE", str(tmp_path))
    assert all(one.quality.cached for one in spectra(adapted()).values())
    assert not any(one.quality.cached for one in spectra(adapted(svd={"cache_dir": "off"})).values())


def test_the_place_of_the_cache_does_not_travel_with_the_adapter(tmp_path: Path) -> None:
    adapted(svd={"cache_dir": str(tmp_path / "bases")}).save_pretrained(tmp_path / "adapter")
    saved = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert "cache_dir" not in saved["svd"] and "bases" not in json.dumps(saved)


def test_a_weight_that_deepspeed_already_runs_is_refused_with_the_reason() -> None:
    base = LLAMA.fresh()
    name, layer = next((name, m) for name, m in base.named_modules() if name.endswith("q_proj"))
    layer.weight.ds_id = base.ds_id = 7  # zero.Init numbers parameters, deepspeed.initialize modules, too
    with pytest.raises(WeightError, match=rf"{name}: .* partitioned by DeepSpeed ZeRO-3, and DeepSpeed has"):
        get_peft_model(base, SpectralConfig(r=4, target_modules=TARGETS))


def _entry(rank: int, folder: str, job: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    torch.save(job(rank), f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def together(job: Any, folder: Path) -> list[Any]:
    mp.start_processes(_entry, (str(folder), job), nprocs=2, start_method="fork")
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


def _solved_here(rank: int) -> Any:
    from spectune.spectrum import engine

    solved, solve = [], engine._decompose_alike
    engine._decompose_alike = lambda weights, request: solved.extend(w.name for w in weights) or solve(weights, request)
    return solved, {path: one.U_OR for path, one in spectra(adapted()).items()}


def test_processes_share_the_work_and_hold_the_same_bits(tmp_path: Path) -> None:
    (solved0, found0), (solved1, found1) = together(_solved_here, tmp_path)
    assert solved0 and solved1 and not set(solved0) & set(solved1)
    assert len(solved0) + len(solved1) == len(found0)
    assert all(torch.equal(found0[path], found1[path]) for path in found0)


def _fully_sharded(rank: int) -> Any:
    from torch.distributed.fsdp import fully_shard

    base = LLAMA.fresh()
    fully_shard(base)
    try:
        get_peft_model(base, SpectralConfig(r=4, target_modules=TARGETS))
    except WeightError as error:
        refused = str(error)
    model = adapted()
    for layer in model.base_model.model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    torch.manual_seed(rank)
    inputs = LLAMA.inputs()
    model(**inputs).logits.float().square().mean().backward()
    gradients = [p.grad for p in model.parameters() if p.requires_grad]
    return refused, all(g is not None for g in gradients), len(gradients)


@needs_fsdp2_on_a_cpu
def test_fsdp2_shards_an_adapted_model_and_refuses_to_adapt_a_sharded_one(tmp_path: Path) -> None:
    for refused, trained, count in together(_fully_sharded, tmp_path):
        assert "already sharded" in refused and "then call fully_shard" in refused
        assert trained and count > 0
