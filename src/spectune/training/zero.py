"""DeepSpeed's ZeRO: whole tensors out of its parts and back, for files that every engine can read.

DeepSpeed's own checkpoints are pickles, for as many processes as wrote them. Nothing here writes or reads one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import nn

from ..adapter import gathered, spectral_modules
from ..errors import OptionError, one_line

Named = Sequence[Sequence[tuple[str, nn.Parameter]]]
"""The trained parameters with their names, by groups of the optimizer."""


@contextmanager
def cut_while_loading() -> Iterator[None]:
    """Have transformers cut the model that is loaded in this block, if accelerate's file says `zero3_init_flag: true`.

    Without, every process holds the whole base until ZeRO-3 cuts it before the first step.
    """
    from accelerate.utils import parse_flag_from_env

    if not (parse_flag_from_env("ACCELERATE_USE_DEEPSPEED") and parse_flag_from_env("ACCELERATE_DEEPSPEED_ZERO3_INIT")):
        yield
        return
    from accelerate import DeepSpeedPlugin
    from accelerate.utils import gather_object

    plugin = DeepSpeedPlugin()
    plugin.set_deepspeed_weakref()  # transformers asks for it, and the plugin keeps it
    raised: Exception | None = None
    try:
        yield
    except Exception as error:
        raised = error
    finally:
        load_whole_models()
    # Only the first process reads the file; the others would wait for it. transformers 5.23 does not replace a head for
    # other classes then, and says "size mismatch".
    failures = [words for words in gather_object([raised and one_line(raised)]) if words]
    if raised is not None and "size mismatch" not in failures[0]:
        raise raised
    if failures:
        raise OptionError(
            f"model: cannot be loaded under zero.Init: {failures[0]}. Set zero3_init_flag: false in accelerate's file "
            f"(examples/accelerate/zero3.yaml)."
        )


def refuse_examples_first(model: nn.Module, head_first: bool, needed: str) -> None:
    """Raise `OptionError` for a model that ZeRO-3 has cut where something reads examples before the first step."""
    asked = "training.head_first" if head_first else f"adapter.{needed}" if needed else ""
    if asked and any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        raise OptionError(
            f"{asked} runs the model before the first step, and under zero.Init no process has all of it. Set "
            f"zero3_init_flag: false in accelerate's file (examples/accelerate/zero3.yaml)."
        )


def count(parameter: torch.Tensor) -> int:
    """Get how many numbers a parameter has, also where ZeRO-3 has cut it."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def load_whole_models() -> None:
    """Keep transformers from cutting the models that this process loads from now on, as it does during ZeRO-3."""
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()


def gather_by_layer(model: nn.Module) -> None:
    """Have ZeRO-3 gather an adapted layer's weight, bases and numbers for its forward; call it before it cuts them.

    It gathers what belongs to the very module whose forward runs, and an adapted layer reads the tensors of its base
    and of its adapters itself.
    """
    import deepspeed

    for path in dict.fromkeys(path for path, _, _ in spectral_modules(model)):
        layer = model.get_submodule(path)
        if getattr(layer, "weight_is_read", False):
            raise OptionError(
                f"{path}: the model's code reads this weight outside of its layer, where ZeRO-3 does not gather it. "
                f"Remove it from target_modules, or use ZeRO-2 or DDP."
            )
        for parameter in layer.parameters():
            deepspeed.zero.register_external_parameter(layer, parameter)


def whole_state(model: nn.Module, is_main: bool) -> dict[str, torch.Tensor]:
    """Get a model's state dict on the main process, one gathered tensor after the other; all processes must call it.

    Without the frozen weights of an adapter's base, of which its file may contain the embeddings alone.
    """
    embeddings = set(_embeddings(model))
    prefix = getattr(getattr(model, "base_model", None), "prefix", "") if hasattr(model, "peft_config") else None
    found: dict[str, torch.Tensor] = {}
    whole: dict[int, torch.Tensor] = {}  # tied weights stay one tensor
    for name, tensor in model.state_dict(keep_vars=True).items():
        frozen = isinstance(tensor, nn.Parameter) and not tensor.requires_grad
        if frozen and prefix is not None and id(tensor) not in embeddings and not (prefix and prefix in name):
            continue
        if id(tensor) not in whole:
            with gathered(tensor):
                whole[id(tensor)] = tensor.detach().to("cpu", copy=True) if is_main else torch.empty(0)
        found[name] = whole[id(tensor)]
    return found if is_main else {}


def _embeddings(model: nn.Module) -> Iterator[int]:
    for ask in ("get_input_embeddings", "get_output_embeddings"):
        with suppress(AttributeError, NotImplementedError):  # a model of pictures
            yield from map(id, getattr(model, ask)().parameters())


