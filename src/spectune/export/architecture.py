"""What the layers of a checkpoint are, told by its model class, or by the names of its tensors."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.pytorch_utils import Conv1D

from ..checkpoint import CONFIG_LIMIT
from ..checkpoint.config_limits import refuse_absurd_size
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
    """Where a tensor stands: the path of its module, and what that is."""

    module: str
    kind: str
    """`linear`, `convolution`, `embedding`, `head`; anything else cannot be adapted, and says why."""
    transposed: bool = False
    """True where a layer stores its matrix in x out."""

    def matrix(self, tensor: torch.Tensor) -> torch.Tensor:
        """Get W_OI from the stored tensor, without a copy; the kernels of a convolution are flattened."""
        return tensor.T if self.transposed else tensor.flatten(1)

    @property
    def saved_with(self) -> str:
        """The module that is saved whole for this tensor: a head with all of its parts, else the module itself."""
        parts = self.module.split(".")
        inside = [i for i, part in enumerate(parts) if part in HEADS]
        return ".".join(parts[: inside[0] + 1]) if inside else self.module


@dataclass(frozen=True)
class Architecture:
    """The layers of a model, without its weights."""

    source: str
    """The class that told them, or `tensor names` where there is none."""
    task_type: str | None
    modules: Mapping[str, Place] = field(repr=False)
    """Path -> what stands there; empty where only names are known."""
    prefix: str = ""
    """What the class calls its body (`bert`): files of the body alone lack it."""
    transforms: Sequence[Any] = field(default=(), repr=False)
    """How transformers renames and rearranges stored tensors on load."""
    tied: tuple[frozenset[str], ...] = ()
    """Groups of modules that share one weight, of which a file holds one."""

    def place(self, name: str, shape: tuple[int, ...]) -> Place:
        """Get where a tensor of the checkpoint stands."""
        renamed = self._renamed(name)
        path, _, leaf = renamed.rpartition(".")
        if not self.modules:
            return _by_name(path, leaf, shape)
        found = self._found(path)
        if found is None or not renamed:
            return Place(name.rpartition(".")[0], f"no tensor of {self.source} has this name")
        if leaf != "weight" or len(shape) < 2:
            return Place(found.module, f"the {leaf} of a layer" if found.kind in ADAPTABLE else found.kind)
        return found

    def _renamed(self, name: str) -> str:
        """Get the name in the live model; empty where transformers joins, splits or turns this tensor on load."""
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
        """Get the modules that share this one's weight, itself among them."""
        return next((group for group in self.tied if module in group), frozenset({module}))


def read_architecture(*folders: Path) -> Architecture:
    """Get the layers of the model in the first of these folders that has a config.json of a transformers class.

    The class is built without memory (meta device) and never from code that a folder brings. Where there is none,
    layers are told by the names and sides of their tensors. `ExportError` for a quantised checkpoint.
    """
    configs = {folder: read_json(path, CONFIG_LIMIT) for folder in folders if (path := folder / "config.json").exists()}
    for folder, config in configs.items():
        if config.get("quantization_config"):
            raise ExportError(
                f"{folder}: the checkpoint is quantised, so its tensors are no weights that can be subtracted. "
                f"Pass the unquantised checkpoint."
            )
    for folder, config in configs.items():
        refuse_absurd_size(folder / "config.json", config)
        named = config.get("architectures")
        kind = getattr(transformers, str(named[0]), None) if isinstance(named, list) and named else None
        if isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel):
            return _of_class(kind, folder)
    return Architecture("tensor names", None, {})


def _of_class(kind: Any, folder: Path) -> Architecture:
    try:
        config = kind.config_class.from_pretrained(folder)
        with torch.device("meta"):
            model = kind(config)
    except Exception as error:  # transformers' classes do not check their configs, and raise whatever comes of it
        line = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        raise ExportError(f"{folder}: config.json does not build a {kind.__name__}: {line}. Check it.") from error
    task = next((task for end, task in TASKS.items() if kind.__name__.endswith(end)), None)
    tied: dict[str, set[str]] = {}
    for name, source in model.all_tied_weights_keys.items():
        tied.setdefault(source, {source.rpartition(".")[0]}).add(name.rpartition(".")[0])
    groups = tuple(frozenset(group) for group in tied.values())
    transforms = get_model_conversion_mapping(model)
    return Architecture(kind.__name__, task, dict(_modules(model)), kind.base_model_prefix, transforms, groups)


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
        return "convolution" if module.groups == 1 else "a convolution in groups"
    return "embedding" if isinstance(module, nn.Embedding) else f"{type(module).__name__}"


def _by_name(path: str, leaf: str, shape: tuple[int, ...]) -> Place:
    """Get what a tensor is likely to be: no class told it."""
    if leaf != "weight" or len(shape) < 2:
        return Place(path, f"the {leaf or 'only tensor'} of a layer")
    last = path.rpartition(".")[2]
    if any(part in HEADS for part in path.split(".")):
        return Place(path, "head")
    if EMBEDDINGS.search(last) and len(shape) == 2:
        return Place(path, "embedding", transposed=True)
    return Place(path, "linear" if len(shape) == 2 else "convolution")
