"""`Walk`: a model that is run as far as one layer after another, each time from the last block that is through."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..errors import OptionError
from ..records import Delta
from .layer_inputs import input_in, rows_of, update_of, window_of

Inputs = Mapping[str, Any]
Updates = Mapping[str, Delta]
# Two ways to one input differ by roundoff only (bfloat16: 4e-3); where a block is left out wrongly, by all of it.
SAME = 1e-2


class NotAChainError(Exception):
    """Some block's output is used by more than the next block, so no block may be left out."""


class _ReachedError(Exception):
    """Ends a forward at the place that was wanted."""


@dataclass(frozen=True, eq=False)
class Forward:
    """One batch through the model with these updates added to its layers."""

    updates: Updates
    batch: Inputs


@dataclass(frozen=True)
class Stage:
    """Layers that get one input, and how many blocks of each chain run before them."""

    layers: tuple[str, ...]
    through: tuple[int, ...]


@dataclass
class _Chain:
    """Blocks of which each is fed by the one before, and what the last one that is through gives in each run."""

    blocks: Sequence[nn.Module]
    passed: int = 0
    held: dict[Forward, Any] = field(default_factory=dict)


@dataclass(eq=False)
class Walk:
    """The base model, run with updates added to its layers; nothing in it is changed.

    `go_to` keeps what the blocks before a stage give, on the CPU, and later runs start there: seeing every layer then
    takes a few forwards of the model, however many blocks it has. The blocks are the modules of a ModuleList of which
    each takes the output of the one before; whatever else the model does runs each time.
    """

    model: nn.Module
    modules: Mapping[str, nn.Module]
    """Layer, as the adapters call it -> module."""
    chains: list[_Chain] = field(default_factory=list)
    checks: int = 0

    @property
    def at(self) -> tuple[torch.device, torch.dtype]:
        """Get where and how precisely the model computes."""
        first = next(self.model.parameters())
        return first.device, first.dtype

    def stages(self, batches: Iterable[Inputs], leave_out: bool = True) -> list[Stage]:
        """Get the layers in the order of a forward pass, and find the blocks that can be left out."""
        traces = [self._trace(batch) for batch in batches]
        missing = sorted(self.modules.keys() - {layer for layer, *_ in traces[0].layers})
        if missing:
            raise OptionError(f"{missing[0]}: no example went through this layer. Pass examples that use it.")
        lists = [trace.chains(self.model) for trace in traces] if leave_out else [[]]
        self.chains = [_Chain(blocks) for blocks in lists[0]] if all(one == lists[0] for one in lists) else []
        return traces[0].stages([chain.blocks for chain in self.chains])

    def go_to(self, stage: Stage, runs: Sequence[Forward]) -> None:
        """Start all later runs behind the blocks that come before this stage.

        `NotAChainError` if a layer of the stage then gets something else in one of the runs, each time another one.
        """
        moved = False
        for chain, through in zip(self.chains, stage.through, strict=True):
            if through > chain.passed:
                chain.held = {run: self._output_of(chain.blocks[through - 1], run) for run in runs}
                chain.passed, moved = through, True
        if moved:
            run = runs[self.checks % len(runs)]
            self.checks += 1
            short_NI, whole_NI = self.input_of(stage.layers[0], run), self._input_of(stage.layers[0], run)
            same = short_NI.shape == whole_NI.shape
            if not same or (short_NI - whole_NI).norm() > SAME * whole_NI.norm():
                raise NotAChainError

    def input_of(self, layer: str, run: Forward) -> torch.Tensor:
        """Get what reaches a layer, as rows; tokens that an attention mask hides are left out."""
        with self._left_out(run):
            return self._input_of(layer, run)

    def _input_of(self, layer: str, run: Forward) -> torch.Tensor:
        def watch(caught: list[Any]) -> Any:
            def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                caught.append(input_in(args, kwargs).detach())
                raise _ReachedError

            return self.modules[layer].register_forward_pre_hook(hook, with_kwargs=True)

        caught = self._caught(watch, run)
        if not caught:
            raise OptionError(f"{layer}: no example went through this layer. Pass examples that use it.")
        return rows_of(self.modules[layer], caught[0], run.batch.get("attention_mask"))

    def _output_of(self, block: nn.Module, run: Forward) -> Any:
        def watch(caught: list[Any]) -> Any:
            def hook(_: nn.Module, args: Any, output: Any) -> None:
                caught.append(_copied(output, torch.device("cpu")))
                raise _ReachedError

            return block.register_forward_hook(hook)

        with self._left_out(run):
            caught = self._caught(watch, run)
        if not caught:
            raise NotAChainError
        return caught[0]

    def _caught(self, watch: Callable[[list[Any]], Any], run: Forward) -> list[Any]:
        caught: list[Any] = []
        with ExitStack() as stack:
            for layer, delta in run.updates.items():
                stack.callback(self.modules[layer].register_forward_hook(_adding(delta), with_kwargs=True).remove)
            stack.callback(watch(caught).remove)
            with suppress(_ReachedError):
                self.model(**run.batch)
        return caught

    @contextmanager
    def _left_out(self, run: Forward) -> Iterator[None]:
        device, _ = self.at
        with ExitStack() as stack:
            for chain in self.chains:
                if chain.passed:
                    output = _copied(chain.held[run], device)
                    for block in chain.blocks[: chain.passed]:
                        stack.enter_context(_returning(block, output))
            try:
                yield
            except Exception as error:
                if isinstance(error, OptionError) or not any(chain.passed for chain in self.chains):
                    raise
                raise NotAChainError from error  # an error of the model's own comes again when nothing is left out

    def _trace(self, batch: Inputs) -> _Trace:
        trace = _Trace()
        blocks = [block for _, many in _lists(self.model) for block in many]
        with ExitStack() as stack:
            for layer, module in self.modules.items():
                stack.callback(module.register_forward_pre_hook(trace.layer(layer), with_kwargs=True).remove)
            for block in blocks:
                stack.callback(block.register_forward_pre_hook(trace.entered, with_kwargs=True).remove)
                stack.callback(block.register_forward_hook(trace.left).remove)
            self.model(**batch)
        trace.keep.clear()
        return trace


