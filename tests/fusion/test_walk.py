"""A merge that looks behind itself leaves out the blocks that are through, and comes out the same."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import nn

from spectune.algebra import dense
from spectune.fusion import Part
from spectune.fusion import behind as fuses_behind
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


def updates(model: nn.Module, names: Sequence[str], tasks: int) -> dict[str, list[Part]]:
    stream = torch.Generator().manual_seed(5)

    def part(task: int, layer: str) -> Part:
        module: Any = model.get_submodule(layer)
        rows, cols = module.weight.shape if isinstance(module, nn.Linear) else module.weight.T.shape
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
    short = merged(Match(), model, parts, batches)
    ran = calls.total()
    slow = whole(monkeypatch, Match(), model, parts, batches)
    for layer, update in slow.items():
        torch.testing.assert_close(short[layer], update)
    rest = calls.total() - ran
    assert ran > rest if skips else ran < 0.5 * rest, (ran, rest)
    assert all("forward" not in vars(module) for module in model.modules())
