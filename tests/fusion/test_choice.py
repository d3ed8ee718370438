from __future__ import annotations

import torch

from spectune.fusion.choice import choose_rule, mean_cosine
from spectune.fusion.contract import Part
from spectune.records import Delta

from .parts import lora_part


def test_one_adapter_is_kept_and_copies_are_averaged_and_others_are_merged() -> None:
    one, other = lora_part("a", 3, 1), lora_part("b", 3, 20)
    delta = one.delta
    near = Part("c", "layer", Delta(delta.left_OP + 0.1 * other.delta.left_OP, delta.core, delta.right_QI))
    assert choose_rule({"layer": [one]}, None)[0] == "average"
    assert choose_rule({"layer": [one, near]}, None)[0] == "average"
    name, why = choose_rule({"layer": [one, other]}, None)
    assert name == "task_singular" and f"{mean_cosine({'layer': [one, other]}):.2f}" in why
    assert choose_rule({"layer": [one, near]}, "match")[0] == "match"


def test_the_mean_cosine_weighs_layers_by_size_and_knows_no_pairs() -> None:
    one = lora_part("a", 3, 1)
    small = Part("a", "two", Delta(one.delta.left_OP, 0.1 * torch.as_tensor(one.delta.core), one.delta.right_QI))
    minus = Part("b", "two", Delta(-one.delta.left_OP, 0.1 * torch.as_tensor(one.delta.core), one.delta.right_QI))
    assert mean_cosine({"layer": [one]}) == 0.0
    both = mean_cosine({"layer": [one, Part("b", "layer", one.delta)], "two": [small, minus]})
    assert abs(both - (1 - 0.01) / (1 + 0.01)) < 1e-9
