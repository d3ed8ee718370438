"""Where every option of a sweep is seen at work: in the runs that it starts, in their records, in what is kept."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any
from unittest.mock import patch

import yaml

from spectune.recipes import parse_config
from spectune.runs import RunResult
from spectune.sweeps import load_sweep, run_sweep, summarise, to_markdown
from spectune.sweeps.config import GeneralText
from spectune.sweeps.general_text import general_loss
from spectune.sweeps.workers import Workers
from tests.recipes import tiny
from tests.recipes.every_field import Different, Entries, Told
from tests.sweeps.sweeps import text_sweep


def sweep_home(folder: Path) -> None:
    """Write a sweep's file, and texts on which forgetting is measured; nothing of it is trained."""
    folder.mkdir()
    asked = text_sweep(folder)
    del asked["tuning_seeds"], asked["title"]
    run = tiny.lm_run(folder, data={"validation": tiny.sums(folder / "validation.jsonl", 4)})
    del run["adapter"], run["training"]["learning_rate"]
    asked["run"] = run
    (folder / "sweep.yaml").write_text(yaml.safe_dump(asked))
    (folder / "a.txt").write_text("w1 w2 w3 w4 " * 10)
    (folder / "b.txt").write_text("w5 w5 w6 w7 " * 10)


@dataclass
class Sweep:
    """A sweep whose runs are not trained: what each is told is kept, and its figures follow from its rate."""

    file: Path
    words: tuple[str, ...]
    jobs: list[dict[str, Any]] = field(default_factory=list)

    @cached_property
    def output(self) -> Path:
        return self.file.parent / f"out{abs(hash(self.words))}"

    @cached_property
    def asked(self) -> Any:
        return load_sweep(self.file, [word.replace("{here}", str(self.file.parent)) for word in self.words])

    @cached_property
    def records(self) -> Any:
        with patch.object(Workers, "run", self.launch):
            return run_sweep(self.asked, self.output, provenance={})

    @property
    def summary(self) -> Any:
        return summarise(self.asked, self.records)

    @property
    def row(self) -> Any:
        """What the summary says of the method with two rates."""
        return next(row for row in self.summary["rows"] if row["method"] == "spectral_a")

    def launch(self, job: Path, log: Path, on_step: Callable[..., None]) -> int:
        """In place of a process that trains."""
        told = json.loads(job.read_text())
        self.jobs.append(told)
        log.write_text("")
        folder, config = Path(told["folder"]), parse_config(told["config"])
        for name in ("adapter", "model", "checkpoints"):
            (folder / name).mkdir(parents=True)
        rate = config.training.learning_rate or 0.0
        # Of two metrics one likes high rates, the other low ones.
        figures = {"accuracy": rate, "f1": 1 - rate}
        counts = {"trainable": 1, "head": 1, "total": 1, "peak_bytes": 1, "file_bytes": 1, "step_seconds": 1.0}
        metrics = {"validation": figures, "test": figures}
        result = RunResult(config.plain(), metrics, [1.0], rate, device="cpu", **counts)  # type: ignore[arg-type]
        (folder / "result.json").write_text(result.to_json())
        answer: dict[str, Any] = {"seconds": 1.0}
        if told["forgetting"] is not None:
            loss = general_loss(*self._language_model, GeneralText.model_validate(told["forgetting"]))
            answer |= {"general_loss": loss, "general_loss_base": 0.0}
        Path(told["answer"]).write_text(json.dumps(answer))
        return 0

    @cached_property
    def _language_model(self) -> Any:
        from transformers import AutoModelForCausalLM

        place = self.file.parent / "llama"
        source = str(place) if place.is_dir() else tiny.llama(place)
        return AutoModelForCausalLM.from_pretrained(source), tiny.tokenizer()

    def each(self, *keys: str) -> list[Any]:
        """One part of the configuration of each run that was started."""
        assert self.records
        found = []
        for job in self.jobs:
            value = job["config"]
            for key in keys:
                value = value[key]
            found.append(value)
        return found

    @property
    def forgotten(self) -> float | None:
        found: float | None = self.records[0].general_loss
        return found

    @property
    def kept(self) -> list[str]:
        assert self.records
        return sorted({path.name for path in self.output.glob("runs/*/*") if path.is_dir()})


TEXT = "forgetting.file={here}/a.txt"
HUB = "forgetting.hub=a/text"
SWEEP: Entries = {
    "title": Told("title=Mine", lambda sweep: to_markdown(sweep.summary).splitlines()[0], "# Mine"),
    "run": Told("run.training.steps=9", lambda sweep: set(sweep.each("training", "steps")), {9}),
    "tasks": Told(
        "tasks={a: {training: {steps: 3}}, b: {}}",
        lambda sweep: {(record.task, record.config["training"]["steps"]) for record in sweep.records},
        {("a", 3), ("b", 4)},
    ),
    "methods.*.adapter": Told(
        "methods.full.adapter={method: svft, target_modules: [query]}",
        lambda sweep: {record.kind for record in sweep.records}, {"spectral_a", "svft"},
    ),
    "methods.*.learning_rates": Told(
        "methods.full.learning_rates=[5e-3]", lambda sweep: set(sweep.each("training", "learning_rate")),
        {1e-3, 1e-2, 5e-3},
    ),
    "methods.*.over": Told(
        "methods.full.over.training.batch_size=2", lambda sweep: set(sweep.each("training", "batch_size")), {4, 2}
    ),
    "seeds": Told("seeds=[4, 7]", lambda sweep: set(sweep.each("seed")), {4, 7}),
    "grow": Told("grow=2", lambda sweep: sorted({r.rate for r in sweep.records}), [1e-3, 1e-2, 0.1, 1.0]),
    "tuning_seeds": Told("tuning_seeds=1", lambda sweep: len(sweep.records), 5),
    "metric": Told("metric=f1", lambda sweep: sweep.row["rate"], 1e-3),
    "report": Told("report=f1", lambda sweep: sweep.row["test"], 0.99),
    "forgetting.file": Told("forgetting.file={here}/b.txt", lambda sweep: sweep.forgotten, Different, given=(TEXT,)),
    "forgetting.hub": Told(HUB, lambda sweep: sweep.forgotten, Different),
    "forgetting.hub_config": Told("forgetting.hub_config=more", lambda sweep: sweep.forgotten, Different, given=(HUB,)),
    "forgetting.split": Told("forgetting.split=train", lambda sweep: sweep.forgotten, Different, given=(HUB,)),
    "forgetting.tokens": Told("forgetting.tokens=5", lambda sweep: sweep.forgotten, Different, given=(TEXT,)),
    "keep": Told("keep=everything", lambda sweep: sweep.kept, ["adapter", "checkpoints", "model"]),
}  # fmt: skip
