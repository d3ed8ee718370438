"""What the page does, without gradio: a stranger's file or a hub name -> figures in one line, and a page of spectra.

Nothing in a file names a path here. An upload is copied under names of ours, its config loses the name of its base, and
a base is only what the visitor types: a hub name, which is downloaded and never looked for on this disk.
"""

from __future__ import annotations

import html
import json
import re
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from spectune.errors import SpectuneError, printable
from spectune.pages import write_survey
from spectune.surveys import AdapterSurvey, is_adapter, survey_adapter, survey_model

HUB_NAME = re.compile(r"(\w[\w.-]{0,95}/)?\w[\w.-]{0,95}", re.ASCII)
CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
LARGEST_CONFIG = 2**20
LARGEST_DOWNLOAD = 4 * 2**30
"""Bytes of one repository that the Space downloads. Chosen."""
SAMPLE = 3
"""Weights of each kind that are looked at in a model. Chosen: a few seconds on two cores for a model of 1B."""


@dataclass(frozen=True)
class Shown:
    """What a visitor sees: one line of plain words, and HTML that runs nothing."""

    words: str
    page: str = ""


class NotInspectableError(ValueError):
    """What a visitor gave cannot be inspected; the message says why."""


def inspect_files(
    files: Sequence[str | Path], base: str = "", located: bool = True, fetch: Callable[[str], Path] | None = None
) -> Shown:
    """Inspect uploaded files: one .safetensors, and the adapter_config.json beside it if there is one."""
    with tempfile.TemporaryDirectory() as place:
        try:
            path, names_base = laid_out([Path(file) for file in files], Path(place) / "adapter")
            label = next(Path(file).name for file in files if Path(file).suffix == ".safetensors")
            return _shown(path, label[:80], base, names_base, located, fetch or download)
        except (NotInspectableError, SpectuneError, OSError) as error:
            return Shown(_plain(error, place))


def inspect_hub(name: str, base: str = "", located: bool = True, fetch: Callable[[str], Path] | None = None) -> Shown:
    """Inspect a repository of the hub: an adapter, or a model."""
    fetch = fetch or download
    with tempfile.TemporaryDirectory() as place:
        try:
            path, names_base = fetch(name.strip()), ""
            if (path / CONFIG).exists():
                path, names_base = laid_out(sorted(path.iterdir()), Path(place) / "adapter")
            return _shown(path, name.strip()[:80], base, names_base, located, fetch)
        except (NotInspectableError, SpectuneError, OSError) as error:
            return Shown(_plain(error, place))


