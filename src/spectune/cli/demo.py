"""`spectune demo`: the embedded default, from a pretrained model to a report that one can look at."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from ..demo import Demo
    from ..runs import RunRecord


def demo(
    method: Annotated[str, typer.Option(help="Which method of spectune.METHODS trains.")] = "spectral_a",
    r: Annotated[int | None, typer.Option("--r", help="Directions tuned; default: the method's own.")] = None,
    steps: Annotated[int, typer.Option(help="Optimizer steps.")] = 150,
    lr: Annotated[float | None, typer.Option(help="Learning rate of the adapter; default: a tuned one.")] = None,
    seed: Annotated[int, typer.Option(help="The same seed gives the same result.")] = 0,
    output: Annotated[Path, typer.Option(help="Folder to write; must be new or empty.")] = Path("spectune-demo"),
    sentences: Annotated[int | None, typer.Option(help="Use only so many sentences (a quick look).")] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace the output folder if there is one.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print machine-readable results on stdout.")] = False,
) -> None:
    """Teach a small real model 24 languages, save, reload, export and check it, and write a report. Works offline."""
    from rich.console import Console

    from ..checkpoint import fresh_folder
    from ..demo import DemoOptions, run_demo
    from ..pages import write_report
    from .progress import Stages

    options = DemoOptions(method=method, r=r, steps=steps, rate=lr, seed=seed, sentences=sentences)
    options.config()  # refuses what is wrong before any work
    console = Console(stderr=as_json)
    with fresh_folder(output, overwrite=overwrite) as folder, Stages(console) as stages:
        done = run_demo(options, folder, console.print, stages.begin)
        record = _record(done)
        write_report(record, folder / "report.html")
        (folder / "run.json").write_text(record.to_json() + "\n")
    report = (output / "report.html").resolve()
    if as_json:
        print(json.dumps({**_figures(done), "report": str(report)}, indent=2))
    console.print(f"adapter, LoRA and report are in {output}; open {report.as_uri()}", soft_wrap=True)


def _figures(done: Demo) -> dict[str, object]:
    return {
        "method": done.options.method,
        "seed": done.options.seed,
        "steps": done.options.steps,
        "learning_rate": done.options.learning_rate(),
        "accuracy": {
            "untrained": done.before_accuracy,
            "frozen_body": done.frozen_accuracy,
            "tuned": done.after_accuracy,
        },
        "trainable": done.trainable,
        "reload_agreement": done.reload_agreement,
        "lora_agreement": done.lora_agreement,
        "lora_max_relative_error": done.export.proof.max_relative_error,
    }


def _record(done: Demo) -> RunRecord:
    """Get what the report shows."""
    from ..runs import Example, Metric, Proof, RunRecord, Size, layer_spectra, machine, versions

    test, labels = done.task.test.first(done.options.sentences), done.task.labels
    pairs = list(zip(test.texts, test.targets, done.predicted, strict=True))
    wrong = [pair for pair in pairs if pair[1] != pair[2]][:6]
    right = [pair for pair in pairs if pair[1] == pair[2]][:6]
    logits = done.export.proof.logits
    return RunRecord(
        title="Spectune demo",
        task=f"Tell which of {len(labels)} languages a sentence is written in ({len(test.texts):,} held out)",
        method=done.options.method,
        config=done.options.config().to_dict() | {"learning_rate": done.options.learning_rate()},
        versions=versions(),
        machine=machine(),
        seed=done.options.seed,
        loss=done.outcome.losses,
        metrics=[
            Metric("untrained model", done.before_accuracy, "chance"),
            Metric("frozen body, trained head", done.frozen_accuracy, "the baseline: same steps, same batches"),
            Metric(f"{done.options.method}", done.after_accuracy, "the adapter and the head"),
        ],
        sizes=[
            Size(f"{done.options.method} adapter", done.trainable, _bytes(done.adapter)),
            Size("exported as LoRA", done.lora_numbers, _bytes(done.lora)),
            Size("the whole model", done.whole, done.whole * 4),
        ],
        spectra=layer_spectra(done.outcome.model),
        proofs=[
            Proof("reload", done.reload_agreement == 1.0, f"a fresh process agrees on {done.reload_agreement:.1%}"),
            Proof(
                "export",
                done.export.proof.max_relative_error < 1e-5,
                f"max |dW error| {done.export.proof.max_relative_error:.1e} of max |dW|",
            ),
            Proof("logits", logits.error is not None, f"max |logit difference| {logits.error or 0:.1e}"),
            Proof("plain PEFT", done.lora_agreement > 0.999, f"with the LoRA it agrees on {done.lora_agreement:.1%}"),
        ],
        examples=[Example(text, labels[target], labels[found]) for text, target, found in [*wrong, *right]],
    )


def _bytes(folder: Path) -> int:
    return (folder / "adapter_model.safetensors").stat().st_size
