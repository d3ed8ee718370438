"""Every row has one name: batches whose names are too few or too many, and rows that `generate` repeats."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from spectune import AdapterBank
from spectune.errors import AdapterError, OptionError

from ..models import MODELS, output
from ..tuner.conftest import adapted, config_for, train

LLAMA = MODELS["llama"]
WRONG = [["anna"], ["anna", "ben"], ["anna"] * 4, ["anna", "ben"] * 3, []]


@pytest.fixture
def banked(tmp_path: Path) -> tuple[PeftModel, AdapterBank]:
    for seed, name in enumerate(["anna", "ben"]):
        model = get_peft_model(LLAMA.fresh(), config_for(LLAMA, "spectral_r"))
        train(model, scale=0.5, seed=seed)
        model.save_pretrained(tmp_path / name)
    model = PeftModel.from_pretrained(LLAMA.fresh(), tmp_path / "anna").eval()
    bank = AdapterBank(model)
    for name in ("anna", "ben"):
        bank.load(name, tmp_path / name)
    return model, bank


@pytest.mark.parametrize("names", WRONG, ids=len)
def test_residents_for_another_number_of_rows_are_refused(
    names: list[str], banked: tuple[PeftModel, AdapterBank]
) -> None:
    model, bank = banked
    with bank(names), pytest.raises(OptionError, match=f"{len(names)} adapter names for 3 rows"):
        output(model, LLAMA.inputs())
    with pytest.raises(OptionError, match=f"{len(names)} adapter names for 3 rows"):
        output(model, {**LLAMA.inputs(), "adapter_names": names})
    twice = {"input_ids": LLAMA.inputs()["input_ids"].repeat(2, 1)}
    with bank(["anna", "ben", "anna"]), pytest.raises(OptionError, match="3 adapter names for 6 rows"):
        output(model, twice)  # never paired off


def test_the_tokens_of_all_rows_may_be_in_one_long_row(banked: tuple[PeftModel, AdapterBank]) -> None:
    """As an engine with continuous batches passes them; each layer is asked alone, since attention is the engine's."""
    model, bank = banked
    layer: Any = next(iter(m for m in model.modules() if getattr(m, "bank", None) is not None))
    x_BTI = torch.randn(3, 4, layer.in_features, generator=torch.Generator().manual_seed(0))
    names, counts = ["anna", "__base__", "ben"], [4, 1, 2]
    with torch.no_grad():
        with bank(names):
            expected = layer(x_BTI)
        packed = torch.cat([row[:count] for row, count in zip(x_BTI, counts, strict=True)])[None]
        with bank(names, tokens=counts):
            found = layer(packed)
            with pytest.raises(OptionError, match="7 adapter names for 12 rows"):
                layer(x_BTI)
    parts = torch.cat([row[:count] for row, count in zip(expected, counts, strict=True)])[None]
    torch.testing.assert_close(found, parts)
    with pytest.raises(OptionError, match="2 numbers of tokens for 3 adapter names"), bank(names, tokens=[1, 2]):
        pass


@pytest.mark.parametrize("tiny", ["llama", "gpt2", "vit", "bert"])
@pytest.mark.parametrize("method", ["lora", "spectral_a", "spectral_r"])
def test_names_for_another_number_of_rows_are_refused_as_lora_does(method: str, tiny: str) -> None:
    model, rows = MODELS[tiny], len(next(iter(MODELS[tiny].inputs().values())))
    config: Any = LoraConfig(target_modules=list(model.targets))
    config = config if method == "lora" else config_for(model, method)
    live = get_peft_model(model.fresh(), config).eval()
    for names in (["default"], ["default"] * (rows + 2), ["__base__", "default"] * rows):
        with pytest.raises(ValueError, match=r"adapter_names|adapter names"):
            output(live, {**model.inputs(), "adapter_names": names})


