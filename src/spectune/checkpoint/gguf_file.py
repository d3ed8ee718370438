"""One GGUF file, read lazily under the names and in the layout that transformers gives its tensors."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..errors import AdapterError, MissingExtraError, SpectuneError, nearest
from .config_limits import refuse_absurd_size
from .gguf_header import check_gguf_header


@dataclass(frozen=True)
class GgufFile:
    """The contents of one GGUF file; a tensor is dequantised to float32 when it is read.

    transformers' own tables are used (names, and the order of the rows of q and k, which llama.cpp permutes), so a
    tensor equals the one in the model that `from_pretrained(..., gguf_file=...)` makes, bit for bit.
    """

    path: Path
    shapes: dict[str, tuple[int, ...]] = field(repr=False)
    dtypes: dict[str, torch.dtype] = field(repr=False)
    _parts: dict[str, Any] = field(repr=False)
    _processor: Any = field(repr=False)
    _names: dict[str, str] = field(repr=False)

    @classmethod
    def open(cls, path: str | Path) -> GgufFile:
        """Get a file by its header; `AdapterError` if transformers cannot read it, `MissingExtraError` without gguf."""
        path = Path(path)
        try:
            import gguf
        except ImportError:
            raise MissingExtraError(
                f"{path}: reading a GGUF file needs the package gguf. Run: pip install 'spectune[gguf]'"
            ) from None
        check_gguf_header(path)
        try:
            names, processor = _tables(path)
            parts = {part.name: part for part in gguf.GGUFReader(str(path)).tensors}
        except SpectuneError:
            raise
        except Exception as error:  # two foreign parsers: whatever they raise, the file is the reason
            why = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
            raise AdapterError(f"{path}: transformers cannot read this GGUF file: {why}. Convert it first.") from error
        # GGUF counts the sides from the innermost one.
        shapes = {names[name]: tuple(map(int, reversed(part.shape))) for name, part in parts.items() if name in names}
        dtypes = dict.fromkeys(shapes, torch.float32)
        return cls(path, shapes, dtypes, parts, processor, {theirs: name for name, theirs in names.items()})

    def tensor(self, name: str, device: torch.device | str = "cpu") -> torch.Tensor:
        """Read and dequantise one tensor; `AdapterError` names similar tensors if this one is missing."""
        import gguf

        if name not in self.shapes:
            raise AdapterError(f"{self.path}: the tensor {name!r} does not exist. {nearest(name, list(self.shapes))}")
        part = self._parts[self._names[name]]
        try:
            whole = gguf.dequantize(part.data, part.tensor_type)
            done = self._processor.process(weights=whole, name=part.name, tensor_key_mapping={}, parsed_parameters={})
            tensor = torch.from_numpy(done.weights.copy())
        except Exception as error:  # as in open
            raise AdapterError(f"{self.path}: cannot dequantise the tensor {name!r}: {error}.") from error
        return tensor.to(device)


def _tables(path: Path) -> tuple[dict[str, str], Any]:
    """Get (GGUF name -> transformers' name, transformers' processor of the architecture)."""
    import transformers
    from transformers.modeling_gguf_pytorch_utils import (
        TENSOR_PROCESSORS,
        TensorProcessor,
        get_gguf_hf_weights_map,
        load_gguf_checkpoint,
    )

    about = load_gguf_checkpoint(str(path), return_tensors=False)["config"]
    refuse_absurd_size(path, about)
    processor = TENSOR_PROCESSORS.get(about["model_type"], TensorProcessor)(config=about)
    config = transformers.AutoConfig.for_model(**about)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    return get_gguf_hf_weights_map(model, processor), processor
