"""A merge that looks behind itself leaves out the blocks that are through, and comes out the same."""

from __future__ import annotations

import copy
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import nn

from spectune.algebra import dense
from spectune.fusion import Part
from spectune.fusion import behind as fuses_behind
from spectune.fusion.layer_inputs import matrix_of, rows_of, update_of
from spectune.fusion.match import Match, Sequential
from spectune.fusion.walk import NotAChainError, Walk
from spectune.records import Delta

from ..models import MODELS

DEEP, WIDTH = 6, 12


class Block(nn.Module):
    """Two layers with inputs of their own, the second behind the first."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor, **shift: torch.Tensor) -> tuple[torch.Tensor, None]:
        inner = self.first(x.mul_(1.1)).tanh()  # in place: it must not reach what is held
        return x + self.second(inner) + shift.get("shift", 0.0), None


class Chained(nn.Module):
    """Blocks one after the other; `skips` feeds an early block's output to the last one, as U-shaped models do."""

    def __init__(self, skips: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(DEEP))
        self.head = nn.Linear(WIDTH, WIDTH)
        self.skips = skips

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x, early = x.clone(), None
        for at, block in enumerate(self.blocks):
            x, _ = block(x, shift=early) if self.skips and at == DEEP - 1 else block(x)
            early = 3 * x if at == 0 else early
        return self.head(x)