@dataclass(eq=False)
class _Trace:
    """What one forward did: the inputs of layers, the inputs and outputs of blocks, in their order."""

    layers: list[tuple[str, Any, int]] = field(default_factory=list)
    """(layer, its input, blocks that had ended)."""
    inputs: list[tuple[nn.Module, Any]] = field(default_factory=list)
    outputs: list[tuple[nn.Module, Any]] = field(default_factory=list)
    forms: dict[nn.Module, Any] = field(default_factory=dict)
    """Block -> the shapes in its output."""
    keep: list[torch.Tensor] = field(default_factory=list)
    """So that no address is used twice in this forward."""

    def layer(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if all(name != known for known, *_ in self.layers):
                found = self._key(input_in(args, kwargs)), window_of(module)
                self.layers.append((name, found, len(self.outputs)))

        return hook

    def entered(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.inputs.append((block, self._key(input_in(args, kwargs)) if args or kwargs else None))

    def left(self, block: nn.Module, args: Any, output: Any) -> None:
        self.outputs.append((block, self._key(output[0] if isinstance(output, tuple) and output else output)))
        self.forms[block] = _form(output)

    def _key(self, x: Any) -> Any:
        if not isinstance(x, torch.Tensor):
            return None
        self.keep.append(x)
        return x.data_ptr(), x._version, *x.shape

    def chains(self, model: nn.Module) -> list[list[nn.Module]]:
        """Get the lists of blocks, each called once and fed by the one before; of nested ones the outermost."""
        found: dict[str, list[nn.Module]] = {}
        for path, blocks in _lists(model):
            inner = any(path.startswith(f"{outer}.") for outer in found)
            if len(blocks) > 1 and not inner and self._fed_in_order(blocks):
                found[path] = blocks
        return list(found.values())

    def _fed_in_order(self, blocks: list[nn.Module]) -> bool:
        inputs = [(block, key) for block, key in self.inputs if block in blocks]
        outputs = [(block, key) for block, key in self.outputs if block in blocks]
        called = [block for block, _ in inputs] == blocks == [block for block, _ in outputs]
        keys = zip(outputs, inputs[1:], strict=False)
        alike = called and all(self.forms[block] == self.forms[blocks[0]] for block in blocks)
        return alike and all(given is not None and given == taken for (_, given), (_, taken) in keys)

    def stages(self, chains: Sequence[Sequence[nn.Module]]) -> list[Stage]:
        """Get the layers with one input together, in the order of the forward."""
        stages: list[Stage] = []
        for place, (layer, found, ended) in enumerate(self.layers):
            if place and found == self.layers[place - 1][1]:
                stages[-1] = Stage((*stages[-1].layers, layer), stages[-1].through)
            else:
                done = [block for block, _ in self.outputs[:ended]]
                stages.append(Stage((layer,), tuple(sum(block in done for block in blocks) for blocks in chains)))
        return stages


def _lists(model: nn.Module) -> Iterator[tuple[str, list[nn.Module]]]:
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList):
            yield path, list(module)


def _form(output: Any) -> Any:
    """Get the shapes in an output: a block that is left out gives the output of another one."""
    if isinstance(output, tuple):
        return tuple(_form(one) for one in output)
    return output.shape if isinstance(output, torch.Tensor) else type(output)


@contextmanager
def _returning(block: nn.Module, output: Any) -> Iterator[None]:
    """Let a block give this output without being run."""
    before = block.__dict__.get("forward")
    block.__dict__["forward"] = lambda *args, **kwargs: output
    try:
        yield
    finally:
        if before is None:
            del block.__dict__["forward"]
        else:
            block.__dict__["forward"] = before


def _copied(output: Any, device: torch.device) -> Any:
    """Copy the tensors of an output, so that nothing that the model does in place reaches what is held."""
    if isinstance(output, torch.Tensor):
        return output.detach().to(device, copy=True)
    return tuple(_copied(one, device) for one in output) if type(output) is tuple else output


def _adding(delta: Delta) -> Callable[..., torch.Tensor]:
    def hook(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: torch.Tensor) -> torch.Tensor:
        return output + update_of(layer, delta, input_in(args, kwargs))

    return hook