@pytest.mark.parametrize("repeated", [{"num_beams": 2}, {"num_return_sequences": 2, "do_sample": True}])
@pytest.mark.parametrize("method", ["spectral_r", "spectral_a"])
@pytest.mark.parametrize("tiny", ["llama", "t5"])
def test_generate_repeats_the_names_with_the_rows(
    tiny: str, method: str, repeated: dict[str, Any], tmp_path: Path
) -> None:
    kind = MODELS[tiny]
    live = get_peft_model(kind.fresh(), config_for(kind, method))
    train(live, scale=1.0)
    live.add_adapter("ben", config_for(kind, method))
    live.set_adapter("ben")
    train(live, scale=1.0, seed=5)
    live.eval()
    asked = {"input_ids": kind.inputs()["input_ids"], "max_new_tokens": 4, **repeated}

    def answers(**more: Any) -> torch.Tensor:
        torch.manual_seed(0)  # the rows draw in one order whoever answers
        found: torch.Tensor = live.generate(**asked, output_scores=True, return_dict_in_generate=True, **more).scores[0]
        return found.unflatten(0, (3, 2))

    mixed = answers(adapter_names=["ben", "__base__", "default"])
    live.set_adapter("ben")
    torch.testing.assert_close(mixed[0], answers()[0])
    live.set_adapter("default")
    torch.testing.assert_close(mixed[2], answers()[2])
    with live.disable_adapter():
        torch.testing.assert_close(mixed[1], answers()[1])
    assert not torch.allclose(mixed[0], answers()[0])
    if method == "spectral_a":
        return  # has no bank
    live.save_pretrained(tmp_path)
    bank = AdapterBank(live)
    bank.load("resident", tmp_path / "ben")
    with bank(["resident", "__base__", "resident"]):
        served = answers()
    torch.testing.assert_close(served[:2], mixed[:2])
    assert not torch.allclose(served[2], mixed[2])


def test_beams_asked_for_in_another_way_are_refused_and_not_guessed(banked: tuple[PeftModel, AdapterBank]) -> None:
    model, bank = banked
    model.generation_config.num_beams = 2
    asked = {"input_ids": LLAMA.inputs()["input_ids"], "max_new_tokens": 2, "do_sample": False}
    with bank(["anna", "ben", "anna"]), pytest.raises(OptionError, match="pass num_beams or num_return_sequences"):
        model.generate(**asked)
    with bank(["anna", "ben", "anna"]):
        assert len(model.generate(**asked, num_beams=2)) == 3


def test_rows_are_named_in_one_way_only(banked: tuple[PeftModel, AdapterBank]) -> None:
    model, bank = banked
    named = {**LLAMA.inputs(), "adapter_names": ["anna"] * 3}
    with bank(["ben"] * 3), pytest.raises(OptionError, match=r"inside of `with bank\(...\)`"):
        output(model, named)
    other = adapted(LLAMA, "spectral_r")  # another model knows nothing of this bank
    with bank(["ben"] * 3):
        output(other, {**LLAMA.inputs(), "adapter_names": ["default"] * 3})


def overlapping(bank: AdapterBank, blocks: int, swap: Any) -> None:
    """Run blocks of which one always begins before the last has ended, with a swap in each."""
    present = bank(["anna"])
    present.__enter__()
    for _ in range(blocks):
        swap()
        following = bank(["anna"])
        following.__enter__()
        present.__exit__(None, None, None)
        present = following
    present.__exit__(None, None, None)


def cores(bank: AdapterBank, value: float = 0.0) -> dict[str, torch.Tensor]:
    return {path: torch.full_like(layer.cores[0], value) for path, layer in bank._layers.items()}


def test_overlapping_requests_do_not_let_the_tables_grow(banked: tuple[PeftModel, AdapterBank]) -> None:
    _, bank = banked
    seats = [layer.cores.shape[0] for layer in bank._layers.values()]
    # 50 swaps while no moment is without a running block: each frees the seat of the swap before.
    overlapping(bank, 50, lambda: bank.put("anna", cores(bank)))
    assert [layer.cores.shape[0] for layer in bank._layers.values()] == seats == [4] * 6
    assert bank._count <= 5 and not bank._retired and not bank._held


