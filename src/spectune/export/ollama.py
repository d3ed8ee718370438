"""`export_ollama`: a folder for `ollama create`: a Modelfile, and the GGUF files that it names."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..checkpoint import (
    AdapterFolder,
    find_base,
    fresh_folder,
    read_adapter_folder,
    refuse_to_replace,
    write_atomically,
)
from ..checkpoint.base import Base
from ..checkpoint.pretrained import load_tokenizer
from ..checkpoint.reader import read_json
from ..errors import ExportError, printable
from .chat_turns import ASSISTANT, SYSTEM, USER, NoTurnsError, Turns, turns_of
from .gguf import ADAPTER_FILE, GgufExport, export_gguf
from .gguf_model import plan_model, write_model
from .gguf_words import refuse_unknown
from .merged import OnTensor

MODELFILE, BASE_FILE = "Modelfile", "base.gguf"
NO_WORDS = "neither the adapter nor the base has a tokenizer"
GENERATION, GENERATION_LIMIT = "generation_config.json", 2**20


@dataclass(frozen=True)
class OllamaExport:
    """A folder for Ollama."""

    path: Path
    gguf: GgufExport
    """The adapter, or the merged model."""
    template: str
    """Which TEMPLATE the Modelfile has, and why none if none."""
    stops: tuple[str, ...]
    """Texts at which an answer ends."""


def export_ollama(
    adapter_dir: str | Path,
    output_dir: str | Path,
    *,
    merged: bool = False,
    ollama_base: str | None = None,
    dtype: torch.dtype | None = None,
    base_model: str | Path | None = None,
    overwrite: bool = False,
    on_tensor: OnTensor | None = None,
    **lora: Any,
) -> OllamaExport:
    """Write a folder that `ollama create NAME -f Modelfile` reads.

    The base becomes `base.gguf` beside `adapter.gguf`; `ollama_base` names a model that Ollama has instead, which must
    be the same base. `merged` writes one `model.gguf`. TEMPLATE is written where the chat template is nothing but texts
    around messages, found by rendering it, and left out with the reason in the Modelfile where it is more. Other
    options and errors as `export_gguf`.
    """
    if ollama_base is not None and (merged or not ollama_base.isprintable() or " " in ollama_base or not ollama_base):
        why = "a merged model needs no base" if merged else "this is not a name"
        raise ExportError(f"ollama_base={printable(ollama_base)!r}: {why}. Leave one of the two out.")
    folder = read_adapter_folder(adapter_dir).require("SPECTUNE")
    base = find_base(base_model, folder)
    refuse_to_replace(output_dir, folder.path, base.path)
    writes_base = not merged and ollama_base is None
    if writes_base:
        if base.gguf is not None:
            raise ExportError(
                f"{base.name}: the base is a GGUF file already. Pass --ollama-base with its path or name."
            )
        plan_model(base.model_folder, base.checkpoint)
        refuse_unknown(base.model_folder)
    with fresh_folder(output_dir, overwrite=overwrite) as partial:
        done = export_gguf(
            folder.path, partial / "gguf", merged=merged, dtype=dtype, base_model=base.name, on_tensor=on_tensor, **lora
        )
        for file in (partial / "gguf").iterdir():
            file.rename(partial / file.name)
        (partial / "gguf").rmdir()
        if writes_base:
            write_model(base.model_folder, partial / BASE_FILE, Path(base.name).name, dtype)
        source = f"./{done.path.name}" if merged else ollama_base or f"./{BASE_FILE}"
        template, stops = _talk(folder, base)
        lines = [f"# ollama create NAME -f {MODELFILE}", f"FROM {source}"]
        lines += [] if merged else [f"ADAPTER ./{ADAPTER_FILE}"]
        lines += [*template.lines, *(f'PARAMETER stop "{stop}"' for stop in stops)]
        write_atomically(partial / MODELFILE, "\n".join(lines) + "\n")
    return OllamaExport(Path(output_dir), replace(done, path=Path(output_dir, done.path.name)), template.said, stops)


@dataclass(frozen=True)
class _Template:
    said: str
    lines: tuple[str, ...]


def _talk(folder: AdapterFolder, base: Base) -> tuple[_Template, tuple[str, ...]]:
    """Get TEMPLATE and SYSTEM, or why not, and the texts at which to stop."""
    places = [place for place in (folder.path, base.model_folder) if (place / "tokenizer_config.json").is_file()]
    if not places:
        return _Template(f"none: {NO_WORDS}", (f"# No TEMPLATE: {NO_WORDS}.",)), ()
    tokenizer = load_tokenizer(places[0])
    try:
        turns = turns_of(tokenizer)
        template = _Template("the chat template's turns", tuple(_modelfile(turns, tokenizer)))
        ends = [turns.around[ASSISTANT][1].strip()]
    except NoTurnsError as error:
        said = f"none: {error}"
        template, ends = _Template(said, (f"# No TEMPLATE: {printable(error)}.",)), []
    ends = [end for end in ends if end in tokenizer.get_added_vocab()]
    found = dict.fromkeys([*_end_tokens(tokenizer, folder.path, base.model_folder), *ends])
    return template, tuple(stop for stop in found if stop.isprintable() and '"' not in stop)


def _end_tokens(tokenizer: Any, *folders: Path) -> Iterator[str]:
    """Get the tokens that end a text, of the tokenizer and of the first generation config."""
    ids = [tokenizer.eos_token_id]
    for path in (folder / GENERATION for folder in folders):
        if path.is_file():
            said = read_json(path, GENERATION_LIMIT).get("eos_token_id")
            ids += said if isinstance(said, list) else [said]
            break
    for place in ids:
        if isinstance(place, int) and 0 <= place < len(tokenizer):
            yield str(tokenizer.convert_ids_to_tokens(place))


def _modelfile(turns: Turns, tokenizer: Any) -> Iterator[str]:
    """Get the lines of TEMPLATE in Go's template language, and of SYSTEM."""
    opening, bos = turns.opening, tokenizer.bos_token
    if bos and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]:
        opening = opening.removeprefix(bos)  # llama.cpp puts it there
        if any(bos in text for pair in turns.around.values() for text in pair):
            raise NoTurnsError("its chat template puts the token that begins a text before every turn")
    texts = [
        opening,
        turns.asks,
        turns.default_system or "",
        *(text for pair in turns.around.values() for text in pair),
    ]
    for text in texts:
        if "{{" in text or "}}" in text or '"""' in text or not text.replace("\n", "").replace("\t", "").isprintable():
            raise NoTurnsError("its chat template has letters that a Modelfile cannot hold")
    sides = [(role, *turns.around[role]) for role in (SYSTEM, USER, ASSISTANT) if role in turns.around]
    cases = "{{ else ".join(
        f'if eq .Role "{role}" }}}}{before}{{{{ .Content }}}}{after}' for role, before, after in sides
    )
    yield f'TEMPLATE """{opening}{{{{ range .Messages }}}}{{{{ {cases}{{{{ end }}}}{{{{ end }}}}{turns.asks}"""'
    if turns.default_system:
        yield f'SYSTEM """{turns.default_system}"""'
    if turns.trims:
        yield "# The chat template cuts off spaces around messages; this TEMPLATE does not."
