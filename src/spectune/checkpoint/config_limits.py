"""Refuse configs of absurdly large models before anything is built."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..errors import AdapterError

COUNTS = re.compile(r"(^|_)(layers?|blocks|depths?|stages|experts|labels)$")
# Far above every published model (Llama 3.1 405B: 126 layers; DeepSeek V3: 61 layers of 256 experts). A module on
# the meta device costs about a millisecond and ten kilobytes, so a lying config could cost hours. Chosen.
MOST = {"layers": 2_000, "experts": 20_000, "labels": 1_000_000}
MOST_MODULES = 1_000_000


def refuse_absurd_size(path: Path, config: Mapping[str, Any]) -> None:
    """Raise `AdapterError` for a config with more layers, experts or labels than any model has; sub-configs too."""
    largest = dict.fromkeys(MOST, 1)
    for key, value in _counts(config):
        kind = next((kind for kind in ("experts", "labels") if key.endswith(kind)), "layers")
        if value > MOST[kind]:
            raise AdapterError(
                f"{path}: {key}={value:.6g} is more than any model has (limit {MOST[kind]:,}). Do not use it."
                if value < 2**1000
                else f"{path}: {key} has hundreds of digits. Do not use it."
            )
        largest[kind] = max(largest[kind], value)
    if largest["layers"] * largest["experts"] > MOST_MODULES:
        raise AdapterError(
            f"{path}: {largest['layers']:,} layers of {largest['experts']:,} experts are not real. Do not use it."
        )


def _counts(config: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    waiting: list[tuple[str, Any]] = list(config.items())
    while waiting:
        key, value = waiting.pop()
        if isinstance(value, Mapping):
            waiting += [(str(inner), entry) for inner, entry in value.items()]
        elif isinstance(value, (list, tuple)):
            waiting += [(key, entry) for entry in value]
        elif isinstance(value, int) and COUNTS.search(key):
            yield key, value
