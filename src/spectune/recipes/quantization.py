"""The quantisation of a base, by the libraries that transformers takes for it."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator

from ..errors import MissingExtraError, OptionError
from ..training.config import RunConfig

Quantization = Literal["none", "nf4", "int8", "int4", "fp8"]


class QuantizedRunConfig(RunConfig):
    """A run whose frozen base may be quantised."""

    new_heads: ClassVar[tuple[str, ...]] = ()
    """Names that a new head may have, which has no weights to quantise. transformers knows other heads itself."""

    quantization: Quantization = Field(
        "none",
        description="Quantise the frozen base on load: nf4 (as in QLoRA), int8 (bitsandbytes), int4, fp8 (torchao). "
        "A checkpoint that is stored quantised needs none.",
    )

    @model_validator(mode="after")
    def _needs_an_adapter(self) -> QuantizedRunConfig:
        if self.quantization != "none" and isinstance(self.adapter, str):
            raise ValueError(
                f"quantization: {self.quantization} needs an adapter that trains beside the quantised weights; "
                f"adapter: {self.adapter} has none"
            )
        return self


def quantized_loading(config: RunConfig) -> dict[str, Any]:
    """Get the options of `from_pretrained` that quantise the base of a run; none without quantization.

    The head stays as it is. nf4 also quantises its own scales (QLoRA, arXiv 2305.14314, section 3).
    """
    if not isinstance(config, QuantizedRunConfig) or config.quantization == "none":
        return {}
    how, by = config.quantization, _by_bitsandbytes if config.quantization in ("nf4", "int8") else _by_torchao
    try:
        return {"quantization_config": by(config)}
    except ImportError as error:
        raise MissingExtraError(
            f"quantization: {how} needs a library that cannot be imported ({error}). Run: pip install 'spectune[quant]'"
        ) from None


def _by_bitsandbytes(config: QuantizedRunConfig) -> Any:
    import bitsandbytes  # noqa: F401
    from transformers import BitsAndBytesConfig

    skip = list(config.new_heads) or None
    if config.quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skip)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=getattr(torch, config.dtype),
        llm_int8_skip_modules=skip,  # for four bits, too
    )


def _by_torchao(config: QuantizedRunConfig) -> Any:
    from torchao.quantization import Float8WeightOnlyConfig, Int4WeightOnlyConfig
    from transformers import TorchAoConfig

    if config.quantization == "int4" and not torch.accelerator.is_available():
        raise OptionError("quantization: int4 needs an accelerator: torchao has no kernels for a CPU. Use nf4 or int8.")
    how = Int4WeightOnlyConfig() if config.quantization == "int4" else Float8WeightOnlyConfig()
    return TorchAoConfig(how, modules_to_not_convert=list(config.new_heads) or None)
