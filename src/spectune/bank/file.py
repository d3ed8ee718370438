"""A saved adapter -> its cores in the basis of a bank, checked against that basis."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from ..adapter import BASIS, SpectralModule, in_own_dtype
from ..adapter.rows import numbers_of
from ..adapter.saved import LayerRanks, refuse_misfits
from ..checkpoint import PEFT_PREFIX, TENSOR_FILE, read_adapter_folder
from ..errors import AdapterError
from ..records import Delta, SparseCore, Spectrum
from ..spectrum import align, sketch_tolerance
from ..tuner.config import SpectralConfig

MIDDLE = ".spectune_adapter."
# Sketches that differ by less describe the same basis: float32 roundoff, and no more. Chosen.
SAME_SKETCH = 1e-5
# What a turned core may lose where the bank keeps a diagonal or a pattern, as a fraction of it. Chosen: a tenth of
# what rounding the base to bfloat16 does.
LOST_SHARE = 4e-4


def cores_of(
    folder: str | Path, modules: dict[str, SpectralModule], basis_id: str | None = None
) -> dict[str, torch.Tensor]:
    """Get layer -> the numbers of the saved adapter's core in the bank's basis; `AdapterError` if it does not fit.

    The adapter must have the bank's method, options and layers. Its sketch says in which basis it was trained: the
    same (the core is used as it is), the same but rotated (the core is rotated), or that of another weight. `basis_id`
    is the shared basis file of the bank: adapters that share it are their cores.
    """
    saved = read_adapter_folder(folder).require("SPECTUNE")
    config = SpectralConfig.from_pretrained(str(folder))
    same = basis_id is not None and config.basis_id == basis_id
    tensors = _by_layer(saved.path, saved.file.names if same else saved.names)
    if tensors.keys() != modules.keys():
        different = sorted(tensors.keys() ^ modules.keys())
        raise AdapterError(
            f"{folder}: the bank adapts {len(modules)} layers and the file {len(tensors)}; only one of them has "
            f"{different[0]!r}. Load it with load_adapter."
        )
    try:
        brought = load_file(saved.path / TENSOR_FILE)  # at once: reading tensor by tensor opens the file for each
        if config.basis_id is not None and not same:
            brought |= {name: saved.tensor(name) for name in saved.names if name not in brought}
    except (SafetensorError, OSError, RuntimeError, ValueError) as error:
        raise AdapterError(f"{folder}: cannot read the tensors: {error}. Copy the file again.") from error
    cores, ranks = {}, LayerRanks(config.rank_pattern, config.target_parameters)
    for layer, module in modules.items():
        method = config.method_for(layer, ranks.of(layer), module.U_OR.shape[0], module.Vh_RI.shape[1])
        if method != module.method:
            raise AdapterError(
                f"{folder}: {layer}: the bank has {module.method}, the file has {method}. Make another bank."
            )
        cores[layer] = _core(module, {name: brought[key] for name, key in tensors[layer].items()}, same)
    return cores


def _by_layer(folder: Path, names: Iterable[str]) -> dict[str, dict[str, str]]:
    found: dict[str, dict[str, str]] = {}
    for key in names:
        layer, middle, name = key.removeprefix(PEFT_PREFIX).rpartition(MIDDLE)
        if not middle:
            raise AdapterError(
                f"{folder}: the file also holds {key!r} (modules_to_save or biases), which cannot differ between "
                "the rows of one batch. Load it with load_adapter."
            )
        found.setdefault(layer, {})[name] = key
    return found


@torch.no_grad()
def _core(module: SpectralModule, tensors: dict[str, torch.Tensor], same_basis: bool) -> torch.Tensor:
    rows_O, cols_I, _ = module.spectrum.shape
    refuse_misfits(module.method, module.name, (rows_O, cols_I), tensors, None)
    _refuse_other_names(module, tensors, same_basis)
    device, dtype = module.S_R.device, module.dtype
    for name in _places_in_file(module):
        here = module.frozen[name].cpu().long()
        if tensors[name].shape != here.shape or not torch.equal(tensors[name].long(), here):
            raise AdapterError(f"{module.name}: the file's pattern differs from the bank's. Load it with load_adapter.")
    trained = {name: tensors[name].to(device, dtype) for name in module.trained_names}
    with in_own_dtype(module.S_R):
        basis = None if same_basis else _basis_of_file(module, tensors)
        delta = module.method.delta(basis or module.spectrum, trained, module.frozen)
        return numbers_of(delta.core) if basis is None else _turned(module, basis, delta)


def _places_in_file(module: SpectralModule) -> list[str]:
    return [name for name in module.frozen_names if module.method.saves_frozen()]


def _refuse_other_names(module: SpectralModule, tensors: dict[str, torch.Tensor], same_basis: bool) -> None:
    """Raise `AdapterError` for a tensor that is missing, unexpected, or of the wrong kind of number."""
    places = _places_in_file(module)
    basis = () if same_basis else BASIS if "U_OR" in tensors else ("sketch",)
    expected = {*module.trained_names, *places, *basis}
    for name in sorted(expected ^ tensors.keys()):
        fault = "has no tensor" if name in expected else "has an unexpected tensor"
        raise AdapterError(f"{module.name}: the adapter file {fault} {name!r}. Copy it again.")
    for name, tensor in tensors.items():
        whole = name in places
        if tensor.is_floating_point() == whole or tensor.is_complex() or tensor.dtype == torch.bool:
            raise AdapterError(
                f"{module.name}: the tensor {name!r} is {str(tensor.dtype).removeprefix('torch.')}, but it must hold "
                f"{'integers' if whole else 'real numbers'}. Copy the adapter again."
            )


def _basis_of_file(module: SpectralModule, tensors: dict[str, torch.Tensor]) -> Spectrum | None:
    """Get the basis in which the file was trained, or None if it is the bank's own."""
    mine = module.spectrum
    if "sketch" in tensors:
        stored_RT, own_RT = tensors["sketch"], module.sketch
        if own_RT.shape == stored_RT.shape:
            apart = torch.linalg.vector_norm(stored_RT.to(own_RT) - own_RT)
            if float(apart) <= SAME_SKETCH * float(torch.linalg.vector_norm(own_RT)):
                return None
        theirs, unexplained = align(mine, stored_RT)
    else:
        U_OR, S_R, Vh_RI = (tensors[name].to(mine.S_R) for name in BASIS)
        theirs = Spectrum(U_OR, S_R, Vh_RI, mine.columns, mine.quality, mine.name)
        module.refuse_foreign(theirs)
        unexplained = max(_outside(U_OR, mine.U_OR), _outside(Vh_RI.mT, mine.Vh_RI.mT))
    allowed = sketch_tolerance(mine)
    if not unexplained <= allowed:
        raise AdapterError(
            f"{module.name}: the adapter was trained on another base weight: its singular vectors differ by "
            f"{unexplained:.1%} from the bank's, more than rounding explains ({allowed:.1%}). Load it on its own base."
        )
    return theirs