class Pictures(nn.Module):
    """Convolutions, two of them on one input with windows of their own, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 4, 3, padding=1)
        self.wide, self.short = nn.Conv2d(4, 6, 3, stride=2, padding=1), nn.Conv2d(4, 6, 1, stride=2)
        self.head = nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x).tanh()
        return self.head((self.wide(x) + self.short(x)).relu().flatten(2).mT)


def updates(model: nn.Module, names: Sequence[str], tasks: int) -> dict[str, list[Part]]:
    stream = torch.Generator().manual_seed(5)

    def part(task: int, layer: str) -> Part:
        module = model.get_submodule(layer)
        rows, cols = matrix_of(module).shape
        left, right = torch.randn(rows, 2, generator=stream), torch.randn(2, cols, generator=stream)
        return Part(str(task), layer, Delta(0.1 * left.double(), torch.ones(2).double(), right.double()))

    return {layer: [part(task, layer) for task in range(tasks)] for layer in names}


def merged(rule: Any, model: nn.Module, parts: dict[str, list[Part]], batches: Mapping[str, Any]) -> dict[str, Any]:
    keep = next(iter(batches.values()))[:1]
    found = fuses_behind.fuse_behind(rule, model, parts, dict.fromkeys(batches, 1.0), batches, keep)
    return {layer: dense(part.delta) for layer, part in found.items()}


def whole(monkeypatch: pytest.MonkeyPatch, *args: Any) -> dict[str, Any]:
    """Get what comes out where each layer is reached from the start."""

    def never(*_: Any) -> None:
        raise NotAChainError

    with monkeypatch.context() as patch:
        walked = Walk.go_to
        patch.setattr(Walk, "go_to", lambda *a: never() if a[0].chains else walked(*a))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            return merged(*args)


@pytest.mark.parametrize("rule", [Match(), Sequential()], ids=lambda rule: rule.name)
@pytest.mark.parametrize("name", MODELS)
def test_it_comes_out_as_from_the_start(name: str, rule: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = MODELS[name]
    model = tiny.fresh().eval()
    names = [path for path, _ in model.named_modules() if path.rpartition(".")[2] in tiny.targets]
    batches = {str(task): [tiny.inputs()] for task in range(2)}
    parts = updates(model, names, 2)
    short, slow = merged(rule, model, parts, batches), whole(monkeypatch, rule, model, parts, batches)
    for layer, update in slow.items():
        torch.testing.assert_close(short[layer], update)


@pytest.mark.parametrize("skips", [False, True])
def test_blocks_that_are_through_are_not_run_again(skips: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = Chained(skips)
    calls: Counter[int] = Counter()
    firsts = [module for path, module in model.named_modules() if path.endswith("first")]
    for at, first in enumerate(firsts):
        first.register_forward_hook(lambda *_, at=at: calls.update([at]))
    names = [path for path, module in model.named_modules() if isinstance(module, nn.Linear)]
    batches = {str(task): [{"x": torch.randn(4, 5, WIDTH)} for _ in range(7)] for task in range(2)}
    parts = updates(model, names, 2)
    with pytest.warns(UserWarning, match="none can be left out") if skips else nullcontext():
        short = merged(Match(), model, parts, batches)
    ran = calls.total()
    slow = whole(monkeypatch, Match(), model, parts, batches)
    for layer, update in slow.items():
        torch.testing.assert_close(short[layer], update)
    rest = calls.total() - ran
    assert ran > rest if skips else ran < 0.5 * rest, (ran, rest)
    assert all("forward" not in vars(module) for module in model.modules())


def test_an_error_of_the_model_itself_is_told() -> None:
    model = Chained(skips=False)
    parts = updates(model, ["blocks.1.first", "blocks.4.second"], 1)
    broken = [{"x": torch.randn(4, 5, WIDTH)}, {"x": torch.randn(4, 5, WIDTH + 1)}]
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        fuses_behind.fuse_behind(Match(), model, parts, {"0": 1.0}, {"0": broken})


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Linear(5, 4, bias=False), (3, 7, 5)),
        (nn.Conv1d(3, 4, 3, padding=2, stride=2, bias=False), (2, 3, 9)),
        (nn.Conv2d(3, 4, (3, 2), padding=(1, 0), dilation=2, bias=False), (2, 3, 8, 9)),
    ],
    ids=lambda case: type(case).__name__,
)
def test_a_layer_is_its_matrix_times_its_rows(layer: Any, shape: tuple[int, ...]) -> None:
    x, W_OI = torch.randn(shape), matrix_of(layer)
    delta = Delta(torch.randn(4, 2), torch.ones(2), torch.randn(2, W_OI.shape[1]))
    output = layer(x) if isinstance(layer, nn.Linear) else layer(x).movedim(1, -1)
    torch.testing.assert_close(rows_of(layer, x, None) @ W_OI.T, output.flatten(0, -2), rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        before = layer(x)
        layer.weight += dense(delta).reshape(layer.weight.shape)
        torch.testing.assert_close(before + update_of(layer, delta, x), layer(x), rtol=1e-4, atol=1e-4)


def test_convolutions_are_merged_too() -> None:
    torch.manual_seed(0)
    model = Pictures().eval()
    names = ["stem", "wide", "short", "head"]
    parts = updates(model, names, 2)
    channels = torch.tensor([[1.0, 0.05], [0.05, 1.0]])[..., None, None]  # each task sees another one
    batches = {str(task): [{"x": channels[task] * torch.randn(8, 2, 9, 9)}] for task in range(2)}
    alone = {layer: both[:1] for layer, both in parts.items()}
    one = fuses_behind.fuse_behind(Match(), model, alone, {"0": 1.0}, {"0": batches["0"]})
    for layer, part in one.items():
        torch.testing.assert_close(dense(part.delta), dense(alone[layer][0].delta), rtol=1e-3, atol=1e-4)

    def off(found: Any) -> float:
        return sum(
            float((run(model, names, found, batch) - run(model, names, parts_of(parts, task), batch)).square().mean())
            for task, batch in ((task, batches[str(task)][0]) for task in range(2))
        )

    matched = fuses_behind.fuse_behind(Match(), model, parts, dict.fromkeys(batches, 1.0), batches)
    mean = {layer: Part("mean", layer, half(both)) for layer, both in parts.items()}
    assert off(matched) < 0.7 * off(mean), (off(matched), off(mean))


def parts_of(parts: dict[str, list[Part]], task: int) -> dict[str, Part]:
    return {layer: both[task] for layer, both in parts.items()}


def half(both: list[Part]) -> Delta:
    lefts, rights = zip(*((part.delta.left_OP, part.delta.right_QI) for part in both), strict=True)
    return Delta(torch.cat(lefts, 1) / 2, torch.ones(4).double(), torch.cat(rights))


def run(model: nn.Module, names: Sequence[str], found: Mapping[str, Part], batch: dict[str, Any]) -> torch.Tensor:
    """Get the output of a copy of the model with these updates in its weights."""
    tuned = copy.deepcopy(model)
    with torch.no_grad():
        for name in names:
            layer: Any = tuned.get_submodule(name)
            layer.weight += dense(found[name].delta).to(layer.weight).reshape(layer.weight.shape)
        output: torch.Tensor = tuned(**batch)
    return output