def load_parameters(model: nn.Module, state: dict[str, torch.Tensor], is_main: bool) -> None:
    """Read whole tensors into a model whose parameters may be cut; all processes must call it."""
    for name, tensor in model.state_dict(keep_vars=True).items():
        if name in state:
            with torch.no_grad(), gathered(tensor, writes=True):
                if is_main or not hasattr(tensor, "ds_id"):
                    tensor.copy_(state[name])


def parts_of(zero: Any) -> list[torch.Tensor]:
    """Get the flat tensors that this process's optimizer holds; `OptionError` for an optimizer of another kind."""
    for name in ("single_partition_of_fp32_groups", "fp32_partitioned_groups_flat"):  # stages 1 and 2, stage 3
        if hasattr(zero, name):
            return list(getattr(zero, name))
    raise OptionError(
        f"accelerate: DeepSpeed trains with a {type(zero).__name__}, whose state cannot be saved for resuming. "
        f"Use zero_stage 2 or 3 (examples/accelerate)."
    )


def optimizer_state(zero: Any, groups: Named, is_main: bool) -> dict[str, Any]:
    """Get the optimizer's state by names of parameters, as torch's own; all processes must call it."""
    from deepspeed.utils import safe_get_full_optimizer_state

    _link(zero)
    first = parts_of(zero)[0]
    held = zero.optimizer.state[first]
    cut = [key for key, value in held.items() if torch.is_tensor(value) and value.shape == first.shape]
    counts = {key: torch.as_tensor(value, dtype=torch.float32) for key, value in held.items() if key not in cut}
    state: dict[str, Any] = {}
    for name, parameter in (pair for group in groups for pair in group):
        values = {key: safe_get_full_optimizer_state(parameter, key) for key in cut}
        if is_main:
            shape = getattr(parameter, "ds_shape", parameter.shape)
            # A count of its own for each: torch's optimizers count in place.
            own = {key: count.clone() for key, count in counts.items()}
            state[name] = own | {key: value.reshape(shape).cpu() for key, value in values.items()}
    options = [{key: value for key, value in g.items() if key != "params"} for g in zero.optimizer.param_groups]
    named = [{**one, "params": [name for name, _ in group]} for one, group in zip(options, groups, strict=True)]
    return {"state": state, "param_groups": named}


def load_optimizer_state(zero: Any, groups: Named, state: dict[str, Any]) -> None:
    """Read whole state, by names of parameters, into this process's parts."""
    from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

    values, named = state["state"], [pair for group in groups for pair in group]
    name, parameter = named[0]
    shape = getattr(parameter, "ds_shape", parameter.shape)
    cut = [key for key, value in values[name].items() if key != "step" and value.shape == shape]
    counts = {key: value for key, value in values[name].items() if key not in cut}
    if type(zero.optimizer).__module__.startswith("deepspeed"):  # its Adam for CPUs counts in Python
        counts = {key: int(value) for key, value in counts.items()}
    for part in parts_of(zero):
        copies = {key: value.clone() if torch.is_tensor(value) else value for key, value in counts.items()}
        zero.optimizer.state[part] = copies | {key: torch.zeros_like(part) for key in cut}
    _link(zero)
    for name, parameter in named:
        for key in cut:
            value = values[name][key].to(zero.optimizer.state[parts_of(zero)[0]][key])
            if hasattr(parameter, "ds_id"):
                safe_set_local_optimizer_state(parameter, _part(parameter, value), key)
            else:
                safe_set_full_optimizer_state(parameter, value, key)
    for mine, saved in zip(zero.optimizer.param_groups, state["param_groups"], strict=True):
        mine.update({key: value for key, value in saved.items() if key != "params"})


def _link(zero: Any) -> None:
    """Have stages 1 and 2 find the state of each parameter in its part.

    DeepSpeed 0.19 does it once, after the first group's first step, when the other groups have no state.
    """
    if hasattr(zero, "_lazy_init_hp_params_optimizer_state"):
        zero._hp_optimizer_states_linked = False
        zero._lazy_init_hp_params_optimizer_state()


def _part(parameter: Any, whole: torch.Tensor) -> torch.Tensor:
    """Get this process's part of a whole tensor; the last part is filled up with zeros."""
    size = parameter.ds_tensor.numel()
    mine = whole.flatten()[size * parameter.ds_zero_partition_rank :][:size]
    return torch.nn.functional.pad(mine, (0, size - mine.numel()))


def names_by_group(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[list[tuple[str, nn.Parameter]]]:
    """Get the named parameters of each group of an optimizer that DeepSpeed has not yet wrapped."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for group in optimizer.param_groups:
        yield [(names[id(parameter)], parameter) for parameter in group["params"]]