def _outside(theirs_OR: torch.Tensor, mine_OR: torch.Tensor) -> float:
    """Get how much of a basis, 0 to 1, lies outside the span of the bank's."""
    outside_OR = theirs_OR - mine_OR @ (mine_OR.mT @ theirs_OR)
    return float(torch.linalg.vector_norm(outside_OR)) / mine_OR.shape[1] ** 0.5


def _turned(module: SpectralModule, theirs: Spectrum, delta: Delta) -> torch.Tensor:
    """Get the core in the bank's basis: U' C Vh' = U (U^T U') C (Vh' Vh^T) Vh."""
    mine = module.spectrum
    core_RR = (mine.U_OR.mT @ theirs.U_OR) @ delta.core_matrix() @ (theirs.Vh_RI @ mine.Vh_RI.mT)
    if not isinstance(delta.core, SparseCore) and delta.core.ndim == 2:
        return core_RR
    every_R = torch.arange(len(core_RR), device=core_RR.device)
    places = (every_R, every_R)
    if isinstance(delta.core, SparseCore):
        places = (delta.core.rows_C.long(), delta.core.cols_C.long())
    numbers, rest_RR = core_RR[places], core_RR.clone()
    rest_RR[places] = 0
    lost, whole = float(torch.linalg.vector_norm(rest_RR)), float(torch.linalg.vector_norm(core_RR))
    if lost > LOST_SHARE * whole:
        raise AdapterError(
            f"{module.name}: the adapter was trained in a rotated basis (another machine or dtype of the base), so the "
            f"bank would lose {lost / whole:.1%} of its core. Load it with load_adapter."
        )
    return numbers
