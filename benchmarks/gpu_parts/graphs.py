"""Part e: a whole training step as a CUDA graph, and where the small kernels of a step go."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from .llama import FLOOR, LORA, SHAPES, adapted, adapters, llama, loss_of, tokens
from .notebook import Notebook, NotHere, Setting
from .timing import milliseconds

R = 16
# Few layers and few tokens: where launching kernels, and not their work, is what a step waits for.
LAYERS, TOKENS = 4, 256
WARM, TIMED, PROFILED, TOP = 4, 20, 3, 15
METHODS = (FLOOR, LORA, "spectral_a", "spectral_r")


def prepared(setting: Setting, name: str) -> tuple[nn.Module, Callable[[], Any], list[nn.Parameter]]:
    """Get a small adapted model, its step, and what it trains."""
    shape = "tiny" if setting.tiny else "1B"
    model = adapted(llama(shape, setting, min(LAYERS, SHAPES[shape][2])), adapters(R)[name])
    ids = tokens(32 if setting.tiny else TOKENS, 32 if setting.tiny else TOKENS, setting)
    trained = [p for p in model.parameters() if p.requires_grad]
    rate = 1e-4
    optimizer = torch.optim.AdamW(trained, lr=rate, capturable=setting.on_cuda) if trained else None

    def step() -> None:
        loss_of(model, ids).backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)  # a graph writes into the gradients that it was captured with

    return model, step, trained


def captured(setting: Setting, name: str) -> dict[str, Any]:
    """Capture a whole step, replay it, and compare what it trained with eager steps from the same start."""
    if not setting.on_cuda:
        raise NotHere("needs CUDA")
    _, step, trained = prepared(setting, name)
    _, eager, wanted = prepared(setting, name)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for _ in range(WARM):
        eager()
    replays = [milliseconds(setting, graph.replay) for _ in range(TIMED)]
    steps = [milliseconds(setting, eager) for _ in range(TIMED)]
    torch.cuda.synchronize()
    row = {"graph_milliseconds": round(statistics.median(replays), 4)}
    row |= {"milliseconds": round(statistics.median(steps), 4), "rounds": TIMED}
    if trained:
        gaps = [float((a - b).detach().abs().max()) for a, b in zip(trained, wanted, strict=True)]
        row["apart_after_replays"] = max(gaps)
    return row


def profiled(setting: Setting, name: str) -> dict[str, Any]:
    """Get the kernels of a step that take the most time, how many there are, and what the optimizer's are among."""
    _, step, _ = prepared(setting, name)
    for _ in range(1 if setting.tiny else WARM):
        step()
    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if setting.on_cuda else [])]
    with profile(activities=kinds) as found:
        for _ in range(PROFILED):
            step()
        if setting.on_cuda:
            torch.cuda.synchronize()
    on_device = [event for event in found.key_averages() if not setting.on_cuda or is_kernel(event)]
    on_device.sort(key=lambda event: -time_of(setting, event))
    kernels = [
        {
            "name": event.key[:160],
            "calls": round(event.count / PROFILED, 1),
            "microseconds": round(time_of(setting, event) / PROFILED, 1),
        }
        for event in on_device
    ]
    total = {"calls": round(sum(k["calls"] for k in kernels)), "of": "kernels" if setting.on_cuda else "CPU operators"}
    total["milliseconds"] = round(sum(k["microseconds"] for k in kernels) / 1000, 3)
    return {**total, "top": kernels[:TOP], "most_called": sorted(kernels, key=lambda k: -k["calls"])[:TOP]}


def is_kernel(event: Any) -> bool:
    return bool(str(event.device_type).endswith("CUDA"))


def time_of(setting: Setting, event: Any) -> float:
    return float(event.self_device_time_total if setting.on_cuda else event.self_cpu_time_total)


def run(setting: Setting, notebook: Notebook) -> None:
    rows: dict[str, Callable[[], dict[str, Any]]] = {}
    for name in ("spectral_r", LORA, "spectral_a", FLOOR):
        rows[f"{name}: profile"] = lambda name=name: profiled(setting, name)
    for name in METHODS:
        rows[f"{name}: CUDA graph of a step"] = lambda name=name: captured(setting, name)
    notebook.plan(list(rows))
    notebook.note("model", "a tiny decoder" if setting.tiny else f"{LAYERS} layers of 1B, {TOKENS} tokens, r = {R}")
    for name, measure in rows.items():
        notebook.row(name, measure)
