"""`budget`: the cost of every method on a model, from the shapes of its weights."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..checkpoint import PEFT_PREFIX
from ..checkpoint.targets import Target
from ..errors import OptionError, WeightError
from ..methods import METHODS, Method
from ..records import Spectrum
from ..spectrum import sketch_width

FLOAT_BYTES = 4  # adapters are trained, kept and saved in float32
# float32 number, gradient, and AdamW's two moments.
TRAINING_BYTES = 4 * FLOAT_BYTES
# Every method with its own defaults, and SVFT's band, which its paper reports besides the diagonal.
VARIANTS: dict[str, tuple[dict[str, Any], ...]] = {"svft": ({}, {"pattern": "banded"})}


@dataclass(frozen=True)
class BudgetRow:
    """The cost of one method on all weights that it can adapt."""

    method: str
    trainable: int
    file_bytes: int
    """The adapter's safetensors file: trained tensors, sketches, and the header. The header is
    exact if the layers have the same names in the model as in the checkpoint (tensors that all weights share are
    counted under the first of these names); otherwise it differs by the length of the names."""
    frozen_bytes: int
    """The basis and everything else that stays in memory while the adapter is attached (float32)."""
    training_bytes: int
    """The trained numbers, their gradients and AdamW's two moments (float32). Activations are not counted."""
    exact_rank: int | None
    """The rank of a LoRA that is exactly equal to any update of this method, on the weight that needs most; None for
    DoRA, which does not have a low-rank update."""
    decompose_seconds: float | None = None
    """An estimate for this machine; None if it was not measured, 0 if no decomposition is needed."""
    left_out: int = 0
    """Weights that the method cannot adapt with these options (too few directions)."""

    @property
    def memory_bytes(self) -> int:
        """The memory that training needs besides the model, without activations."""
        return self.frozen_bytes + self.training_bytes


def budget(targets: Sequence[Target], r: int) -> list[BudgetRow]:
    """Get what every method in `METHODS`, LoRA and DoRA would cost at `r` on these weights.

    Methods without an r (svft, svdiff) keep their defaults. Counted for columns="top" and save_basis="auto", with
    no equal singular values at the cut: otherwise the basis is embedded and the file larger.
    """
    if r < 1:
        raise OptionError(f"--r {r} must be at least 1.")
    rows = [_row(name, method, targets) for name, method in budget_methods(r).items()]
    return [*rows, _lora("lora", targets, r, dora=False), _lora("dora", targets, r, dora=True)]


def budget_methods(r: int) -> dict[str, Method]:
    """Get row name -> method for a budget, without methods that do not accept this r."""
    found: dict[str, Method] = {}
    for name, kind in METHODS.items():
        for options in VARIANTS.get(name, ({},)):
            asked = options | ({"r": r} if "r" in kind.options() else {})
            try:
                found[" ".join([name, *map(str, options.values())])] = kind(**asked)
            except OptionError:
                continue  # spectral_r rotates planes, so r = 1 is impossible
    return found


def fitted(method: Method, shape: tuple[int, int]) -> Method | None:
    """Get a method as attached to a weight of this shape, or None if it has nothing to train."""
    try:
        return method.fitted(*shape)
    except WeightError:
        return None


@dataclass(frozen=True)
class _Cost:
    trainable: int
    frozen_bytes: int
    saved: Mapping[str, tuple[int, ...]]
    rank: int


def _row(name: str, method: Method, targets: Sequence[Target]) -> BudgetRow:
    costs = {shape: _cost(method, shape) for shape in {target.shape for target in targets}}
    fitting = [(target.name, cost) for target in targets if (cost := costs[target.shape]) is not None]
    shared = method.shared_shapes(*targets[0].shape) if fitting else {}
    shared_count = sum(math.prod(shape) for shape in shared.values())
    trainable = sum(cost.trainable for _, cost in fitting) + shared_count
    saved = {f"{layer}.spectune_adapter.{key}": shape for layer, cost in fitting for key, shape in cost.saved.items()}
    if fitting:
        saved |= {f"{fitting[0][0]}.spectune_adapter.{key}": shape for key, shape in shared.items()}
    return BudgetRow(
        name,
        trainable,
        file_bytes(saved),
        sum(cost.frozen_bytes for _, cost in fitting),
        trainable * TRAINING_BYTES,
        max((cost.rank for _, cost in fitting), default=0),
        left_out=len(targets) - len(fitting),
    )


def _cost(asked: Method, shape: tuple[int, int]) -> _Cost | None:
    method = fitted(asked, shape)
    if method is None:
        return None
    rows_O, cols_I = shape
    R = method.basis(rows_O, cols_I)[0]
    with torch.device("meta"):  # only its size is needed
        spectrum = Spectrum.unknown(rows_O, cols_I, R)
    try:
        frozen = method.frozen(spectrum)
    except WeightError:
        return None
    # As SpectralModule keeps them: integers as int32, so everything has four bytes.
    frozen_numbers = sum(tensor.numel() for tensor in frozen.values())
    sketch = (R, 2 * sketch_width(R))
    numbers = rows_O * R + R + R * cols_I + math.prod(sketch) + frozen_numbers
    saved = dict(method.trained_shapes(rows_O, cols_I)) | {"sketch": sketch}
    saved |= {key: tuple(tensor.shape) for key, tensor in frozen.items()} if method.saves_frozen() else {}
    count = method.trainable_count(rows_O, cols_I)
    return _Cost(count, numbers * FLOAT_BYTES, saved, method.exact_rank(rows_O, cols_I))


def _lora(name: str, targets: Sequence[Target], r: int, dora: bool) -> BudgetRow:
    saved: dict[str, tuple[int, ...]] = {}
    for target in targets:
        rows_O, cols_I = target.shape
        saved |= {f"{target.name}.lora_A.weight": (r, cols_I), f"{target.name}.lora_B.weight": (rows_O, r)}
        saved |= {f"{target.name}.lora_magnitude_vector": (rows_O,)} if dora else {}
    trainable = sum(math.prod(shape) for shape in saved.values())
    rank = max((min(r, *target.shape) for target in targets), default=0)
    return BudgetRow(name, trainable, file_bytes(saved), 0, trainable * TRAINING_BYTES, None if dora else rank, 0.0)


def file_bytes(shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Get the size of a safetensors file with these float32 tensors under PEFT's names.

    8 bytes of length, the header as compact JSON padded with spaces to a multiple of 8, then the numbers.
    """
    end = 0
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    for name, shape in sorted(shapes.items()):
        start, end = end, end + math.prod(shape) * FLOAT_BYTES
        header[PEFT_PREFIX + name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [start, end]}
    text = len(json.dumps(header, separators=(",", ":")))
    return 8 + -(-text // 8) * 8 + end
