"""A pretended accelerator: no number exists on it, but every tensor there knows that it is not on the CPU.

`torch.device("pretended")` is a device of our own name (torch's PrivateUse1), and its tensors are those of torch's
`FakeTensorMode`: they have a shape, a dtype and a device, and no values. Two faults that a CPU hides and a GPU shows
raise an error here: a tensor that a layer makes on the CPU by mistake, and a value that Python reads and so has to
wait for the device.

It changes torch for the whole process (`torch.accelerator` finds a device), so a test runs it in one of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import get_peft_model
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from spectune.training.muon import SpectralMuon

from ..models import Tiny
from ..tuner.conftest import config_for

NAME = "pretended"
# Methods without singular directions have no decay of their own.
NO_DECAY = ("lidb", "orthogonal_adaptation")


def register() -> None:
    """Make the device known to torch."""
    _setup_privateuseone_for_python_backend(NAME)


@contextmanager
def on_device(model: nn.Module) -> Iterator[None]:
    """Move a model to the pretended device; tensors that are made in the block have no values either."""
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        with FakeTensorMode(allow_non_fake_inputs=False):
            model._apply(lambda tensor: torch.empty(tensor.shape, dtype=tensor.dtype, device=NAME))
            yield
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)


def like(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Get an input's stand-in on the device."""
    return torch.empty(tensor.shape, dtype=dtype if tensor.is_floating_point() else tensor.dtype, device=NAME)


def train_two_steps(tiny: Tiny, method: str, dtype: torch.dtype, muon: bool = False, **more: Any) -> None:
    """Attach and run once on the CPU, then take two whole steps on the device; everything trained must be there."""
    dynamics = {"grad_norm": "rms"} | ({} if method in NO_DECAY else {"singular_decay": 0.1})
    model: Any = get_peft_model(tiny.fresh().to(dtype), config_for(tiny, method, **dynamics, **more)).train()
    inputs = {name: value.to(dtype) if value.is_floating_point() else value for name, value in tiny.inputs().items()}
    model(**inputs)
    with on_device(model):
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer: torch.optim.Optimizer = torch.optim.AdamW(trained, lr=1e-3, weight_decay=0.0)
        if muon:  # the sizes of steps are read from the weight before the first step, on any device
            optimizer = SpectralMuon([{"params": trained, "sizes": [1.0] * len(trained)}])
        for _ in range(2):
            found = model(**{name: like(value, dtype) for name, value in inputs.items()})
            (found if isinstance(found, torch.Tensor) else found.logits).float().sum().backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)
        places = {tensor.device.type for tensor in (*trained, *(p.grad for p in trained), *model.buffers())}
        assert trained and places == {NAME}, places
