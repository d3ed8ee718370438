"""The examples of `spectune fuse`: texts from files, or a run's own, as a rule wants them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..errors import DataError, OptionError

GRADIENT, AUTO, ALL = "gradient", "auto", "all"


def _walking() -> list[str]:
    from ..fusion import FUSIONS

    return [AUTO, *(name for name, rule in FUSIONS.items() if rule.behind)]


def _walks(rule: str) -> bool:
    """Ask whether a rule runs the base model on the examples."""
    return rule in _walking()


class Looks:
    """What rules may look at besides the adapters; each part is read and computed once, when a rule wants it."""

    def __init__(self, adapters: list[Path], examples: list[Path], keep: Path | None, base: str | None) -> None:
        if examples and len(examples) != len(adapters):
            raise OptionError(
                f"--examples: {len(examples)} files for {len(adapters)} adapters. Name one for each, in order."
            )
        self.adapters, self.examples, self.keep, self.base = adapters, examples, keep, base
        self.texts = {path: _texts(path) for path in [*examples, *([keep] if keep else [])] if not path.is_dir()}
        self._found: dict[str, dict[str, Any]] = {}

    def refuse_idle(self, rule: str) -> None:
        """Raise `OptionError` for examples or texts that a rule would not look at."""
        if self.keep is not None and not (_walks(rule) or rule == ALL):
            raise OptionError(f"--keep: rule {rule!r} does not use it. Leave it out, or use --rule match.")
        if self.keep is not None and not self.examples:
            raise OptionError("--keep needs --examples. Name the examples of each adapter, in order.")
        if self.examples and not (_walks(rule) or rule in (ALL, GRADIENT)):
            raise OptionError(f"--examples: rule {rule!r} does not use them. Leave them out, or use --rule match.")

    def for_rule(self, rule: str) -> dict[str, Any]:
        """Get the arguments of `fuse` for a rule: activations of the examples, or the base and batches of them."""
        if not self.examples or not (_walks(rule) or rule == GRADIENT):
            return {}
        if rule not in self._found:
            found = {"activations": self._activations()} if rule == GRADIENT else self._base_and_batches()
            self._found |= {name: found for name in ((GRADIENT,) if rule == GRADIENT else _walking())}
        return self._found[rule]

    def _base_and_batches(self) -> dict[str, Any]:
        from ..export.source import open_base
        from ..runs import pipeline_base
        from .terminal import Console

        console, of = Console(stderr=True), None
        neutral = [] if self.keep is None else self.texts.get(self.keep, [])
        if self._are_pipelines():
            model, kept = pipeline_base(self.examples[0], neutral)
        else:
            (model, of), kept = open_base(self.adapters[0], self.base), []
        return {
            "model": model,
            "examples": [self._batches(path, of) for path in self.examples],
            "keep": None if self.keep is None else kept or self._batches(self.keep, of),
            "on_layers": lambda done, layers: console.print(f"merged {done} of {layers} layers"),
        }

    def _are_pipelines(self) -> bool:
        """Ask whether the examples are runs of a pipeline; `OptionError` where only some are."""
        from ..runs import is_pipeline

        given = [*self.examples, *([self.keep] if self.keep is not None and self.keep.is_dir() else [])]
        pipelines = [path for path in given if path.is_dir() and is_pipeline(path)]
        others = [path for path in given if path not in pipelines]
        if pipelines and others:
            raise OptionError(
                f"{others[0]}: it has examples of another kind than {pipelines[0]}, which is a run of text_to_image. "
                f"Name a run of text_to_image for each adapter."
            )
        return bool(pipelines)

    def _batches(self, path: Path, of: Any) -> list[dict[str, Any]]:
        from ..checkpoint import load_tokenizer
        from ..runs import examples_of

        if path not in self.texts:
            return examples_of(path)
        # A repository's tokenizer files may not be downloaded yet.
        tokenizer = load_tokenizer(of.name if of.from_hub else of.config_folder, of.revision)
        return [dict(tokenizer(line, return_tensors="pt", truncation=True)) for line in self.texts[path]]

    def _activations(self) -> list[dict[str, Any]]:
        """Get the Gram matrices of every adapter's own examples, with that adapter on the base."""
        from ..export.source import open_adapted
        from ..fusion import collect_grams
        from ..runs import pipeline_base
        from ..tuner import load_attached
        from .progress import Stages
        from .terminal import Console

        found, pipelines = [], self._are_pipelines()
        with Stages(Console(stderr=True)) as stages:
            for path, given in zip(self.adapters, self.examples, strict=True):
                if pipelines:
                    model, of = load_attached(pipeline_base(given)[0], path), None
                else:
                    model, of = open_adapted(path, self.base)
                batches = self._batches(given, of)
                step = stages.begin(f"examples of {path.name}", len(batches))

                def counted(batches: list[dict[str, Any]] = batches, step: Any = step) -> Any:
                    for place, batch in enumerate(batches, 1):
                        yield batch
                        step(place, len(batches), None)

                found.append(collect_grams(model, counted()))
        return found


def _texts(path: Path) -> list[str]:
    """Get one text per line; from a .jsonl file, the field `text` of each line."""
    try:
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot read the examples: {error}. Pass a text or JSONL file.") from None
    if path.suffix == ".jsonl":
        lines = [_field(path, place, line) for place, line in enumerate(lines, 1)]
    if not lines:
        raise DataError(f"{path}: contains no examples. Write one text on each line.")
    return lines


def _field(path: Path, place: int, line: str) -> str:
    try:
        row = json.loads(line)
    except ValueError:
        row = None
    if not isinstance(row, dict) or not isinstance(row.get("text"), str):
        raise DataError(f'{path}: line {place} is not {{"text": "..."}}. Correct it, or pass a plain text file.')
    return str(row["text"])
