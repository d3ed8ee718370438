"""`Method`: everything that a method must provide.

A method is a frozen record of its own options with a few pure functions: which singular directions
it wants, which numbers it trains, and how these become a `Delta`. Forward, dense weight, merge,
LoRA factors and fusion are written once, for `Delta`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar, TypeVar

import torch

from ..errors import LeftOutError, OptionError, WeightError
from ..records import Delta, Spectrum

Columns = str | int | tuple[int, ...]
Tensors = Mapping[str, torch.Tensor]


SHARING = ("none", "kind")

Value = TypeVar("Value")


def option(default: Value, text: str) -> Value:
    """Get the field of a method's option: its default, and the text that `help(SpectralConfig)` shows."""
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True, kw_only=True)
class Method:
    """One way to turn trained numbers into a `Delta` in the singular space of a weight.

    A subclass adds its options as fields (`option`), checks them in `__post_init__`, and stands in `METHODS`.
    """

    name: ClassVar[str]
    """The word in `SpectralConfig(method=...)`, in files and in the docs."""
    paper: ClassVar[str]
    """Title and arXiv number."""
    use_when: ClassVar[str] = ""
    """When to choose it, for the README's table; empty for a method that is not in it."""
    learning_rate: ClassVar[float]
    """A first guess for AdamW; the subclass says where it comes from."""

    least_size: ClassVar[int] = 1
    """The smallest value of `size_option`."""
    takes_any_directions: ClassVar[bool] = False
    """Whether the update is confined to the basis and starts at zero in any, so that data may choose it."""

    def usual_rate(self) -> float:
        """Get a first guess for AdamW with these options; `learning_rate` where they do not matter."""
        return self.learning_rate

    def basis(self, rows_O: int, cols_I: int) -> tuple[int, Columns]:
        """Get how many singular directions of an O x I weight this method wants, and which."""
        raise NotImplementedError

    def fitted(self, rows_O: int, cols_I: int, name: str = "weight") -> Method:
        """Get this method for one O x I weight: `r` lowered to what the weight has, if that is less.

        It follows from the options and the shape alone, so a file need not say it. `LeftOutError`, with the
        weight's name, where nothing is left to train.
        """
        return self

    def trained_shapes(self, rows_O: int, cols_I: int) -> dict[str, tuple[int, ...]]:
        """Get the names and shapes of the trainable tensors. Zeros in all of them mean dW = 0
        unless `start` says otherwise."""
        raise NotImplementedError

    def delta(self, spectrum: Spectrum, trained: Tensors, frozen: Tensors, strength: float = 1.0) -> Delta:
        """Get the update. Differentiable in `trained`; `strength` 1 is the trained update, 0 is no update."""
        raise NotImplementedError

    def exact_rank(self, rows_O: int, cols_I: int) -> int:
        """Get the rank of a LoRA that holds every update of this method exactly."""
        raise NotImplementedError

    def start(self, rows_O: int, cols_I: int, seed: int = 0) -> dict[str, torch.Tensor]:
        """Get the trained numbers before training, float32: dW = 0 exactly. `seed` where some are random."""
        shapes = self.trained_shapes(rows_O, cols_I) | self.shared_shapes(rows_O, cols_I)
        return {name: torch.zeros(shape) for name, shape in shapes.items()}

    def shared_by(self) -> str:
        """Get which adapted weights train `shared_shapes` together: "model", all; "kind", those whose paths differ only
        in indices; "", none."""
        return ""

    def shared_shapes(self, rows_O: int, cols_I: int) -> dict[str, tuple[int, ...]]:
        """Get the names and shapes of tensors that several adapted weights of a model train together."""
        return {}

    def frozen(self, spectrum: Spectrum) -> dict[str, torch.Tensor]:
        """Get the frozen tensors that `delta` needs next to the basis, such as a sparsity pattern."""
        return {}

    def is_linear(self) -> bool:
        """Ask whether dW is linear in the trained numbers, so that adding numbers adds updates."""
        return False

    def large_frozen(self) -> tuple[str, ...]:
        """Get the names of the frozen tensors with a side as long as the weight's: those that FSDP2 shards."""
        return ()

    def saves_frozen(self) -> bool:
        """Ask whether the frozen tensors, places as integers, must travel in the file: they cannot be found again."""
        return False

    def needs_examples(self) -> bool:
        """Ask whether `spectune.prepare` has to choose something, whatever the directions are: which places train."""
        return False

    def candidates(self) -> Method:
        """Get the method with all numbers among which examples choose, to be measured; itself where they do not."""
        return self

    def chosen(self, spectrum: Spectrum, scores: Tensors) -> Spectrum:
        """Get the directions with what this method takes from the scores that examples gave its `candidates`."""
        return spectrum

    def size_option(self) -> str | None:
        """Get the option of which single layers may have their own value (`rank_pattern`); None: they may not."""
        return "r" if "r" in self.options() else None

    def sized(self, size: int) -> Method:
        """Get this method with a layer's own size."""
        option = self.size_option()
        if option is None:
            raise OptionError(
                f"rank_pattern does not work with method {self.name!r} and these options: no size can differ. Leave it "
                "out."
            )
        changed: Any = {option: size}
        return replace(self, **changed)

    def sizes(self, rows_O: int, cols_I: int) -> dict[str, torch.Tensor]:
        """Get, for each trained tensor, from which size on each number is trained, broadcastable to its shape.

        Empty where a smaller size does not train a part of the same numbers, so that a budget cannot be shared out.
        """
        return {}

    def offer(self, rows_O: int, cols_I: int, scores: Tensors) -> tuple[torch.Tensor, torch.Tensor]:
        """Get, for size 1, 2, ..., what the numbers that this size adds score, and how many they are."""
        shapes, sizes = self.trained_shapes(rows_O, cols_I), self.sizes(rows_O, cols_I)
        most = max(int(size.max()) for size in sizes.values())
        gains, costs = torch.zeros(most, dtype=torch.float64), torch.zeros(most, dtype=torch.long)
        for name, size in sizes.items():
            places = (size - 1).expand(shapes[name]).flatten()
            gains.index_add_(0, places, scores[name].detach().double().cpu().flatten())
            costs += torch.bincount(places, minlength=most)
        return gains, costs

    def check_frozen(self, spectrum: Spectrum, frozen: Tensors) -> None:
        """Raise `AdapterError` where frozen tensors that a file has brought cannot be this method's."""

    def direction_axes(self) -> dict[str, int]:
        """Get, for each trained tensor, the axis that counts the singular directions which its numbers belong to, where
        adapters of other directions can be put side by side along it (the spectral fusion). Empty: they cannot."""
        return {}

    def cross_terms(self, spectrum: Spectrum, mine: Tensors, theirs: Tensors) -> Delta | None:
        """Get what the update of mine + theirs, on the directions of one spectrum, has beyond both; None if unknown."""
        return None

    def disturb(self, trained: Tensors) -> Tensors:
        """Get the trained tensors as one training step uses them (dropout); not used for merging or saving."""
        return trained

    def check(self, spectrum: Spectrum) -> None:
        """Raise `WeightError` when this method cannot train on these singular directions."""

    def gradient_axes(self) -> Mapping[str, int | tuple[int, ...]]:
        """Get, for each trained tensor whose gradient may be normalised, the axis that one norm is taken along, or all
        axes where the tensor has a single norm."""
        raise NotImplementedError

    def matrix_steps(self) -> dict[str, str]:
        """Get, for each trained tensor that is a matrix to a spectral optimizer (muon), what a step in it is a part of:
        "weight", the size of the weight, where dW is the tensor between factors with singular values near one; "one"
        where it multiplies something of the weight's size. Empty: single numbers, which have no matrix form."""
        return {}

    def decay_profile(self, spectrum: Spectrum, frozen: Tensors) -> dict[str, torch.Tensor]:
        """Get 1 - s / s_max for every trained number that belongs to a singular direction, broadcastable to its
        tensor: how much of the singular-guided decay it takes. Empty where a method has no singular directions."""
        return {}

    def trainable_count(self, rows_O: int, cols_I: int) -> int:
        """Get how many numbers are trained on one O x I weight, without those shared by all weights."""
        return sum(math.prod(shape) for shape in self.trained_shapes(rows_O, cols_I).values())

    @classmethod
    def options(cls) -> dict[str, object]:
        """Get the options of this method with their defaults."""
        return {option.name: option.default for option in fields(cls)}

    def _at_least(self, least: int, **values: int | None) -> None:
        for option, value in values.items():
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
                raise OptionError(f"{self.name}: {option} must be an integer of at least {least}, got {value!r}.")


