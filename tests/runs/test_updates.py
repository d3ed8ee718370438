"""How far layers moved, by what they do and not by what they store."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, OFTConfig, get_peft_model
from torch import nn

from spectune.pages.charts import update_chart
from spectune.runs import LayerMove, layer_updates

from ..models import MODELS
from ..tuner.conftest import adapted

FOREIGN = {
    "LoRA": LoraConfig(r=2, target_modules=["lin0"], init_lora_weights=False, lora_dropout=0.5),
    "DoRA": LoraConfig(r=2, target_modules=["lin0"], init_lora_weights=False, use_dora=True),
    "OFT": OFTConfig(r=0, oft_block_size=4, target_modules=["lin0"], init_weights=False),
}


def moved(base: nn.Module, merged: nn.Module, name: str) -> tuple[float, float]:
    W_OI, tuned_OI = (model.get_submodule(name).weight.detach() for model in (base, merged))
    return float((tuned_OI - W_OI).norm()), float(W_OI.norm())


@pytest.mark.parametrize("method", ["spectral_r", "svft", *FOREIGN])
def test_the_norms_are_those_of_the_merged_weight(method: str) -> None:
    def make() -> nn.Module:
        if method not in FOREIGN:
            return adapted(MODELS["mlp"], method)
        torch.manual_seed(0)
        return get_peft_model(MODELS["mlp"].fresh(), FOREIGN[method])  # type: ignore[arg-type]

    model = make().train()
    found = layer_updates(model)
    merged = make().merge_and_unload()  # type: ignore[operator]
    assert model.training and [update.name for update in found] == (
        ["lin0", "lin1"] if method not in FOREIGN else ["lin0"]
    )
    for update in found:
        expected = moved(MODELS["mlp"].fresh(), merged, update.name)
        assert (update.moved, update.norm) == pytest.approx(expected, rel=1e-4) and update.moved > 1e-3


def test_each_layer_has_a_bar_as_high_as_its_share() -> None:
    chart = update_chart(
        [LayerMove(name=n, moved=m, norm=w) for n, m, w in (("a<b", 1.0, 10.0), ("b", 2.0, 10.0), ("zero", 0.0, 0.0))]
    )
    heights = [float(part.split('"')[0]) for part in chart.split(' height="')[1:]]
    assert len(heights) == 3 and heights[1] == pytest.approx(2 * heights[0], rel=0.01) and heights[2] == 0.5
    assert "a&lt;b: 10.00%" in chart and "zero: 0.00%" in chart
    assert update_chart([]).startswith("<svg")
