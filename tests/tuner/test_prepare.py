"""`prepare`: directions out of examples, from the pass over them to the file and back."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

from spectune import SpectralConfig, export_lora, prepare
from spectune.adapter import spectral_modules
from spectune.errors import AdapterError, OptionError
from spectune.spectrum import DIRECTIONS, DataSpectra

from ..models import MODELS
from .conftest import train
from .test_kinds import quantised

OF_DATA = [name for name in DIRECTIONS if name != "weight"]
R = 5
# Directions of data are rounded to bfloat16.
ROUNDED = 2**-8


class Two(nn.Module):
    """Two linear layers with something between them, and a loss."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(12, 9), nn.Linear(9, 7)

    def forward(self, x: torch.Tensor, labels: torch.Tensor, attention_mask: Any = None) -> Any:
        middle = self.first(x)
        middle += 1  # some models write into an output
        losses_N = nn.functional.cross_entropy(
            self.second(middle.tanh()).flatten(0, -2), labels.flatten(), reduction="none"
        )
        kept_N = torch.ones_like(losses_N) if attention_mask is None else attention_mask.flatten()
        return type("Output", (), {"loss": (losses_N * kept_N).sum() / kept_N.sum()})


def batches(count: int = 4, rows: int = 6) -> list[dict[str, torch.Tensor]]:
    stream = torch.Generator().manual_seed(1)
    return [
        {"x": torch.randn(rows, 3, 12, generator=stream), "labels": torch.randint(7, (rows, 3), generator=stream)}
        for _ in range(count)
    ]


def config(directions: str, **more: Any) -> SpectralConfig:
    options: dict[str, Any] = {"method": "svft", "pattern": "banded", "off_diagonals": R - 1, "basis_rank": R}
    return SpectralConfig(**{**options, "target_modules": ["first", "second"], "directions": directions, **more})


def gradients(model: nn.Module, name: str) -> list[torch.Tensor]:
    found = []
    for batch in batches():
        model.zero_grad()
        model(**batch).loss.backward()
        grad = model.get_submodule(name).weight.grad
        found.append(grad.double().clone())
    return found


def projector(Q_AR: torch.Tensor) -> torch.Tensor:
    return Q_AR @ Q_AR.mT


