"""`find_targets`: the weights of a checkpoint that an adapter would tune, by name and shape alone."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from ..errors import OptionError, nearest
from .adapter_folder import CONFIG_LIMIT
from .reader import Checkpoint

WEIGHT_ENDINGS = (".weight", "in_proj_weight")
# Usually not adapted: embeddings, position and relative-bias tables, and heads.
SKIPPED = r"embed|(^|\.)(wte|wpe|shared|lm_head|classifier|score|qa_outputs|head|relative_attention_bias|cls)(\.|$)"
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# transformers' models whose linear layers are Conv1D, which stores in x out; the tensors do not show it.
CONV1D_MODELS = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")
CONV1D_NAMES = re.compile(r"\.(c_attn|q_attn|c_proj|c_fc)$")


@dataclass(frozen=True)
class Target:
    """One weight that an adapter can be put on."""

    name: str
    """The layer: the tensor's name without `.weight`."""
    tensor: str
    shape: tuple[int, int]
    """(O, I); the kernels of a convolution are flattened."""
    group: str
    """Its name in every block: `q_proj`, `attention.output.dense`."""
    transposed: bool = False
    """True if the checkpoint stores in x out."""

    def matrix(self, base: Checkpoint) -> torch.Tensor:
        """Read W_OI."""
        stored = base.tensor(self.tensor)
        return stored.T if self.transposed else stored.flatten(1)


def find_targets(
    base: Checkpoint, include: str | None = None, exclude: str | None = None
) -> tuple[list[Target], dict[str, int]]:
    """Get the weights to look at, and how many matrices were left out, by reason.

    By default every matrix and every convolution's kernel except embeddings, position tables and heads. `include`
    (a regex, searched in the name) replaces that choice; `exclude` removes some. Norms and biases are not matrices;
    weights stored as integers or in 8-bit floats have their scales elsewhere and are left out. `OptionError` for a
    wrong regex, and if no weight is left.
    """
    wanted, unwanted = _pattern("include", include), _pattern("exclude", exclude)
    conv1d = _model_type(base.path) in CONV1D_MODELS
    kept: dict[str, tuple[str, tuple[int, int], bool]] = {}
    left_out: Counter[str] = Counter()
    shapes, dtypes = base.shapes, base.dtypes
    for tensor, shape in shapes.items():
        name = tensor.removesuffix(".weight")
        if len(shape) < 2 or not tensor.endswith(WEIGHT_ENDINGS) or 0 in shape:
            continue
        if reason := _reason(name, dtypes[tensor], wanted, unwanted):
            left_out[reason] += 1
            continue
        transposed = conv1d and bool(CONV1D_NAMES.search(name))
        rows_O, cols_I = shape[0], math.prod(shape[1:])
        kept[name] = (tensor, (cols_I, rows_O) if transposed else (rows_O, cols_I), transposed)
    if not kept:
        what = "weights to adapt" if include is None and exclude is None else f"weights for {include or exclude!r}"
        names = [name.removesuffix(".weight") for name, shape in shapes.items() if len(shape) >= 2]
        raise OptionError(f"{base.path}: has no {what}. {nearest(include or '', names) if names else 'Check it.'}")
    groups = group_names(kept)
    targets = [Target(name, kept[name][0], kept[name][1], groups[name], kept[name][2]) for name in ordered(kept)]
    return targets, dict(left_out)


def _reason(name: str, dtype: torch.dtype, wanted: re.Pattern[str] | None, unwanted: re.Pattern[str] | None) -> str:
    if wanted is None and re.search(SKIPPED, name):
        return "embeddings and heads"
    if wanted is not None and not wanted.search(name):
        return "not in --include"
    if unwanted is not None and unwanted.search(name):
        return "in --exclude"
    return "" if dtype in FLOATS else f"stored as {str(dtype).removeprefix('torch.')}, with scales elsewhere"


def _pattern(option: str, words: str | None) -> re.Pattern[str] | None:
    try:
        return None if words is None else re.compile(words)
    except re.error as error:
        raise OptionError(f"--{option} {words!r} is not a regular expression: {error}. Correct it.") from None


def _model_type(path: Path) -> str:
    """Get the model_type from a folder's config.json, or ""."""
    place = path / "config.json"
    try:
        if place.stat().st_size > CONFIG_LIMIT:
            return ""
        read = json.loads(place.read_bytes())
    except (OSError, ValueError, RecursionError):
        return ""
    return str(read.get("model_type", "")) if isinstance(read, dict) else ""


def group_names(names: Iterable[str]) -> dict[str, str]:
    """Get, for each layer, the shortest ending that names the same place in every block and no other place.

    Numbers in a name count as one: `layers.0.mlp.up_proj` and `layers.1.mlp.up_proj` are `up_proj`.
    """
    patterns = {name: _numbers_as_one(name) for name in names}
    endings: Counter[str] = Counter()
    for pattern in set(patterns.values()):
        parts = pattern.split(".")
        endings.update(".".join(parts[start:]) for start in range(len(parts)))
    return {name: _shortest(pattern.split("."), endings) for name, pattern in patterns.items()}


def _numbers_as_one(name: str) -> str:
    if "." not in name:  # kohya's trainer joins the parts of a path with _
        return re.sub(r"(?<=_)\d+(?=_)", "*", name)
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def _shortest(parts: list[str], endings: Counter[str]) -> str:
    for start in range(len(parts) - 1, -1, -1):
        ending = ".".join(parts[start:])
        if endings[ending] == 1 and parts[start] != "*":
            return ending
    return ".".join(parts)


def ordered(names: Iterable[str]) -> list[str]:
    """Get names in the order of their blocks: numbers sort as numbers."""
    return sorted(
        names,
        key=lambda name: [(part.isdecimal(), int(part) if part.isdecimal() else 0, part) for part in name.split(".")],
    )


def spread(targets: list[Target], sample: int | None) -> list[Target]:
    """Get `sample` targets of each group, evenly spread over the blocks; None for all."""
    if sample is None:
        return targets
    if sample < 1:
        raise OptionError(f"--sample {sample}: must be at least 1.")
    members: dict[str, list[str]] = {}
    for target in targets:
        members.setdefault(target.group, []).append(target.name)
    chosen = set()
    for names in members.values():
        last = len(names) - 1
        places = (
            {round((i + 0.5) * last / sample) for i in range(sample)}
            if sample == 1
            else {round(i * last / (sample - 1)) for i in range(sample)}
        )
        chosen |= {names[place] for place in places}
    return [target for target in targets if target.name in chosen]