@dataclass(frozen=True, kw_only=True)
class Tied(Method):
    """A method whose numbers can be trained once for all layers of a kind, each layer in its own directions."""

    share: str = option(
        "none", "`kind`: the layers whose paths differ only in indices train one set of numbers; `none`: each its own."
    )

    def shapes(self, rows_O: int, cols_I: int) -> dict[str, tuple[int, ...]]:
        """Get the names and shapes of the trainable tensors, shared or not."""
        raise NotImplementedError

    def trained_shapes(self, rows_O: int, cols_I: int) -> dict[str, tuple[int, ...]]:
        return {} if self.shared_by() else self.shapes(rows_O, cols_I)

    def shared_by(self) -> str:
        return "" if self.share == "none" else self.share

    def shared_shapes(self, rows_O: int, cols_I: int) -> dict[str, tuple[int, ...]]:
        return self.shapes(rows_O, cols_I) if self.shared_by() else {}

    def _check_share(self) -> None:
        if self.share not in SHARING:
            raise OptionError(f"{self.name}: share={self.share!r} does not exist. Use 'none' or 'kind'.")


def kept_directions(basis_rank: int | None, rows_O: int, cols_I: int) -> int:
    """Get how many directions a wide method works in: `basis_rank`, or all K = min(O, I)."""
    K = min(rows_O, cols_I)
    return K if basis_rank is None else min(basis_rank, K)


