"""What the layers of a checkpoint are, from its model class, or else from the names of its tensors."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.pytorch_utils import Conv1D

from ..checkpoint import CONFIG_LIMIT
from ..checkpoint.model_class import class_named, without_memory
from ..checkpoint.reader import read_json
from ..errors import ExportError

# The parts of a path that make it an output head: what PEFT saves whole for classification and leaves out of
# "all-linear" (peft_model.py, tuners_utils.py), and the names that transformers gives to language heads.
HEADS = ("lm_head", "embed_out", "classifier", "score", "qa_outputs")
EMBEDDINGS = re.compile(r"embed|^(wte|wpe|shared|relative_attention_bias)$")
# The end of a class's name -> PEFT's task type.
TASKS = {
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}
ADAPTABLE = ("linear", "convolution", "embedding", "head")


@dataclass(frozen=True)
class Place:
    """Where a tensor belongs: the path of its module, and the kind of that module."""

    module: str
    kind: str
    """`linear`, `convolution`, `embedding`, `head`; any other text says why it cannot be adapted."""
    transposed: bool = False
    """True if the layer stores its matrix in x out."""

    def matrix(self, tensor: torch.Tensor) -> torch.Tensor:
        """Get W_OI from the stored tensor, without a copy; the kernels of a convolution are flattened."""
        return tensor.T if self.transposed else tensor.flatten(1)

    @property
    def saved_with(self) -> str:
        """The module that is saved whole for this tensor: the complete head, or else the module itself."""
        parts = self.module.split(".")
        inside = [i for i, part in enumerate(parts) if part in HEADS]
        return ".".join(parts[: inside[0] + 1]) if inside else self.module


@dataclass(frozen=True)
class Architecture:
    """The layers of a model, without its weights."""

    source: str
    """The model class that they come from, or `tensor names` without one."""
    task_type: str | None
    modules: Mapping[str, Place] = field(repr=False)
    """Path -> what is there; empty if only tensor names are known."""
    prefix: str = ""
    """The name of the class's body (`bert`), which files of only the body leave out."""
    transforms: Sequence[Any] = field(default=(), repr=False)
    """How transformers renames and rearranges stored tensors on load."""
    tied: tuple[frozenset[str], ...] = ()
    """Groups of modules that share one weight; a file stores it once."""

    def place(self, name: str, shape: tuple[int, ...]) -> Place:
        """Get the place of a tensor of the checkpoint."""
        renamed = self._renamed(name)
        path, _, leaf = renamed.rpartition(".")
        if not self.modules:
            return _by_name(path, leaf, shape)
        found = self._found(path)
        if not renamed:
            return Place(name.rpartition(".")[0], "transformers joins or splits it on load")
        if found is None:
            return Place(name.rpartition(".")[0], f"no tensor of {self.source} has this name")
        if leaf != "weight" or len(shape) < 2:
            return Place(found.module, f"the {leaf} of a layer" if found.kind in ADAPTABLE else found.kind)
        return found

    def _renamed(self, name: str) -> str:
        """Get the name in the live model; empty if transformers joins, splits or transposes this tensor on load."""
        for transform in self.transforms:
            name, matched = transform.rename_source_key(name)
            if matched is not None and hasattr(transform, "operations"):
                return ""
        return name

    def _found(self, path: str) -> Place | None:
        for known in (path, f"{self.prefix}.{path}", path.removeprefix(f"{self.prefix}.")):
            if known in self.modules:
                return self.modules[known]
        return None

    def tied_to(self, module: str) -> frozenset[str]:
        """Get the modules that share this one's weight, including itself."""
        return next((group for group in self.tied if module in group), frozenset({module}))


UNKNOWN = Architecture("tensor names", None, {})


def read_architecture(*folders: Path) -> Architecture:
    """Get the layers of the model in the first of these folders that has a config.json of a transformers class.

    The class is built without memory (meta device) and never from code in a folder. Without a class, the names and
    shapes of tensors say what the layers are. `ExportError` for a quantised checkpoint.
    """
    for folder in folders:
        if (folder / "config.json").exists() and read_json(folder / "config.json", CONFIG_LIMIT).get(
            "quantization_config"
        ):
            raise ExportError(
                f"{folder}: the checkpoint is quantised, so its tensors cannot be subtracted. Pass the unquantised "
                "checkpoint."
            )
    for folder in folders:
        if (kind := class_named(folder)) is not None:
            return architecture_of(without_memory(kind, folder))
    return UNKNOWN


def architecture_of(model: Any) -> Architecture:
    """Get the layers of a transformers model."""
    name = type(model).__name__
    task = next((task for end, task in TASKS.items() if name.endswith(end)), None)
    tied: dict[str, set[str]] = {}
    for tensor, source in model.all_tied_weights_keys.items():
        tied.setdefault(source, {source.rpartition(".")[0]}).add(tensor.rpartition(".")[0])
    groups = tuple(frozenset(group) for group in tied.values())
    transforms = get_model_conversion_mapping(model)
    return Architecture(name, task, dict(_modules(model)), model.base_model_prefix, transforms, groups)


def _modules(model: Any) -> Iterator[tuple[str, Place]]:
    output = model.get_output_embeddings()
    for path, module in model.named_modules():
        parent = model.get_submodule(path.rpartition(".")[0]) if path else None
        kind = _kind(module)
        if isinstance(parent, nn.MultiheadAttention):
            kind = "torch's MultiheadAttention never calls this layer"
        elif kind == "linear" and (module is output or any(part in HEADS for part in path.split("."))):
            kind = "head"
        yield path, Place(path, kind, isinstance(module, (Conv1D, nn.Embedding)))


def _kind(module: nn.Module) -> str:
    if isinstance(module, (nn.Linear, Conv1D)):
        return "linear"
    if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return "convolution" if module.groups == 1 else "a grouped convolution"
    return "embedding" if isinstance(module, nn.Embedding) else f"{type(module).__name__}"


def _by_name(path: str, leaf: str, shape: tuple[int, ...]) -> Place:
    """Guess what a tensor is from its name, without a model class."""
    if leaf != "weight" or len(shape) < 2:
        return Place(path, f"the {leaf or 'only tensor'} of a layer")
    last = path.rpartition(".")[2]
    if any(part in HEADS for part in path.split(".")):
        return Place(path, "head")
    if EMBEDDINGS.search(last) and len(shape) == 2:
        return Place(path, "embedding", transposed=True)
    return Place(path, "linear" if len(shape) == 2 else "convolution")
