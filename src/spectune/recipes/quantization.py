"""The quantisation of a base, by the libraries that transformers takes for it."""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field, model_validator

from ..errors import MissingExtraError, OptionError
from ..training.config import RunConfig

Quantization = Literal["none", "nf4", "int8", "int4", "fp8"]


class QuantizedRunConfig(RunConfig):
    """A run whose frozen base may be quantised."""

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

    The head stays as it is: transformers leaves the last layer alone. nf4 also quantises its own scales (QLoRA, arXiv
    2305.14314, section 3).
    """
    how: Quantization = getattr(config, "quantization", "none")
    if how == "none":
        return {}
    try:
        return {"quantization_config": _by_bitsandbytes(how, config) if how in ("nf4", "int8") else _by_torchao(how)}
    except ImportError as error:
        raise MissingExtraError(
            f"quantization: {how} needs a library that cannot be imported ({error}). Run: pip install 'spectune[quant]'"
        ) from None


def _by_bitsandbytes(how: Quantization, config: RunConfig) -> Any:
    import bitsandbytes  # noqa: F401
    from transformers import BitsAndBytesConfig

    if how == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=getattr(torch, config.dtype),
    )


def _by_torchao(how: Quantization) -> Any:
    from torchao.quantization import Float8WeightOnlyConfig, Int4WeightOnlyConfig
    from transformers import TorchAoConfig

    if how == "int4" and not torch.accelerator.is_available():
        raise OptionError("quantization: int4 needs an accelerator: torchao has no kernels for a CPU. Use nf4 or int8.")
    return TorchAoConfig(Int4WeightOnlyConfig() if how == "int4" else Float8WeightOnlyConfig())
