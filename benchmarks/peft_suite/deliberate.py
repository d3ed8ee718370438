"""The failures that are meant to be: what PEFT's tests ask for and Spectune refuses, with the reason."""

from __future__ import annotations

import re

REASONS: dict[str, str] = {
    r"safe_serialization=False": "Pickled adapters are neither written nor read: unpickling a file runs its code.",
    r"trained on another base weight": "The file's sketch says that the adapter belongs to another base.",
    r"spectral_r needs 2 or more of the directions": (
        "A weight with one row or column has one singular direction, and nothing to rotate it with."
    ),
    r"the base weight is quantised; merging would round": (
        "An update is much smaller than a step of 4 or 8 bits, so merging into a quantised weight would round it away."
    ),
    r"test_from_pretrained_cache_dir": "The test downloads a config into an empty cache, and these runs are offline.",
    r"test_mixed_adapter_batches_mha_raises": "Refused as PEFT does; the test looks for the name of LoRA's own class.",
}


def reason(record: dict[str, str]) -> str:
    """Get why a test is meant to fail; nothing for one that is not."""
    return next((why for words, why in REASONS.items() if re.search(words, record["test"] + record["told"])), "")
