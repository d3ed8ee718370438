"""The README.md of an adapter, of its exports and of a merged model: what is known of it, and nothing else."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checkpoint import AdapterFolder, write_atomically
from ..checkpoint.task_file import read_task
from .card_run import datasets, metric_names, result_beside, result_lines, training_lines
from .card_words import CARD, BaseSaid, front_matter, plain

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
# PEFT's task types and recipes -> the same words.
TASKS = {
    "CAUSAL_LM": "text-generation",
    "SEQ_CLS": "text-classification",
    "TOKEN_CLS": "token-classification",
    "QUESTION_ANS": "question-answering",
    "image_classification": "image-classification",
    "text_to_image": "text-to-image",
}
MOST_LABELS = 20
ADAPTER, LORA, MERGED, GGUF = "adapter", "LoRA", "merged", "GGUF"


def write_run_card(folder: Path, result: Mapping[str, Any]) -> None:
    """Write the card of what a run trained."""
    write_atomically(folder / CARD, run_card(folder, result))


def run_card(folder: Path, result: Mapping[str, Any], spread: Mapping[str, Any] | None = None) -> str:
    """Get the card of what a run trained, an adapter or a whole model; `spread` is that over the seeds of a sweep."""
    base = BaseSaid.of(str(result.get("config", {}).get("model", "")))
    whole = (folder / "config.json").is_file()
    words = {"base": base, "method": result.get("method"), "task": _task(folder, result)}
    lines = [f"{plain(base.name)}, tuned by Spectune (method {plain(result.get('method'))}).", ""]
    return _card(MERGED if whole else ADAPTER, words, lines, result, spread)


def write_export_card(
    folder: Path, form: str, adapter: AdapterFolder | None, base: str, notes: Iterable[str] = ()
) -> None:
    """Write the card of a LoRA or of a GGUF file; `adapter` is what it was made of, None for a live model."""
    result = {} if adapter is None else result_beside(adapter.path)
    said, method = BaseSaid.of(base), None if adapter is None else adapter.config.get("method")
    task = TASKS.get(str(adapter.config.get("task_type"))) if adapter is not None else None
    words = {"base": said, "method": method or "Spectune", "task": task}
    lines = [f"A Spectune adapter (method {plain(method or 'unknown')}) of {plain(said.name)}, as {form}.", ""]
    lines += [f"- {plain(note)}" for note in notes]
    write_atomically(folder / CARD, _card(form, words, lines, result))


def write_card(
    folder: Path, merged: Merged, adapter: AdapterFolder, base: str, base_folder: Path | None = None
) -> None:
    """Write the card of a merged model."""
    task, said = read_task(adapter.path), BaseSaid.of(base, base_folder)
    kind = merged.architecture or ""
    pipeline = next((word for end, word in PIPELINES.items() if kind.endswith(end)), None)
    pipeline = None if task.pooling else pipeline  # a pipeline would not take the mean
    method = plain(adapter.config.get("method"))
    lines = [f"{plain(said.name)} with a Spectune adapter ({method}) merged into its weights.", ""]
    lines += [f"- {len(merged.tensors)} weights changed, stored in {merged.dtype} as in the base."]
    if merged.copied:
        lines += [f"- Trained in full: {', '.join(plain(name) for name in merged.copied)}."]
    if task.labels:
        more = f" and {len(task.labels) - MOST_LABELS} more" if len(task.labels) > MOST_LABELS else ""
        lines += [f"- Classes: {', '.join(plain(label) for label in task.labels[:MOST_LABELS])}{more}."]
    if task.pooling == "mean":
        lines += ["- The logits of a text are the mean of its tokens' logits, padding left out."]
    lines += ["", "The merged model was not evaluated again; figures below are the adapter's.", ""]
    words = {"base": said, "method": adapter.config.get("method"), "task": pipeline, "class": kind}
    write_atomically(folder / CARD, _card(MERGED, words, lines, result_beside(adapter.path)))


def _card(
    form: str,
    words: Mapping[str, Any],
    lines: list[str],
    result: Mapping[str, Any],
    spread: Mapping[str, Any] | None = None,
) -> str:
    base: BaseSaid = words["base"]
    head = {**base.metadata, "tags": ["spectune", *_tags(form, words["method"])]}
    head["base_model_relation"] = "finetune" if form == MERGED else "adapter"
    library = {ADAPTER: "peft", LORA: "peft", MERGED: "transformers" if words.get("class", "x") else None}.get(form)
    more = {
        "library_name": library,
        "pipeline_tag": words["task"],
        "datasets": datasets(result),
        "metrics": metric_names(result),
    }
    head |= {name: value for name, value in more.items() if value}
    body = [f"# {plain(base.name)}, fine-tuned", "", *lines, ""]
    if result:
        body += [*training_lines(result), *result_lines(result, spread)]
    body += [*_loading(form, words), *base.licence_lines]
    return "\n".join([*front_matter(head), *body]).rstrip() + "\n"


def _tags(form: str, method: Any) -> list[str]:
    tags = {ADAPTER: ["peft"], LORA: ["peft", "lora"], GGUF: ["gguf"]}.get(form, [])
    return [*tags, str(method)] if isinstance(method, str) and method.isidentifier() and method != "Spectune" else tags


def _task(folder: Path, result: Mapping[str, Any]) -> str | None:
    kind = str(read_task(folder).architecture)
    found = next((word for end, word in PIPELINES.items() if kind.endswith(end)), None)
    recipe = str(result.get("config", {}).get("recipe"))
    languages = {"causal_lm", "preference", "reward"}
    return found or TASKS.get(recipe) or (TASKS["CAUSAL_LM"] if recipe in languages else None)


def _loading(form: str, words: Mapping[str, Any]) -> list[str]:
    """Get how each stack loads it."""
    base: BaseSaid = words["base"]
    name, here, talks = _code(base.name), "PATH/OF/THIS/FOLDER", words["task"] == "text-generation"
    pictures = words["task"] == "text-to-image"
    merge = [f"Merged into a whole model: `spectune export {here} --to merged -o OUT`.", ""]
    lora = f"spectune export {here} --to lora -o LORA"
    if form == GGUF:
        files = "`llama-cli -m BASE.gguf --lora adapter.gguf`, or `llama-cli -m model.gguf` for a merged model."
        return [
            "## How to load",
            "",
            f"- **llama.cpp**: {files}",
            "- **Ollama**: `ollama create NAME -f Modelfile`.",
            "",
        ]
    if form == MERGED:
        return ["## How to load", "", "```python", *_snippet(words, here), "```", "", *_serving(talks, here)]
    if form == LORA:
        steps = ["- **PEFT, transformers**: `model.load_adapter(PATH)` or `PeftModel.from_pretrained(model, PATH)`."]
        steps += [f"- **vLLM**: `vllm serve {name} --enable-lora --lora-modules NAME=PATH`."] if talks else []
        return ["## How to load this adapter", "", *steps, ""]
    load = [
        "from peft import PeftModel",
        "",
        f'model = PeftModel.from_pretrained(base, "{here}")  # base: {_code(base.name)}',
    ]
    if pictures:
        load = [f'pipeline.unet.load_adapter("{here}/unet")  # a diffusers pipeline of {_code(base.name)}']
    lines = [
        "## How to load this adapter",
        "",
        "`pip install spectune`; no import is needed.",
        "",
        "```python",
        *load,
        "```",
        "",
    ]
    lines += ["- **transformers**: `model.load_adapter(PATH)` on the base."]
    lines += (
        [f"- **vLLM**: by name with Spectune's plugin, or `{lora}` and `--lora-modules NAME=LORA`."] if talks else []
    )
    lines += (
        [f"- **llama.cpp**: `spectune export {here} --to gguf -o OUT`, then `--lora OUT/adapter.gguf`."]
        if talks
        else []
    )
    lines += (
        [f"- **diffusers**: `{lora} --diffusers unet`, then `pipeline.load_lora_weights(LORA)`."] if pictures else []
    )
    return [*lines, "", *merge]


def _code(words: str) -> str:
    """Get words that end no code, for a command or a comment."""
    return re.sub(r"[^\w./-]", "", words)[:100]


def _serving(talks: bool, here: str) -> list[str]:
    said = f"vLLM: `vllm serve {here}`. llama.cpp: `spectune export ADAPTER --to gguf --merged`."
    return [said, ""] if talks else []


def _snippet(words: Mapping[str, Any], here: str) -> list[str]:
    kind, pipeline = words.get("class"), words["task"]
    if pipeline is not None:
        return ["from transformers import pipeline", "", f'model = pipeline("{pipeline}", "{here}")']
    kind = kind or "AutoModel"
    return [f"from transformers import {kind}", "", f'model = {kind}.from_pretrained("{here}")']
