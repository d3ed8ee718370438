"""Checkpoints of runs whose parameters are cut into parts (FSDP2): whole tensors, for any number of processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..adapter import gathered
from ..checkpoint import TensorFile
from ..errors import AdapterError

OPTIMIZER, SCHEDULER, ADAPTER_FILE = "optimizer.pt", "scheduler.pt", "adapter_model.safetensors"
# The same basis differs by roundoff in float32 (1e-6; rounded to bfloat16 up to 1e-4, where some entries round the
# other way), another one by about 1. In between, chosen.
SAME_BASIS = 1e-3
# Parts of a trained tensor's name that PEFT takes out when it saves it.
NOT_IN_FILE = ("default", "modules_to_save")


def save_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path, is_main: bool) -> None:
    """Write the optimizer's state under the names of the parameters; all processes must call it, one writes."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict

    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = get_optimizer_state_dict(model, optimizer, options=options)
    if is_main:
        torch.save(state, folder / OPTIMIZER)


def state_by_name(model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> dict[str, Any]:
    """Read an optimizer's state by names of parameters, written so or by places."""
    state = torch.load(folder / OPTIMIZER, map_location="cpu", weights_only=True)
    return state if is_by_name(state) else _renamed(state, dict(enumerate(_names(model, optimizer))))


def load_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path, sharded: bool) -> None:
    """Read an optimizer's state, written by names or by places, into an optimizer of either kind."""
    state = state_by_name(model, optimizer, folder)
    if sharded:
        from torch.distributed.checkpoint.state_dict import StateDictOptions, set_optimizer_state_dict

        set_optimizer_state_dict(model, optimizer, state, options=StateDictOptions(full_state_dict=True))
    else:
        places = {name: place for place, name in enumerate(_names(model, optimizer))}
        optimizer.load_state_dict(_renamed(state, places))


def _names(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[str]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [names[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]


def is_by_name(state: dict[str, Any]) -> bool:
    return any(isinstance(name, str) for group in state["param_groups"] for name in group["params"])


def written_by_name(folder: Path) -> bool:
    """Ask whether a checkpoint's optimizer was written by a sharded run."""
    return is_by_name(torch.load(folder / OPTIMIZER, map_location="cpu", weights_only=True, mmap=True))


def _renamed(state: dict[str, Any], names: dict[Any, Any]) -> dict[str, Any]:
    groups = [{**group, "params": [names[one] for one in group["params"]]} for group in state["param_groups"]]
    return {"state": {names[one]: values for one, values in state["state"].items()}, "param_groups": groups}


def trained_tensors(model: nn.Module, folder: Path) -> dict[str, torch.Tensor]:
    """Get an adapter's trained tensors by the names of a model whose parameters may be cut; all processes must call it.

    Bases stay as they are. `AdapterError` for a checkpoint that lacks a tensor, or that has another basis.
    """
    file, found = TensorFile.open(folder / ADAPTER_FILE), {}
    for name, parameter in model.named_parameters():
        key = _key(name)
        if parameter.requires_grad:
            shape = tuple(getattr(parameter, "ds_shape", parameter.shape))
            if key not in file.shapes or file.shapes[key] != shape:
                raise AdapterError(f"{folder}: the checkpoint has no {key} of shape {shape}. Start anew.")
            found[name] = file.tensor(key).to(parameter.dtype)
    for name, kept in [*model.named_buffers(), *model.named_parameters()]:
        if ".spectune_adapter." in name and name not in found and (key := _key(name)) in file.shapes:
            with gathered(kept):
                whole = kept.full_tensor() if hasattr(kept, "full_tensor") else kept
                refuse_other_basis(whole, file.tensor(key), f"{folder}: {key}")
    return found


def _key(name: str) -> str:
    """Get the name that a model's tensor has in its adapter's file."""
    return ".".join(part for part in name.split(".") if part not in NOT_IN_FILE)


def refuse_other_basis(here: torch.Tensor, saved: torch.Tensor, name: str) -> None:
    """Raise `AdapterError` for a frozen tensor that differs from a checkpoint's by more than roundoff.

    The trained numbers would act on other directions, and a basis in parts cannot be rotated to match.
    """
    here = here.detach().to("cpu", saved.dtype).double()  # a file may hold a basis in bfloat16
    saved = saved.double()
    if here.shape != saved.shape or not (here - saved).norm() <= SAME_BASIS * saved.norm():
        raise AdapterError(
            f"{name}: the singular vectors differ from those that the run began with (another machine or other "
            f"versions), and cannot be rotated in a sharded model. Go on with one process, with DDP, or with ZeRO-3 "
            f"and zero3_init_flag: false."
        )


def load_whole(model: nn.Module, state: dict[str, Any], strict: bool = True) -> None:
    """Read whole tensors into a model, cut as its parameters are; every process has them all."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    set_model_state_dict(model, state, options=StateDictOptions(full_state_dict=True, strict=strict))
