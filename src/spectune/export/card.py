"""`write_card`: the README.md of a merged model, with what is known of it and nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checkpoint import AdapterFolder, write_atomically
from ..checkpoint.task_file import read_task
from ..errors import printable

if TYPE_CHECKING:
    from .merged import Merged

# The end of a class's name -> the word by which the hub and transformers' pipelines call the task.
PIPELINES = {
    "ForSequenceClassification": "text-classification",
    "ForTokenClassification": "token-classification",
    "ForQuestionAnswering": "question-answering",
    "ForImageClassification": "image-classification",
    "ForCausalLM": "text-generation",
    "LMHeadModel": "text-generation",
}
MOST_LABELS = 20


def write_card(folder: Path, merged: Merged, adapter: AdapterFolder, base: str) -> None:
    """Write what the folder is, how it is loaded, and what was not looked at. No figure is made up."""
    task = read_task(adapter.path)
    kind = merged.architecture or ""
    pipeline = next((word for end, word in PIPELINES.items() if kind.endswith(end)), None)
    pipeline = None if task.pooling else pipeline  # a pipeline would not take the mean
    lines = ["---", *_metadata(base, pipeline if kind else None, bool(kind)), "---", "", f"# {_name(base)}, fine-tuned"]
    method = printable(adapter.config.get("method"))
    named = _name(base) if Path(base).exists() else printable(base)  # a path means nothing elsewhere
    lines += ["", f"`{named}` with a Spectune adapter (`{method}`) merged into its weights."]
    lines += ["", f"- {len(merged.tensors)} weights changed, stored in {merged.dtype} as in the base."]
    if merged.copied:
        lines += [f"- Trained in full: {', '.join(f'`{printable(name)}`' for name in merged.copied)}."]
    if task.labels:
        more = f" and {len(task.labels) - MOST_LABELS} more" if len(task.labels) > MOST_LABELS else ""
        lines += [f"- Classes: {', '.join(printable(label) for label in task.labels[:MOST_LABELS])}{more}."]
    if task.pooling == "mean":
        lines += ["- The logits of a text are the mean of its tokens' logits, padding left out."]
    if kind:
        lines += ["", "```python", *_snippet(kind, pipeline), "```"]
    lines += ["", "The merged model was not evaluated again. The base's licence and limits apply."]
    write_atomically(folder / "README.md", "\n".join(lines) + "\n")


def _metadata(base: str, pipeline: str | None, transformers: bool) -> list[str]:
    said: dict[str, Any] = {"base_model_relation": "finetune", "tags": ["spectune"]}
    if not Path(base).exists():
        said["base_model"] = base
    if transformers:
        said["library_name"] = "transformers"
    if pipeline:
        said["pipeline_tag"] = pipeline
    return [f"{key}: {json.dumps(value)}" for key, value in sorted(said.items())]  # JSON is YAML


def _name(base: str) -> str:
    return printable(base.rstrip("/").rpartition("/")[2])


def _snippet(kind: str, pipeline: str | None) -> list[str]:
    if pipeline is not None:
        return ["from transformers import pipeline", "", f'model = pipeline("{pipeline}", "PATH/OF/THIS/FOLDER")']
    return [f"from transformers import {kind}", "", f'model = {kind}.from_pretrained("PATH/OF/THIS/FOLDER")']