def expected(directions: str, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Get the projectors onto the left and the right directions, straight from the definitions."""
    model = Two()
    W_OI = model.get_submodule(name).weight.detach().double()
    if directions in ("gradient", "gradient_mean"):
        grads = gradients(model, name)
        left = sum(G @ G.mT for G in grads) if directions == "gradient" else sum(grads) @ sum(grads).mT  # type: ignore[union-attr]
        right = sum(G.mT @ G for G in grads) if directions == "gradient" else sum(grads).mT @ sum(grads)  # type: ignore[union-attr]
    else:
        inputs, outputs = [], []
        layer = model.get_submodule(name)

        def report(_: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
            inputs.append(args[0].detach().clone())
            output.register_hook(outputs.append)
            return output.clone()

        layer.register_forward_hook(report)
        for batch in batches():
            model(**batch).loss.backward()
        X_NI, G_NO = (torch.cat([t.detach().flatten(0, 1) for t in part]).double() for part in (inputs, outputs))
        left, right = G_NO.mT @ G_NO, X_NI.mT @ X_NI
        if directions == "weight_x_activation":
            U_OR = torch.linalg.eigh(W_OI @ right @ W_OI.mT)[1][:, -R:]
            return projector(U_OR), projector(torch.linalg.qr(W_OI.mT @ U_OR)[0])
    return projector(torch.linalg.eigh(left)[1][:, -R:]), projector(torch.linalg.eigh(right)[1][:, -R:])


@pytest.mark.parametrize("directions", OF_DATA)
def test_directions_are_what_their_definition_says(directions: str) -> None:
    found = prepare(Two(), config(directions), batches()).spectra
    assert found is not None and sorted(found) == ["first", "second"] and found.batches == 4
    for name, basis in found.items():
        left_OO, right_II = expected(directions, name)
        torch.testing.assert_close(projector(basis.U_OR).double(), left_OO, atol=ROUNDED, rtol=0)
        torch.testing.assert_close(projector(basis.Vh_RI.mT).double(), right_II, atol=ROUNDED, rtol=0)
        W_OI = Two().get_submodule(name).weight
        torch.testing.assert_close((basis.U_OR.mT @ W_OI @ basis.Vh_RI.mT).diagonal(), basis.S_R, atol=ROUNDED, rtol=0)
        assert bool((basis.S_R >= 0).all())


def test_padding_is_left_out() -> None:
    padded = batches(1)
    mask = torch.ones(6, 3)
    mask[:, 2] = 0
    short = [{"x": padded[0]["x"][:, :2], "labels": padded[0]["labels"][:, :2]}]
    one, other = (
        prepare(Two(), config("activation"), given).spectra for given in ([padded[0] | {"attention_mask": mask}], short)
    )
    assert one is not None and other is not None
    torch.testing.assert_close(one["second"].Vh_RI, other["second"].Vh_RI)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("directions", OF_DATA)
def test_an_adapter_in_them_starts_at_nothing_and_comes_back_from_its_file(
    tmp_path: Path, directions: str, checkpointing: bool
) -> None:
    tiny = MODELS["llama"]
    model = tiny.fresh()
    if checkpointing:
        model.gradient_checkpointing_enable()
    inputs = tiny.inputs()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    given = config(directions, target_modules=list(tiny.targets))
    found = prepare(model, given, [inputs | {"labels": inputs["input_ids"]}])
    assert given.spectra is None and all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in model.parameters()) and not model.training
    plain = model(**inputs).logits
    tuned = get_peft_model(model, found).eval()
    assert torch.equal(tuned(**inputs).logits, plain)
    train(tuned)
    logits = tuned(**inputs).logits
    assert not torch.allclose(logits, plain, atol=1e-3)
    tuned.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(tiny.fresh(), tmp_path / "adapter").eval()
    assert torch.equal(again(**inputs).logits, logits)
    assert {module.source for _, _, module in spectral_modules(again)} == {directions}
    tiny.fresh().save_pretrained(tmp_path / "base")
    export_lora(tmp_path / "adapter", tmp_path / "lora", base_model=tmp_path / "base")
    as_lora = PeftModel.from_pretrained(tiny.fresh(), tmp_path / "lora").eval()
    torch.testing.assert_close(as_lora(**inputs).logits, logits, atol=1e-4, rtol=1e-4)
    with pytest.raises(AdapterError, match="trained on another base weight: along its directions"):
        PeftModel.from_pretrained(tiny.fresh(seed=1), tmp_path / "adapter")


def test_a_rounded_base_is_the_same_base(tmp_path: Path) -> None:
    tiny = MODELS["llama"]
    inputs = tiny.inputs()
    given = config("gradient", target_modules=list(tiny.targets))
    tuned = get_peft_model(tiny.fresh(), prepare(tiny.fresh(), given, [inputs | {"labels": inputs["input_ids"]}]))
    tuned.save_pretrained(tmp_path)
    PeftModel.from_pretrained(tiny.fresh().to(torch.bfloat16), tmp_path)


def test_copies_of_a_config_keep_the_directions_and_files_do_not() -> None:
    found = prepare(Two(), config("gradient"), batches())
    assert copy.deepcopy(found).spectra is found.spectra and isinstance(found.spectra, DataSpectra)
    assert "spectra" not in found.to_dict() and found.to_dict()["directions"] == "gradient"


def test_a_sketch_finds_the_leading_directions_of_a_wide_layer() -> None:
    torch.manual_seed(0)
    wide = nn.Sequential(nn.Linear(1500, 4))
    signal = torch.randn(3, 1500) * torch.tensor([[4.0], [2.0], [1.0]])
    rows = torch.randn(200, 3) @ signal + 0.01 * torch.randn(200, 1500)
    loss = lambda model, batch: model(batch["x"]).square().sum()  # noqa: E731
    given = config("activation", basis_rank=3, off_diagonals=2, target_modules=["0"])
    found = prepare(wide, given, [{"x": rows[:100]}, {"x": rows[100:]}], loss=loss).spectra
    assert found is not None
    exact_I3 = torch.linalg.svd(rows, full_matrices=False)[2][:3].mT
    assert float(torch.linalg.matrix_norm(exact_I3.mT @ found["0"].Vh_RI.mT, -2)) > 1 - ROUNDED


@pytest.mark.parametrize(
    ("more", "given", "said"),
    [
        ({"directions": "weight"}, batches(), "needs no examples"),
        ({}, [], "there are none"),
        ({"target_modules": ["first", "table"]}, batches(), "work only for linear layers"),
        ({"target_modules": ["first", "unused"]}, batches(), "unused: this layer got no gradient"),
    ],
)
def test_what_cannot_be_prepared_is_refused(more: dict[str, Any], given: Any, said: str) -> None:
    model = Two()
    model.table, model.unused = nn.Embedding(5, 5), nn.Linear(9, 9)
    with pytest.raises(OptionError, match=said):
        prepare(model, config(**{"directions": "gradient", **more}), given)


def test_a_model_without_a_loss_is_refused() -> None:
    with pytest.raises(OptionError, match="returned no loss"):
        prepare(
            nn.Sequential(nn.Linear(3, 3)),
            config("gradient", target_modules=["0"], basis_rank=2, off_diagonals=1),
            [{"input": torch.ones(1, 3)}],
        )


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"directions": "gradients"}, "directions='gradients' does not exist"),
        (
            {"method": "spectral_a", "pattern": None, "off_diagonals": None, "basis_rank": None},
            "spectral_a tunes the weight's own",
        ),
        ({"save_basis": "never"}, "save_basis='never': directions='gradient' cannot be recomputed"),
    ],
)
def test_directions_that_do_not_go_together_are_refused(more: dict[str, Any], said: str) -> None:
    with pytest.raises(OptionError, match=said):
        config(**{"directions": "gradient", **more})


def test_attaching_without_the_examples_is_refused_before_anything_is_changed() -> None:
    model = Two()
    with pytest.raises(OptionError, match="Call config = spectune.prepare"):
        get_peft_model(model, config("gradient"))
    with pytest.raises(OptionError, match="second: spectune.prepare has not computed"):
        get_peft_model(model, _narrowed())
    assert isinstance(model.first, nn.Linear) and isinstance(model.second, nn.Linear)


def _narrowed() -> SpectralConfig:
    found = prepare(Two(), config("gradient", target_modules=["first"]), batches())
    found.target_modules = {"first", "second"}
    return found


@pytest.mark.parametrize("quantisation", ["bnb-4bit", "bnb-8bit", "torchao-int8"])
@pytest.mark.parametrize("directions", OF_DATA)
def test_a_quantised_base_has_them_too_and_stays_quantised(quantisation: str, directions: str) -> None:
    model = quantised(quantisation)
    kind = type(model[0].weight)
    x = torch.randn(20, 64, generator=torch.Generator().manual_seed(0))
    given = config(directions, target_modules=["0"])
    found = prepare(model, given, [{"x": x}], loss=lambda model, batch: model(batch["x"]).square().sum())
    tuned = get_peft_model(model, found)
    assert type(tuned.base_model.model[0].base_layer.weight) is kind
    train(tuned)
    assert bool(torch.isfinite(tuned(x)).all())


def test_a_layer_that_is_called_by_keyword_is_seen() -> None:
    class Keyword(Two):
        def forward(self, x: torch.Tensor, labels: torch.Tensor, attention_mask: Any = None) -> Any:
            middle = self.first(input=x) + 1
            losses_N = nn.functional.cross_entropy(self.second(middle.tanh()).flatten(0, -2), labels.flatten())
            return type("Output", (), {"loss": losses_N})

    one, other = (prepare(model, config("activation"), batches()).spectra for model in (Keyword(), Two()))
    assert one is not None and other is not None
    torch.testing.assert_close(one["first"].Vh_RI, other["first"].Vh_RI)
