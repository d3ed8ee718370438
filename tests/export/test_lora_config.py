"""The config puts the right ranks on exactly the adapted layers, by PEFT's own rules of matching."""

import pytest
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key

from spectune.checkpoint.patterns import rank_pattern
from spectune.export.lora_config import target_modules

PATHS = ["m.0.q", "m.0.k", "m.1.q", "m.1.k", "m.1.k.inner", "head", "x.m.0.q", "m_0.q"]


@pytest.mark.parametrize(
    ("adapted", "expected"),
    [
        (["head"], ["head"]),
        (["m.0.k", "m.1.k"], ["k"]),
        (["m.0.k"], ["m.0.k"]),
        (["m.0.q"], r"m\.0\.q"),
        (["x.m.0.q", "head"], ["head", "x.m.0.q"]),
    ],
)
def test_the_shortest_targets_that_match_nothing_else_are_taken(adapted, expected):
    targets = target_modules(adapted, PATHS, [])
    assert targets == expected
    config = LoraConfig(target_modules=targets)
    assert [path for path in PATHS if check_target_module_exists(config, path)] == [
        path for path in PATHS if path in adapted
    ]


def test_modules_to_save_are_not_counted_as_matches():
    assert target_modules(["a.dense"], ["a.dense", "head.dense"], ["head"]) == ["dense"]
    assert target_modules(["a.dense"], ["a.dense", "head.dense"], []) == ["a.dense"]


@pytest.mark.parametrize(
    ("ranks", "r", "pattern"),
    [
        ({"m.0.q": 4, "m.1.q": 4}, 4, {}),
        ({"m.0.q": 4, "m.1.q": 4, "m.0.k": 2, "m.1.k": 2, "head": 2}, 2, {"q": 4}),
        ({"m.0.q": 4, "x.m.0.q": 2, "m.1.q": 2}, 2, {r"^m\.0\.q": 4}),
        ({"m.0.q": 1, "m.0.k": 2}, 2, {"q": 1}),
    ],
)
def test_every_layer_gets_its_own_rank_by_the_rule_of_peft(ranks, r, pattern):
    assert rank_pattern(ranks) == (r, pattern)
    for name, rank in ranks.items():
        assert pattern.get(get_pattern_key(list(pattern), name), r) == rank