Fitted = TypeVar("Fitted", bound=Method)


def fit_directions(method: Fitted, rows_O: int, cols_I: int, name: str, least: int = 1) -> Fitted:
    """Get a method with the options `r` and `columns` for one O x I weight: only directions that the weight has.

    Of a list of columns those remain that the weight has; from a start index, those after it.
    """
    options: Any = method
    K, r, columns = min(rows_O, cols_I), options.r, options.columns
    listed = isinstance(columns, tuple) and r == len(columns)
    kept = tuple(place for place in columns if place < K) if listed else columns
    left = len(kept) if listed else K - columns if isinstance(columns, int) else K
    if left >= r:
        return method
    if left < least:
        raise LeftOutError(
            f"{name}: {method.name} needs {least} or more of the directions that columns={columns!r} names, but this "
            f"{rows_O}x{cols_I} weight has {max(left, 0)} of them. Exclude the layer.",
            f"too few directions for {method.name}",
        )
    changes: dict[str, Any] = {"r": left, "columns": kept}
    return replace(method, **changes)


def weakness(spectrum: Spectrum) -> torch.Tensor:
    """Get 1 - s / s_max of each kept direction, shape (R,): zero for the strongest, near one in the tail.

    s_max is the largest kept singular value, as in SpecAdapt's code.
    """
    return 1 - spectrum.S_R / spectrum.S_R.max().clamp_min(torch.finfo(spectrum.S_R.dtype).tiny)


def refuse_dead_directions(method: str, spectrum: Spectrum) -> None:
    """Raise `WeightError` if a chosen direction has singular value zero, where a method would get no gradient."""
    S_R, asked, name = spectrum.S_R, len(spectrum.columns), spectrum.name or "weight"
    # Below this a singular value is roundoff of the decomposition (the usual numerical rank).
    floor = max(spectrum.shape[:2]) * torch.finfo(S_R.dtype).eps * float(S_R.max())
    alive = int((floor < S_R).sum())
    if alive == 0:
        raise LeftOutError(
            f"{name}: all {asked} singular values that {method} would tune are zero, so no direction would ever get a "
            "gradient. Exclude the layer or use method='svft'.",
            f"all zero, so {method} would get no gradient",
        )
    if alive < asked:
        raise WeightError(
            f"{name}: {method} would tune {asked} directions, but only {alive} have a singular value above zero; the "
            f"rest would never get a gradient. Lower r to {alive} (rank_pattern) or exclude the layer."
        )
