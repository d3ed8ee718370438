"""`prepare(away_from=…)`: an adapter that leaves the inputs of other tasks alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import get_peft_model
from transformers import BertConfig, BertForSequenceClassification

from spectune import SpectralConfig, prepare
from spectune.errors import OptionError
from spectune.records import Weight
from spectune.spectrum import Moments, OthersInputs
from spectune.spectrum import data as data_module

from .test_prepare import OF_DATA, ROUNDED, Two, batches, config

R = 4


def others(dims: int = 3) -> list[dict[str, torch.Tensor]]:
    """Get inputs that lie in a few directions."""
    stream = torch.Generator().manual_seed(7)
    span = torch.randn(dims, 12, generator=stream)
    return [{"x": torch.randn(6, 3, dims, generator=stream) @ span, "labels": torch.zeros(6, 3).long()} for _ in (0, 1)]


def small(directions: str) -> SpectralConfig:
    return config(directions, basis_rank=R, off_diagonals=R - 1, target_modules=["first"])


@pytest.mark.parametrize("directions", OF_DATA)
def test_whatever_is_trained_inputs_of_the_others_pass_unchanged(directions: str) -> None:
    data = batches(8) if directions == "gradient_mean" else batches()
    model = Two()
    layer, x = model.first, torch.cat([batch["x"] for batch in others()])
    before = layer(x)
    prepared = prepare(model, small(directions), data, away_from=others(), away_share=0.9999)
    tuned = get_peft_model(model, prepared)
    for parameter in tuned.parameters():
        if parameter.requires_grad:
            parameter.data.normal_()
    own = torch.cat([batch["x"] for batch in data])
    moved, others_moved = tuned.first(own) - layer(own), tuned.first(x) - before
    assert moved.norm() > 0.1 * own.norm()
    assert others_moved.norm() / x.norm() < 2 * ROUNDED * moved.norm() / own.norm()


def test_the_directions_are_the_best_beside_those_of_the_others() -> None:
    """The leading ones of the projected moment, not the projections of the leading ones."""
    spectrum = prepare(Two(), small("activation"), batches(), away_from=others(), away_share=0.9999).spectra["first"]
    x = torch.cat([batch["x"].flatten(0, 1) for batch in batches()]).double()
    seen = torch.cat([batch["x"].flatten(0, 1) for batch in others()]).double()
    Q_IK = torch.linalg.svd(seen)[2][:3].mT
    beside = x - x @ Q_IK @ Q_IK.mT
    V_IR = torch.linalg.svd(beside)[2][:R].mT
    ours = spectrum.Vh_RI.double()
    assert torch.dist(ours.mT @ ours, V_IR @ V_IR.mT) < 4 * ROUNDED


def test_a_transformer_needs_no_labels_for_the_others() -> None:
    tiny = BertConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, vocab_size=99)
    model = BertForSequenceClassification(tiny)
    asked = SpectralConfig(
        method="svft", pattern="dense", basis_rank=8, target_modules=["query", "pooler.dense"], directions="gradient"
    )
    stream = torch.Generator().manual_seed(0)

    def texts(**more: Any) -> list[dict[str, torch.Tensor]]:
        return [{"input_ids": torch.randint(99, (8, 12), generator=stream), **more} for _ in range(4)]

    mine, theirs = texts(labels=torch.randint(2, (8,), generator=stream)), texts()
    plain, turned = prepare(model, asked, mine), prepare(model, asked, mine, away_from=theirs, away_share=0.5)
    name = next(iter(plain.spectra))
    inputs = OthersInputs(name, (32, 32), 8, torch.device("cpu"))
    layer = model.get_submodule(name)
    hook = layer.register_forward_pre_hook(lambda _, args: inputs.add(args[0].flatten(0, 1), args[0]))
    with torch.no_grad():
        for batch in theirs:
            model.eval()(**batch)
    hook.remove()
    Q_IK = inputs.directions(0.5).float()
    leak = [float((one.spectra[name].Vh_RI.float() @ Q_IK).norm()) for one in (plain, turned)]
    assert leak[1] < 4 * ROUNDED < leak[0] / 5


def test_tuples_will_do_and_what_is_missing_is_named() -> None:
    class Pair(Two):
        def forward(self, x: torch.Tensor, labels: torch.Tensor, attention_mask: Any = None) -> Any:
            return super().forward(x, labels).loss, None

    asked, own = small("gradient"), batches()
    found = prepare(Pair(), asked, own, away_from=others(), loss=lambda model, batch: model(**batch)[0])
    assert set(found.spectra) == {"first"}
    with pytest.raises(OptionError, match="^away_from: there are none"):
        prepare(Two(), asked, own, away_from=[])
    with pytest.raises(OptionError, match="^batches: there are none"):
        prepare(Two(), asked, [], away_from=others())


def test_what_leaves_too_few_directions_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        OptionError, match=r"first: away_share=0.99999 takes 9 of 12 directions, and the adapter needs 4"
    ):
        prepare(Two(), small("gradient"), batches(), away_from=others(9), away_share=0.99999)
    moments = Moments("activation", "first", (9, 12), R, torch.device("cpu"))
    moments.add(torch.zeros(5, 12), torch.ones(5, 9))
    moments.away_IK = torch.eye(12)[:, :3]
    with pytest.raises(OptionError, match="first: beside those of away_from the examples have fewer than 4 input"):
        moments.spectrum(Weight("first", torch.ones(9, 12)))
    for share in (0, 1, float("nan")):
        with pytest.raises(OptionError, match="away_share=.*between 0 and 1"):
            prepare(Two(), small("gradient"), batches(), away_from=others(), away_share=share)
    chosen = config("weight", pattern="chosen", off_diagonals=None, places=7)
    with pytest.raises(OptionError, match="away_from: directions='weight' are the weight's own"):
        prepare(Two(), chosen, batches(), away_from=others())
    monkeypatch.setattr(data_module, "WHOLE_SIDE", 4)  # as a layer of more than 1,024 inputs
    monkeypatch.setattr(data_module, "MORE_COLUMNS", 0)
    with pytest.raises(OptionError, match="the 8 directions that are kept of these inputs hold 0.8"):
        prepare(Two(), small("gradient"), batches(), away_from=others(12), away_share=0.99999)


def test_steep_spectra_leave_nothing_of_the_strong_directions() -> None:
    """Eigenvectors in float32 are orthonormal to 1e-6, and a strong direction is 1e4 times as strong as a weak one."""
    stream = torch.Generator().manual_seed(0)
    scales_I = torch.logspace(0, -4, 64)
    turn_II = torch.linalg.qr(torch.randn(64, 64, generator=stream))[0]
    theirs, mine = ((torch.randn(400, 64, generator=stream) * scales_I) @ turn_II for _ in range(2))
    moments = Moments("activation", "layer", (16, 64), 16, torch.device("cpu"))
    inputs = OthersInputs("layer", (16, 64), 16, torch.device("cpu"))
    moments.add(mine, torch.randn(400, 16, generator=stream))
    inputs.add(theirs, theirs)
    moments.away_IK = inputs.directions(0.99)
    V_IR = moments.spectrum(Weight("layer", torch.randn(16, 64, generator=stream))).Vh_RI.mT.double()
    assert float((moments.away_IK.mT @ V_IR).abs().max()) < 1e-6