def test_a_request_that_never_ends_keeps_its_own_seats_only(banked: tuple[PeftModel, AdapterBank]) -> None:
    model, bank = banked
    with bank(["ben", "__base__", "anna"]):
        before = output(model, LLAMA.inputs())
        overlapping(bank, 20, lambda: (bank.put("anna", cores(bank, 0.1)), bank.put("ben", cores(bank, 0.1))))
        assert torch.equal(output(model, LLAMA.inputs()), before)
        assert bank._count <= 8
    assert not bank._retired and len(bank._free) + len(bank) == bank._count - 1


@pytest.mark.parametrize("fault", ["missing", "shape", "nan", "integers"])
def test_cores_that_do_not_fit_change_nothing(fault: str, banked: tuple[PeftModel, AdapterBank]) -> None:
    model, bank = banked
    given = cores(bank)
    path = list(given)[-1]
    if fault == "missing":
        del given[path]
    else:
        given[path] = {"shape": given[path][:2], "nan": given[path] / 0, "integers": given[path].long()}[fault]
    tables = [layer.cores.clone() for layer in bank._layers.values()]
    count, free = bank._count, list(bank._free)
    with pytest.raises(AdapterError, match=path):
        bank.put("anna", given)
    assert (bank._count, list(bank._free), bank.names) == (count, free, ("anna", "ben"))
    assert all(torch.equal(t, layer.cores) for t, layer in zip(tables, bank._layers.values(), strict=True))


def test_a_seat_outlives_an_error_while_it_is_written(
    banked: tuple[PeftModel, AdapterBank], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, bank = banked

    def full(*args: Any, **kwargs: Any) -> None:
        raise torch.OutOfMemoryError("no room")

    layer = list(bank._layers.values())[-1]
    with monkeypatch.context() as patch:
        patch.setattr(layer, "put", full)
        for _ in range(5):
            with pytest.raises(torch.OutOfMemoryError):
                bank.put("carl", cores(bank))
    assert len(bank._free) + len(bank) == bank._count - 1 and bank._count == 4
    with monkeypatch.context() as patch:
        patch.setattr("spectune.bank.bank.torch.tensor", full)
        with pytest.raises(torch.OutOfMemoryError), bank(["anna"]):
            pass
    assert not bank._held  # nothing runs: the next seat that is given back is free at once
    bank.unload("ben")
    assert not bank._retired


def test_a_table_made_in_inference_mode_takes_later_residents(banked: tuple[PeftModel, AdapterBank]) -> None:
    _, bank = banked
    with torch.inference_mode():
        for name in "abcdefgh":
            bank.put(name, cores(bank))
        layer = next(iter(bank._layers.values()))
        layer._move(torch.device("cpu"))
        assert not layer.cores.is_inference()
    bank.put("i", cores(bank))
    with torch.inference_mode():
        made_here = AdapterBank(adapted(LLAMA, "svdiff"))
    made_here.put("a", cores(made_here))


def test_a_resident_that_comes_while_the_table_moves_is_not_lost(banked: tuple[PeftModel, AdapterBank]) -> None:
    _, bank = banked
    layer = next(iter(bank._layers.values()))
    moving, put = threading.Event(), threading.Event()

    class Slow:
        """A table whose move takes as long as another thread's load would."""

        def to(self, device: torch.device) -> torch.Tensor:
            moving.set()
            put.wait(0.2)  # with the lock, the load waits for the move and this runs out
            return table

    table = layer.cores
    layer.cores = Slow()  # type: ignore[assignment]

    def load() -> None:
        moving.wait(10)
        layer.put(3, torch.ones_like(table[0]), 8)
        put.set()

    thread = threading.Thread(target=load)
    thread.start()
    layer._move(torch.device("cpu"))
    thread.join()
    assert torch.equal(layer.cores[3], torch.ones_like(table[0])) and len(layer.cores) == 8
