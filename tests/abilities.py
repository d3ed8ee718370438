"""What the installed torch, PEFT and transformers can do, so that tests of what an old one cannot are skipped."""

from __future__ import annotations

import functools
import io

import pytest
import torch
from packaging.version import InvalidVersion, Version
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import __version__ as transformers_version
from transformers.utils import is_gguf_available

# torch 2.6's fully_shard asks streams for events that those of a CPU do not give.
FSDP2_ON_A_CPU = hasattr(torch.cpu.Stream(), "record_event")
needs_fsdp2_on_a_cpu = pytest.mark.skipif(not FSDP2_ON_A_CPU, reason="fully_shard of this torch does not run on a CPU")


def _loads_onto_cpu_0() -> bool:
    file = io.BytesIO()
    torch.save(torch.zeros(1), file)
    file.seek(0)
    try:
        torch.load(file, map_location="cpu:0")
    except RuntimeError:
        return False
    return True


# transformers loads an optimizer's state onto the device of the process, which torch 2.6 cannot where that is "cpu:0".
RESUMES_ON_SEVERAL_CPUS = _loads_onto_cpu_0()
# Until then `model.load_adapter` of transformers passes over fully trained modules (seen from 5.6 to 5.17).
LOADS_MODULES_NATIVELY = Version(transformers_version) >= Version("5.18")


@functools.cache
def refuses_an_adapted_lm_head() -> bool:
    """Ask whether trl's DPO reads the weight of `lm_head`, and so refuses an adapter there; 1.14 runs the layer."""
    from trl.trainer import dpo_trainer

    return hasattr(dpo_trainer, "add_fused_lm_head")


def _reads_gguf() -> bool:
    try:
        return bool(is_gguf_available())
    except InvalidVersion:  # an older transformers does not find gguf's version on Python 3.10
        return False


needs_gguf = pytest.mark.skipif(not _reads_gguf(), reason="this transformers does not read GGUF here")


@functools.cache
def _peft_compiles() -> bool:
    model = get_peft_model(nn.Sequential(nn.Linear(4, 4)), LoraConfig(target_modules=["0"]))
    try:
        torch.compile(model, backend="eager", fullgraph=True)(torch.zeros(1, 4))
    except torch._dynamo.exc.Unsupported:
        return False
    return True


def start_compiling() -> None:
    """Forget what earlier tests compiled (torch allows a few); skip where no PEFT model compiles in one graph."""
    torch._dynamo.reset()
    if not _peft_compiles():
        pytest.skip("this torch does not compile PEFT's own forward in one graph")