def laid_out(files: Sequence[Path], place: Path) -> tuple[Path, str]:
    """Get a copy of an adapter under names of ours, without the name of its base; and that name, if it is the hub's."""
    if pickles := [file.name for file in files if file.suffix in (".bin", ".pt", ".pth", ".ckpt")]:
        raise NotInspectableError(f"{pickles[0]}: pickles are never read. Convert it to safetensors.")
    config = next((file for file in files if file.name == CONFIG), None)
    tensors = [file for file in files if file.suffix == ".safetensors"]
    if config is not None:  # PEFT's name, if a repository has other files of tensors, too
        tensors = [file for file in tensors if file.name == TENSORS] or tensors
    if len(tensors) != 1:
        raise NotInspectableError(f"One .safetensors file is needed, but there are {len(tensors)}.")
    place.mkdir()
    shutil.copyfile(tensors[0], place / TENSORS)
    if config is None:
        return place / TENSORS, ""
    if config.stat().st_size > LARGEST_CONFIG:
        raise NotInspectableError(f"{CONFIG}: is larger than {LARGEST_CONFIG} bytes.")
    try:
        values: Any = json.loads(config.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        raise NotInspectableError(f"{CONFIG}: is not JSON.") from None
    if not isinstance(values, dict):
        raise NotInspectableError(f"{CONFIG}: is not an object.")
    named = values.pop("base_model_name_or_path", None)
    values.pop("revision", None)
    (place / CONFIG).write_text(json.dumps(values), encoding="utf-8")
    return place, named if isinstance(named, str) and HUB_NAME.fullmatch(named) else ""


def download(name: str) -> Path:
    """Get the safetensors and JSON files at the top of a hub repository, if they are not too large."""
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    if not HUB_NAME.fullmatch(name):
        raise NotInspectableError("This is not the name of a hub repository: OWNER/NAME is needed.")
    try:
        info = HfApi().model_info(name, files_metadata=True)
        wanted = [file for file in info.siblings or [] if re.fullmatch(r"[^/]+\.(safetensors|json)", file.rfilename)]
        size = sum(file.size or 0 for file in wanted)
        if size > LARGEST_DOWNLOAD:
            raise NotInspectableError(
                f"{name}: has {size / 2**30:.1f} GiB, and this page downloads {LARGEST_DOWNLOAD / 2**30:.0f} at most. "
                "Run `spectune inspect` on your own machine."
            )
        return Path(snapshot_download(name, revision=info.sha, allow_patterns=[file.rfilename for file in wanted]))
    except (
        HfHubHTTPError,
        HFValidationError,
        ValueError,
        OSError,
        RuntimeError,
    ) as error:  # the hub is not reached, too
        if isinstance(error, NotInspectableError):
            raise
        raise NotInspectableError(f"{name}: the hub does not give this repository ({type(error).__name__}).") from None


def _shown(path: Path, label: str, base: str, names_base: str, located: bool, fetch: Callable[[str], Path]) -> Shown:
    """Get the figures of a model or an adapter at a path of ours."""
    base = base.strip()
    if not is_adapter(path):
        model = replace(survey_model(path, sample=SAMPLE, quick=True), path=label)
        return Shown(f"a model: {len(model.weights)} of {model.targets} weights looked at", _page(model))
    if not base and _is_spectral(path):
        raise NotInspectableError(f"A spectral adapter is inspected with its base. {_hint(names_base)}")
    survey = survey_adapter(path, fetch(base) if base else None, quick=not located)
    survey = replace(survey, path=label, base=base or None, missing=[])
    return Shown(figures(survey) + ("" if base else f" {_hint(names_base)}"), _page(survey))


def _is_spectral(path: Path) -> bool:
    return path.is_dir() and json.loads((path / CONFIG).read_text(encoding="utf-8")).get("peft_type") == "SPECTUNE"


def _hint(names_base: str) -> str:
    said = f"Its config names {names_base}. " if names_base else ""
    return f"{said}Type the hub name of the base for overlaps and intruder directions."


def figures(survey: AdapterSurvey) -> str:
    """Get the suggested rank, and with a base the intruders and the overlap, in one line."""
    layers = f"{survey.layer_count} layer{'s' * (survey.layer_count != 1)}"
    said = f"{layers}, {survey.trainable:,} numbers; suggested LoRA rank {survey.suggested_r}"
    found = [layer.intruders for layer in survey.layers if layer.intruders is not None]
    inside = [layer.overlap for layer in survey.layers if layer.overlap is not None]
    if found:
        said += f"; {sum(one.count for one in found)} intruder directions of {sum(one.looked_at for one in found)}"
    if inside:
        top = sum(one.right_top for one in inside) / len(inside)
        said += f"; {top:.1%} of the update in the base's top {survey.r} input directions"
    return f"{said}."


def _page(survey: Any) -> str:
    """Get the survey's own page in a frame that runs no script and reaches nothing."""
    with tempfile.TemporaryDirectory() as place:
        write_survey(survey, Path(place) / "page.html")
        page = (Path(place) / "page.html").read_text(encoding="utf-8")
    return f'<iframe sandbox srcdoc="{html.escape(page)}" style="width:100%;height:80vh;border:0"></iframe>'


def _plain(error: Exception, place: str) -> str:
    """Get an error in one line of harmless letters, without paths of this machine."""
    said = re.sub(rf"{re.escape(place)}/adapter(/{re.escape(TENSORS)})?", "the adapter", str(error))
    return printable(" ".join(said.split()))[:600]
