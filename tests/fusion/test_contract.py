"""One contract for all rules; a new rule passes it by standing in `FUSIONS` and in CASES."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from spectune.algebra import dense
from spectune.errors import OptionError
from spectune.fusion import FUSIONS, Fusion, Part
from spectune.fusion.table import build_fusion

from .parts import lora_part, orthogonal_part, spectral_part

CASES: dict[str, tuple[Fusion, Callable[[], list[Part]]]] = {
    "spectral": (
        build_fusion("spectral", {}),
        lambda: [spectral_part("a", (0, 1, 2), 1), spectral_part("b", (3, 4), 2), spectral_part("c", (9, 7), 3)],
    ),
    "spectral-overlap": (
        build_fusion("spectral", {"allow_overlap": True}),
        lambda: [spectral_part("a", (0, 1, 2), 1), spectral_part("b", (2, 4), 2), spectral_part("c", (2, 0), 3)],
    ),
    "average": (
        build_fusion("average", {}),
        lambda: [spectral_part("a", (0, 1), 1), lora_part("b", 5, 2), orthogonal_part("c", 1, 3)],
    ),
    "gradient": (
        build_fusion("gradient", {}),
        lambda: [spectral_part("a", (0, 1), 1), lora_part("b", 5, 2), lora_part("c", 2, 3)],
    ),
    "gradient-limit": (build_fusion("gradient", {"eps": 0.0}), lambda: [lora_part("a", 5, 2), lora_part("b", 2, 3)]),
    "task_singular": (
        build_fusion("task_singular", {}),
        lambda: [spectral_part("a", (0, 1), 1), lora_part("b", 5, 2), orthogonal_part("c", 1, 3)],
    ),
    "isotropic": (
        build_fusion("isotropic", {}),
        lambda: [spectral_part("a", (0, 1), 1), lora_part("b", 5, 2), orthogonal_part("c", 1, 3)],
    ),
    "isotropic-common": (
        build_fusion("isotropic", {"common": 0.6}),
        lambda: [spectral_part("a", (0, 1), 1), lora_part("b", 5, 2), orthogonal_part("c", 1, 3)],
    ),
    "core": (
        build_fusion("core", {}),
        lambda: [spectral_part("a", (0, 1), 1), lora_part("b", 5, 2), orthogonal_part("c", 1, 3)],
    ),
    "aligned_ties": (
        build_fusion("aligned_ties", {}),
        lambda: [spectral_part("a", (0, 1), 1), lora_part("b", 5, 2), orthogonal_part("c", 1, 3)],
    ),
    "calibrated": (
        build_fusion("calibrated", {}),
        lambda: [spectral_part("a", (0, 1), 1), lora_part("b", 5, 2), orthogonal_part("c", 1, 3)],
    ),
    "sequential": (
        build_fusion("sequential", {}),
        lambda: [spectral_part("a", (0, 1), 1), lora_part("b", 5, 2), lora_part("c", 2, 3)],
    ),
    "match": (
        build_fusion("match", {}),
        lambda: [spectral_part("a", (0, 1), 1), lora_part("b", 5, 2), lora_part("c", 2, 3)],
    ),
    "orthogonal": (
        build_fusion("orthogonal", {}),
        lambda: [orthogonal_part("a", 0, 1), orthogonal_part("b", 1, 2), orthogonal_part("c", 3, 3)],
    ),
}
cases = pytest.mark.parametrize("case", CASES)


def test_every_rule_is_under_contract() -> None:
    assert {rule.name for rule, _ in CASES.values()} == set(FUSIONS)


@cases
def test_one_adapter_at_weight_1_is_the_identity(case: str) -> None:
    rule, parts = CASES[case]
    for part in parts():
        torch.testing.assert_close(dense(rule.fuse([part], [1.0]).delta), dense(part.delta), rtol=1e-6, atol=1e-7)


@cases
def test_the_order_of_the_adapters_does_not_matter(case: str) -> None:
    rule, parts = CASES[case]
    weights = [0.5, 1.25, 0.7][: len(parts())]
    forward = dense(rule.fuse(parts(), weights).delta)
    torch.testing.assert_close(dense(rule.fuse(parts()[::-1], weights[::-1]).delta), forward, rtol=1e-9, atol=1e-9)
    assert forward.abs().max() > 1e-2


@cases
def test_weights_scale_the_update_where_the_rule_is_linear(case: str) -> None:
    rule, parts = CASES[case]
    weights = [0.5, 1.25, 0.7][: len(parts())]
    once = dense(rule.fuse(parts(), weights).delta)
    thrice = dense(rule.fuse(parts(), [3 * weight for weight in weights]).delta)
    same = torch.allclose(thrice, 3 * once, rtol=1e-9, atol=1e-9)
    assert same == rule.is_linear()


@pytest.mark.parametrize("case", ["calibrated", "match", "sequential", "gradient", "average"])
def test_a_copy_of_an_adapter_beside_it_is_the_adapter(case: str) -> None:
    rule, parts = CASES[case]
    part = parts()[1]
    weight = 1.0 if rule.whole_weights else 0.5
    torch.testing.assert_close(
        dense(rule.fuse([part, part], [weight] * 2).delta), dense(part.delta), rtol=1e-6, atol=1e-7
    )


def test_an_option_that_a_rule_does_not_use_is_refused() -> None:
    with pytest.raises(OptionError, match="rule 'average' has no option 'allow_overlap'"):
        build_fusion("average", {"allow_overlap": True})
    with pytest.raises(OptionError, match=r"unknown rule 'spectrall'. Did you mean 'spectral' or 'sequential'\?"):
        build_fusion("spectrall", {})
