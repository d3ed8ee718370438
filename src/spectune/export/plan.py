"""`plan_merge`: which tensors of a base an adapter replaces, and what class of model comes out."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..adapter.base_names import base_tensor, with_experts
from ..checkpoint import PEFT_PREFIX, AdapterFolder, Checkpoint
from ..checkpoint.live_names import LiveView, live_view
from ..errors import ExportError
from .architecture import UNKNOWN, architecture_of
from .target import ModelTarget, find_target
from .tied import untied
from .vocabulary import carried_keys, new_vocabulary, with_resized_bases


@dataclass(frozen=True, eq=False)
class MergePlan:
    """What is merged into what."""

    target: ModelTarget | None
    stored: Checkpoint
    """The base by the names of its files."""
    view: LiveView
    apart: tuple[str, ...]
    trained: dict[str, str]
    """Live name -> key in the adapter's file, of what was trained in full."""
    vocabulary: int | None
    """The rows of the embedding where they are not the base's."""
    names: dict[str, str | None]
    """Stored name -> the name it is written under (None: not at all), where that is another one."""

    @property
    def checkpoint(self) -> Checkpoint:
        """The base by live names."""
        return self.view.checkpoint


def plan_merge(base: Path, checkpoint: Checkpoint, folder: AdapterFolder) -> MergePlan:
    """Get what is merged into what; `ExportError` where a part of the model that comes out is nowhere."""
    target = find_target(folder, base)
    plan = _plan_for(target, base, checkpoint, folder)
    if target is None or not target.changes_class:
        return plan
    lost = _nowhere(target.model, plan)
    new = plan.trained.keys() - plan.checkpoint.files.keys()
    if lost and not new:  # an adapter without a head: what comes out is the base's own class
        return _plan_for(find_target(folder, base, new_class=False), base, checkpoint, folder)
    if lost:
        module = lost[0].rpartition(".")[0]
        raise ExportError(
            f"{folder.path}: {lost[0]} of {type(target.model).__name__} is neither in the base nor in the adapter, so "
            f"it was random in training. Train again with {module!r} in modules_to_save."
        )
    return plan


def _plan_for(target: ModelTarget | None, base: Path, checkpoint: Checkpoint, folder: AdapterFolder) -> MergePlan:
    if target is not None:
        checkpoint = with_resized_bases(checkpoint, folder, live_view(checkpoint, target.model))
    checkpoint, apart = untied(base, checkpoint, folder, UNKNOWN if target is None else architecture_of(target.model))
    view = LiveView(checkpoint, {}) if target is None else live_view(checkpoint, target.model)
    layers = [name.removeprefix(PEFT_PREFIX) for name in saved_layers(folder)]
    view = replace(view, checkpoint=with_experts(view.checkpoint, layers, folder.config.get("target_parameters")))
    names = {} if target is None or not target.changes_class else _names_in_class(target.model, view)
    trained, vocabulary = _trained_in_full(folder, view.checkpoint), None
    if target is not None:
        tied = _tied(target.model) - {f"{module}.weight" for module in apart}
        trained = {name: key for name, key in trained.items() if name in view.checkpoint.files or name not in tied}
        shapes = view.checkpoint.shapes | {name: folder.shapes[key] for name, key in trained.items()}
        vocabulary = new_vocabulary(target.model, base, folder, shapes, target.options)
    return MergePlan(target, checkpoint, view, apart, trained, vocabulary, names)


def _names_in_class(model: Any, view: LiveView) -> dict[str, str | None]:
    """Get the new name of each stored tensor of a body that becomes part of a whole model; None for another's head."""
    prefix, known = f"{model.base_model_prefix}.", model.state_dict()
    names: dict[str, str | None] = {}
    for live, group in view.groups.items():
        for stored in group.stored:
            if live not in known:
                names[stored] = None
            elif live.startswith(prefix) and not stored.startswith(prefix):
                names[stored] = prefix + stored
    return names


def _nowhere(model: Any, plan: MergePlan) -> list[str]:
    """Get the parameters of the model that neither the base nor the adapter has."""
    ignored = [*(getattr(model, "_keys_to_ignore_on_load_missing", None) or []), *map(re.escape, _tied(model))]
    there = plan.checkpoint.files.keys() | plan.trained.keys()
    missing = [name for name, _ in model.named_parameters() if name not in there]
    return [name for name in missing if not any(re.search(pattern, name) for pattern in ignored)]


def _tied(model: Any) -> set[str]:
    return {*model.all_tied_weights_keys, *model.all_tied_weights_keys.values()}


def _trained_in_full(folder: AdapterFolder, base: Checkpoint) -> dict[str, str]:
    """Get name in the base -> key in the adapter's file, for what was trained in full.

    The base may lack the first parts of a name (`bert`), then the longest match counts, or have more of them than the
    adapted layers. A name that the base does not have is new.
    """
    front = ""
    for layer in saved_layers(folder):
        own = f"{layer.removeprefix(PEFT_PREFIX)}.weight"
        name = base_tensor(own.removesuffix(".weight"), base)
        front = name.removesuffix(own) if name.endswith(own) else front
    found = {}
    for key in carried_keys(folder):
        if key.endswith(".trainable_tokens_delta"):
            raise ExportError(
                f"{folder.path}: trains the vectors of single tokens (trainable_token_indices), which are not merged "
                f"file by file. Load the adapter and call merge_and_unload."
            )
        # PEFT saves the trained bias of an adapted layer under the wrapped layer's name.
        name = key.removeprefix(PEFT_PREFIX).replace(".base_layer.", ".")
        starts = (0, *(dot.end() for dot in re.finditer(r"\.", name)))
        shorter = [known for start in starts if (known := name[start:]) in base.files]
        longer = [known for known in (front + name,) if known in base.files]
        found[max(shorter or longer or [name], key=len)] = key
    return found


def saved_layers(folder: AdapterFolder) -> set[str]:
    """Get the names of the adapted layers of a saved adapter."""
    return {name.split(".spectune_adapter.")[0] for name in folder.names if ".spectune_adapter." in name}
