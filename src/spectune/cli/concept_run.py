"""The text_to_image part of `spectune train`: a concept from its YAML file to adapters, word, pictures and report."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..concepts.text_to_image import ConceptRun
    from ..runs import RunResult


def train_from_file(config: Path, overrides: list[str], folder: Path, as_json: bool) -> None:
    """Train a concept, write run.json and report.html beside it, and say where they are."""
    from ..concepts.file import read_concept
    from ..concepts.text_to_image import train_concept
    from ..pages import write_report
    from .progress import Stages
    from .terminal import Console

    options, console = read_concept(config, overrides), Console(stderr=True, quiet=as_json)
    with Stages(console) as stages:
        step: Any = None

        def on_step(done: int, steps: int, loss: float) -> None:
            nonlocal step
            step = step or stages.begin("text_to_image", steps)
            step(done, steps, loss)

        run = train_concept(options, folder, on_step, console.print)
    record = concept_record(run)
    record.write(folder / "run.json")
    write_report(record, folder / "report.html")
    if as_json:
        print(json.dumps({"output": str(folder), "trainable": run.trainable, "loss": run.losses[-1]}, indent=2))
    console.print(f"the concept is in {folder}; open {(folder / 'report.html').resolve().as_uri()}", soft_wrap=True)


def concept_record(run: ConceptRun) -> RunResult:
    """Get what the report shows of a concept: the sheets in the order of their steps."""
    from ..runs import Drawing, RunResult, Size, machine, versions

    options = run.options
    prompts = "; ".join(options.worded(prompt) for prompt in options.validation_prompts)
    whole = sum(run.trainable.values())
    adapters = [name for name, count in run.trainable.items() if count]
    return RunResult(
        title=f"Concept: {options.token or options.images.name}",
        task=f"text_to_image on {options.pipeline.name}, pictures of {options.images.name}",
        method=" and ".join(adapters),
        config=options.to_json(),
        versions=versions("diffusers", "accelerate"),
        machine=machine(),
        losses=run.losses,
        learning_rate=0.0,
        trainable=whole,
        looked_at=True,
        sizes=[
            Size(name=name, trainable=count, file_bytes=_bytes(run.output / name))
            for name, count in run.trainable.items()
            if count
        ],
        drawings=[
            Drawing(caption=f"{path.stem.replace('-', ' ')}: {prompts}", png=_encoded(path)) for path in run.validation
        ],
    )


def _bytes(part: Path) -> int | None:
    file = part / "adapter_model.safetensors"
    return file.stat().st_size if file.is_file() else None


def _encoded(path: Path) -> str:
    return base64.b64encode(path.read_bytes()).decode("ascii")
