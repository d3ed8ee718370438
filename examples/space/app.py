"""The Space's page: upload an adapter or name a repository, and see its spectra. `python app.py` runs it here, too."""

from __future__ import annotations

import gradio as gr
from inspecting import Shown, inspect_files, inspect_hub

INTRODUCTION = """# What does this adapter do to its base?

Spectra, suggested rank, overlap with the base's strongest directions and intruder directions of any LoRA or Spectune
adapter; spectra of any model. Only safetensors are read, and nothing of a file is run. With its base, each layer of an
adapter costs one full SVD."""


def looked_at(files: list[str] | None, name: str, base: str, located: bool) -> tuple[str, str]:
    """Get one line and a page for what a visitor gave."""
    if bool(files) == bool(name.strip()):
        return "Upload files, or name a repository: one of them.", ""
    shown: Shown = inspect_files(files, base, located) if files else inspect_hub(name, base, located)
    return shown.words, shown.page


with gr.Blocks(title="Spectune: look at an adapter") as page:
    gr.Markdown(INTRODUCTION)
    with gr.Row():
        uploaded = gr.File(
            label="adapter_model.safetensors, and adapter_config.json if you have it",
            file_count="multiple",
            file_types=[".safetensors", ".json"],
        )
        with gr.Column():
            repository = gr.Textbox(label="or a repository of the hub, adapter or model", placeholder="OWNER/NAME")
            base = gr.Textbox(label="base of the adapter (hub name)", placeholder="OWNER/NAME")
            located = gr.Checkbox(True, label="overlaps and intruder directions (needs the base; slower)")
    button = gr.Button("Look", variant="primary")
    words = gr.Textbox(label="In short", interactive=False)
    spectra = gr.HTML(label="Spectra")
    button.click(looked_at, [uploaded, repository, base, located], [words, spectra], concurrency_limit=1)

if __name__ == "__main__":
    page.launch(max_file_size="1gb", show_error=False)
