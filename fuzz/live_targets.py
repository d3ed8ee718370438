"""A live load: an adapter put onto a model by PEFT, which believes the config before it has seen the file."""

from __future__ import annotations

import struct
import traceback
from typing import Any

import torch
from target import Target, folder, header_of, spectral_config, tensor_bytes
from torch import nn

from spectune import SpectralConfig
from spectune.checkpoint import read_adapter_folder
from spectune.errors import SpectuneError
from spectune.tuner.attach import attach, load_attached

NAMES = ("lin0", "a_layer_of_a_long_name_that_takes_a_long_time")


class Model(nn.Module):
    """Two layers."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        for name in NAMES:
            layer = nn.Linear(8, 8, bias=False)
            layer.weight.data = torch.randn(8, 8, generator=generator)
            setattr(self, name, layer)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return getattr(self, NAMES[0])(x)


def saved(**options: Any) -> bytes:
    """Get the tensors of an adapter on all layers."""
    tuned = attach(Model(), SpectralConfig(r=2, target_modules=list(NAMES), **options))
    state = {name.replace(".default", ""): tensor for name, tensor in tuned.state_dict().items()}
    return tensor_bytes({name: tensor.contiguous() for name, tensor in state.items() if ".spectune_adapter." in name})


PLAIN, EMBEDDED = saved(), saved(save_basis="always")
CONFIGS = (
    spectral_config(target_modules=list(NAMES)),
    spectral_config(target_modules="lin.*|a_.*", exclude_modules="nothing", rank_pattern={"lin0": 2, "a.*e": 2}),
    spectral_config(target_modules=[NAMES[0]], modules_to_save=[NAMES[1]], layers_to_transform=None, bias="none"),
    spectral_config(target_modules="all-linear", save_basis="always", columns="bottom"),
    spectral_config(target_modules=r"(([a-z0-9_.]|[a-z0-9_.][a-z0-9_.])+)+X"),
    spectral_config(target_modules=list(NAMES), method="spectral_r", r=50_000, save_basis="always"),
    spectral_config(target_modules=list(NAMES), method="lidb", basis_seed=7, output_width=3, input_width=4),
    spectral_config(target_modules=list(NAMES), method="svft", pattern="banded", off_diagonals=1, basis_rank=2),
)


def load(config: bytes, tensors: bytes) -> None:
    place = folder("live", adapter_config__json=config, adapter_model__safetensors=tensors)
    read_adapter_folder(place).require("SPECTUNE")
    try:
        load_attached(Model(), place)
    except SpectuneError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:
        # PEFT has errors of its own for options and keys that it does not know; for memory there is none.
        last = traceback.extract_tb(error.__traceback__)[-1].filename
        if "spectune" in last or "alloc" in str(error) or isinstance(error, RecursionError):
            raise


def live_config(data: bytes) -> None:
    load(data, EMBEDDED if b'"always"' in data else PLAIN)


def live_header(data: bytes) -> None:
    body = PLAIN[8 + int.from_bytes(PLAIN[:8], "little") :]
    load(CONFIGS[0], struct.pack("<Q", len(data)) + data + body)


def live_targets() -> list[Target]:
    # The patterns of a config have a second, twice: choosing layers and choosing ranks.
    return [
        Target("live_config", live_config, CONFIGS, seconds=5.0),
        Target("live_header", live_header, (header_of(PLAIN),)),
    ]
