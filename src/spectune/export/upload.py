"""`plan_upload`, `upload`: an adapter or a model for the hub: only files that belong, no path of this machine."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..checkpoint import CONFIG_FILE, read_adapter_folder
from ..checkpoint.basis_file import basis_beside, shared_identity
from ..checkpoint.run_folder import trained_in
from ..errors import AdapterError, OptionError, OutputError, one_line, printable
from .card import run_card
from .card_run import result_beside
from .card_words import CARD
from .companions import OTHERS, TOKENIZER

WEIGHTS = re.compile(
    r"adapter_model\.safetensors|pytorch_lora_weights\.safetensors|model(-\d+-of-\d+)?\.safetensors|"
    r"model\.safetensors\.index\.json|(adapter|base|model)\.gguf"
)
CONFIGS = re.compile(r"(adapter_)?config\.json|task\.json|Modelfile|README\.md")
# Files whose texts are looked through for paths. Vocabularies may hold what looks like one.
TEXTS = re.compile(r"(\w+_)?config\.json|task\.json|Modelfile|README\.md")
# An absolute path of any system, not part of an address on the web.
PATH = re.compile(r"(?<![\w/.:~-])(?:~?(?:/[\w.@+-]+){2,}/?|[A-Za-z]:\\(?:[\w.@+-]+\\?)+)")
WHOLE_PATH = re.compile(r"(~?/|[A-Za-z]:\\)[^\n]+")
REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
PIECE = 2**20


@dataclass(frozen=True)
class UploadFile:
    """One file as it will be on the hub."""

    name: str
    source: Path
    content: bytes | None = field(default=None, repr=False)
    """What is uploaded in place of the file; None where that is the file itself."""

    @property
    def size(self) -> int:
        """Its bytes."""
        return self.source.stat().st_size if self.content is None else len(self.content)

    @property
    def sha256(self) -> str:
        """The hash of what is uploaded, as the hub shows it for large files."""
        if self.content is not None:
            return hashlib.sha256(self.content).hexdigest()
        digest = hashlib.sha256()
        with self.source.open("rb") as file:
            while piece := file.read(PIECE):
                digest.update(piece)
        return digest.hexdigest()


@dataclass(frozen=True)
class Upload:
    """What goes to the hub, decided without it."""

    repository: str
    files: tuple[UploadFile, ...]
    rewritten: tuple[str, ...]
    """`FILE: PATH -> NAME`, for each path of this machine."""
    left_out: tuple[str, ...]
    """Files of the folder that do not belong to an adapter or a model."""

    @property
    def card(self) -> str:
        """The card as it will be."""
        found = next((file for file in self.files if file.name == CARD), None)
        return "" if found is None else (found.content or found.source.read_bytes()).decode("utf-8", "replace")

    def to_json(self) -> dict[str, Any]:
        """Get everything in plain words."""
        files = [{"name": file.name, "bytes": file.size, "sha256": file.sha256} for file in self.files]
        said = {"rewritten": list(self.rewritten), "left_out": list(self.left_out), "card": self.card}
        return {"repository": self.repository, "files": files, **said}


def plan_upload(path: str | Path, repository: str, spread: Mapping[str, Any] | None = None) -> Upload:
    """Get what would be uploaded from a run, an adapter, or what `spectune export` wrote; the hub is not asked.

    Of the folder the files that belong to an adapter or a model go up; checkpoints, optimizer states, data, results and
    pages do not. Paths of this machine in configs and card become the last part of the path. The card is the run's,
    written anew with `spread` (figures over a sweep's seeds) where its result is at hand.

    `OptionError` for a name that is not OWNER/NAME, `AdapterError` for a folder that holds neither.
    """
    if not REPOSITORY.fullmatch(repository) or ".." in repository or "--" in repository:
        raise OptionError(
            f"{repository!r} is not OWNER/NAME: letters, digits, '-', '_' and '.', with one '/'. Correct it."
        )
    folder = trained_in(path)
    found = {file.name: file for file in _belonging(folder)}
    if not any(WEIGHTS.fullmatch(name.rpartition("/")[2]) for name in found):
        why = "there is nothing here" if not folder.exists() else "it holds no adapter and no model"
        raise AdapterError(f"{path}: {why}. Pass a run, an adapter, or a folder that spectune export wrote.")
    if (folder / CONFIG_FILE).is_file():
        adapter = read_adapter_folder(folder)
        if (identity := shared_identity(adapter.config)) is not None:
            basis = basis_beside(folder, identity)
            assert adapter.basis is not None and basis is not None  # else reading it has raised
            found[basis.path.name] = UploadFile(basis.path.name, basis.path)
    if result := result_beside(folder):
        found[CARD] = UploadFile(CARD, folder / CARD, run_card(folder, result, spread).encode())
    rewritten: list[str] = []
    files = tuple(_without_paths(file, rewritten) for _, file in sorted(found.items()))
    there = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    return Upload(repository, files, tuple(rewritten), tuple(sorted(there - found.keys())))


def _belonging(folder: Path) -> Iterator[UploadFile]:
    """Get the files that belong to an adapter or a model, and those of the adapters in its folders (`unet/`)."""
    if not folder.is_dir():
        return
    parts = [inner for inner in sorted(folder.iterdir()) if (inner / CONFIG_FILE).is_file()]
    for place in (folder, *parts):
        for path in sorted(place.iterdir()):
            known = any(kind.fullmatch(path.name) for kind in (WEIGHTS, CONFIGS, TOKENIZER, OTHERS))
            if known and path.is_file():
                yield UploadFile(path.relative_to(folder).as_posix(), path)


def _without_paths(file: UploadFile, rewritten: list[str]) -> UploadFile:
    """Get a file with the last part of each path in place of the path; what was changed is added to `rewritten`."""
    if not TEXTS.fullmatch(file.source.name):
        return file
    text = file.source.read_text("utf-8", "replace") if file.content is None else file.content.decode()

    def last(found: re.Match[str]) -> str:
        name = re.split(r"[/\\]", found[0].rstrip("/\\ "))[-1]
        rewritten.append(f"{file.name}: {printable(found[0])} -> {printable(name)}")
        return name

    if file.source.suffix == ".json":
        try:
            said = json.loads(text)
        except ValueError:
            raise AdapterError(f"{file.source}: this is not JSON. Copy or export the folder again.") from None
        plain = _mapped(said, lambda words: last(hit) if (hit := WHOLE_PATH.fullmatch(words)) else words)
        new = json.dumps(plain, indent=2, ensure_ascii=False) + "\n" if plain != said else text
    else:
        new = PATH.sub(last, text)
    return file if new == text else UploadFile(file.name, file.source, new.encode())


def _mapped(said: Any, change: Any) -> Any:
    if isinstance(said, dict):
        return {name: value if name == "chat_template" else _mapped(value, change) for name, value in said.items()}
    if isinstance(said, list):
        return [_mapped(value, change) for value in said]
    return change(said) if isinstance(said, str) else said


def require_token() -> str:
    """Get the token for the hub; `OptionError` without one, or where the hub may not be asked."""
    from huggingface_hub import constants, get_token

    if constants.HF_HUB_OFFLINE:
        raise OptionError("HF_HUB_OFFLINE is set, so nothing can be pushed. Unset it, or pass --dry-run.")
    token = get_token()
    if not token:
        raise OptionError(
            "you are not logged in to the hub. Run `hf auth login` or set HF_TOKEN; --dry-run works without."
        )
    return token


def upload(plan: Upload, *, private: bool = False, revision: str | None = None, message: str | None = None) -> str:
    """Create the repository if there is none, and add one commit with the files; get its address.

    `OutputError` in one line for whatever the hub refuses; a public repository is not written to with `private`.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    token = require_token()
    api = HfApi(token=token)
    try:
        api.create_repo(plan.repository, private=private, exist_ok=True)
        public = private and not api.repo_info(plan.repository).private
        if not public:
            if revision is not None and revision != "main":
                api.create_branch(plan.repository, branch=revision, exist_ok=True)
            parts = [
                CommitOperationAdd(file.name, str(file.source) if file.content is None else file.content)
                for file in plan.files
            ]
            words = message or "Upload by spectune push"
            done = api.create_commit(plan.repository, parts, commit_message=words, revision=revision)
            return str(done.commit_url)
    except Exception as error:  # of the hub's client, its parsers or the network
        raise OutputError(
            f"{plan.repository}: the hub refused: {one_line(error)}. Check the name, and what the token may."
        ) from error
    raise OutputError(
        f"{plan.repository}: this repository exists and is public. Leave out --private, or choose another name."
    )
