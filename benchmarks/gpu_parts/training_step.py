"""Part b: a training step against LoRA, DoRA and the frozen model, on random Llama decoders in bfloat16."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .llama import FLOOR, LORA, adapted, adapters, llama, loss_of, tokens
from .notebook import Notebook, Setting
from .timing import Job, peak_mib, summary, synchronize, taking_turns

R = 16
WARM = 2
ROUNDS = 12
ROW = 2048
# One code object serves the layers of all adapters; torch's own limit of 8 would send the last ones back to eager.
COMPILATIONS = 64


@dataclass(frozen=True)
class Cell:
    """One setting: a shape, tokens a step, eager or compiled."""

    shape: str
    tokens: int
    compiled: bool = False

    @property
    def name(self) -> str:
        return f"{self.shape}, {self.tokens:,} tokens, {'torch.compile' if self.compiled else 'eager'}"

    @property
    def checkpointing(self) -> bool:
        """Whether activations are made again in the backward: those of all methods would not fit on 80 GB."""
        return self.shape == "8B" and self.tokens > 2048


# By worth; the models of a shape stay while cells of it follow each other, and compiling takes longest.
CELLS = [
    *(Cell("1B", count) for count in (2048, 8192)),
    *(Cell("8B", count, compiled) for count, compiled in ((2048, False), (8192, False), (2048, True))),
    *(Cell("3B", count, compiled) for count, compiled in ((2048, False), (8192, False), (2048, True))),
    *(Cell("1B", count, True) for count in (2048, 8192)),
    *(Cell(shape, 8192, True) for shape in ("3B", "8B")),
]
TINY = [Cell("tiny", 64), Cell("tiny", 64, True)]
# Each adapter is compiled anew: some ten seconds, DoRA's several times that, since its forward breaks into many graphs.
COMPILED = (FLOOR, LORA, "spectral_a", "spectral_r")


def compared(cell: Cell) -> list[str]:
    """Get the adapters of a cell."""
    if not cell.compiled:
        return list(adapters(R))
    if cell.shape == "tiny":
        return [FLOOR, LORA, "spectral_r"]
    return [*COMPILED, "DoRA"] if cell == Cell("1B", 2048, True) else list(COMPILED)


class Bench:
    """One base, and the adapted models on its own weights."""

    def __init__(
        self, setting: Setting, notebook: Notebook, shape: str, base: nn.Module, configs: dict[str, Any]
    ) -> None:
        self.setting, self.notebook = setting, notebook
        self.models: dict[str, nn.Module] = {}
        self.facts: dict[str, dict[str, Any]] = {}
        for name, config in configs.items():
            notebook.attempt(f"{shape}: attaching {name}", lambda n=name, c=config: self._attach(n, base, c))

    def _attach(self, name: str, base: nn.Module, config: Any) -> None:
        synchronize(self.setting)
        started = time.perf_counter()
        self.models[name] = adapted(base, config)
        synchronize(self.setting)
        trained = sum(p.numel() for p in self.models[name].parameters() if p.requires_grad)
        self.facts[name] = {"trained": trained, "attach_seconds": round(time.perf_counter() - started, 3)}

    def measure(self, cell: Cell, names: list[str]) -> None:
        """Measure one cell: a row for each adapter, all of them taking turns."""
        ids = tokens(cell.tokens, 32 if self.setting.tiny else ROW, self.setting)
        torch._dynamo.reset()
        torch._dynamo.config.recompile_limit = COMPILATIONS
        runners: dict[str, Runner] = {}
        facts: dict[str, dict[str, Any]] = {}
        for name in names:
            if name not in self.models:
                self.notebook.leave_out(f"{cell.name}: {name}", "it could not be attached")
                continue
            runner = Runner(self.models[name], ids)
            warmed = self.notebook.attempt(f"{cell.name}: {name}", lambda r=runner: self._warm(cell, r))
            if warmed is not None:
                runners[name], facts[name] = runner, warmed
        for runner in runners.values():  # once more: what was compiled later can have had the first ones compiled again
            runner.step()
        rounds = 2 if self.setting.tiny else ROUNDS
        steps = taking_turns(self.setting, self.notebook, {n: r.step for n, r in runners.items()}, rounds)
        forwards: dict[str, Job] = {name: runner.forward for name, runner in runners.items()}
        forward = taking_turns(self.setting, self.notebook, forwards, rounds // 2)
        for name, times in steps.items():
            found = summary(times, frozen=steps.get(FLOOR, []), lora=steps.get(LORA, []))
            found["forward_milliseconds"] = round(statistics.median(forward[name]), 4)
            self.notebook.put(f"{cell.name}: {name}", {**self.facts[name], **facts[name], **found})

    def _warm(self, cell: Cell, runner: Runner) -> dict[str, Any]:
        """Bring a model to where its steps cost the same; get what that took and what a step holds."""
        configure(self.setting, cell, runner.model)
        graphs = torch._dynamo.utils.counters["stats"]
        before, started = graphs["unique_graphs"], time.perf_counter()
        for _ in range(WARM):
            runner.step()
        synchronize(self.setting)
        found: dict[str, Any] = {"warm_up_seconds": round(time.perf_counter() - started, 2)}
        if cell.compiled:
            found["graphs"] = graphs["unique_graphs"] - before
        return found | {"checkpointing": cell.checkpointing, "peak_mib": peak_mib(self.setting, runner.step)}


class Runner:
    """One adapted model with its optimizer: the forward, and the whole step."""

    def __init__(self, model: nn.Module, ids: torch.Tensor) -> None:
        self.model, self.ids = model, ids
        trained = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-6) if trained else None

    def forward(self) -> torch.Tensor:
        return loss_of(self.model, self.ids)

    def step(self) -> None:
        self.forward().backward()
        if self.optimizer is not None:
            self.optimizer.step()
            self.optimizer.zero_grad()


def configure(setting: Setting, cell: Cell, model: nn.Module) -> None:
    """Compile each decoder layer or none: they are alike, so one compilation serves them all, in seconds."""
    decoder = next(module for module in model.modules() if type(module).__name__ == "LlamaModel")
    if cell.checkpointing:
        decoder.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    else:
        decoder.gradient_checkpointing_disable()
    for layer in decoder.layers:
        layer._compiled_call_impl = None
        if cell.compiled:
            layer.compile(backend="inductor" if setting.on_cuda else "aot_eager")


def run(setting: Setting, notebook: Notebook) -> None:
    cells = TINY if setting.tiny else CELLS
    notebook.plan([f"{cell.name}: {name}" for cell in cells for name in compared(cell)])
    notebook.note("r", R)
    bench: tuple[str, Bench | None] = ("", None)
    for cell in cells:
        if notebook.out_of_time:
            break
        if bench[0] != cell.shape:
            bench = ("", None)  # the old models go before the new ones come
            if setting.on_cuda:
                torch.cuda.empty_cache()
            bench = (cell.shape, Bench(setting, notebook, cell.shape, llama(cell.shape, setting), adapters(R)))
        assert bench[1] is not None
        bench[1].measure(cell, compared(cell))
