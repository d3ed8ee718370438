"""`resize_lora`: any plain LoRA at another rank, by exact SVD of its factors, in its original layout."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..algebra import singular_values
from ..checkpoint import LoraFile, fresh_folder, read_lora, refuse_to_replace, save_tensors, write_atomically
from ..checkpoint.lora_file import DIFFUSERS_METADATA, ENDINGS
from ..checkpoint.patterns import rank_pattern
from ..errors import ExportError, OptionError, OutputError
from ..export.lora import DTYPES
from ..records import Delta
from .calibrate import directions_of, energies, within_share
from .cut import Cut, cut_factors

# Files of a PEFT folder that would still hold the old factors, or a trainer's state that belongs to them.
OLD_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf")
# What kohya's trainer writes into the header about ranks, and the hashes of the tensors, which no longer hold.
KOHYA_RANK, KOHYA_HASHES = ("ss_network_dim", "ss_network_alpha"), ("sshs_model_hash", "sshs_legacy_hash")
# PEFT options with which B A is not the update, or a cut one not of the kind that they promise.
OTHER_UPDATES = ("use_qalora", "use_bdlora", "monteclora_config", "kasa_config", "velora_config")
OnCut = Callable[[int, int], None]
"""Called with (layers done, all layers)."""


@dataclass(frozen=True)
class ResizedLayer:
    """One layer before and after; losses are fractions of |dW|_F of the original file."""

    name: str
    old_rank: int
    rank: int
    cut: float
    """The loss from the lower rank: |dW - best of this rank|_F."""
    lost: float
    """|dW - new dW|_F, measured in the new file: the cut and the rounding to its dtype."""

    @property
    def rounding(self) -> float:
        """The loss from rounding to the dtype of the file; it is perpendicular to the cut, up to its own square."""
        return float(max(self.lost**2 - self.cut**2, 0.0) ** 0.5)


@dataclass(frozen=True)
class Resized:
    """A LoRA at another rank: its path, its layers, and both sizes."""

    path: Path
    layers: tuple[ResizedLayer, ...] = field(repr=False)
    carried: tuple[str, ...]
    """Tensors outside the updates (modules_to_save), copied."""
    bytes_before: int
    bytes_after: int

    @property
    def at_their_rank(self) -> tuple[str, ...]:
        """Layers that need no cut and stay as they are."""
        return tuple(layer.name for layer in self.layers if layer.rank == layer.old_rank)

    @property
    def worst_loss(self) -> float:
        """The largest share of an update that is lost."""
        return max(layer.lost for layer in self.layers)

    def to_json(self) -> dict[str, Any]:
        """Get everything in plain numbers and words."""
        layers = [asdict(layer) | {"rounding": layer.rounding} for layer in self.layers]
        return asdict(self) | {"path": str(self.path), "layers": layers, "worst_loss": self.worst_loss}


@torch.no_grad()
def resize_lora(
    lora: str | Path,
    output: str | Path,
    *,
    rank: int | None = None,
    energy: float | None = None,
    frobenius: float | None = None,
    share: float | None = None,
    scores: Mapping[str, torch.Tensor] | None = None,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
    on_layer: OnCut | None = None,
) -> Resized:
    """Write a LoRA with the update of every layer cut to its best approximation of a lower rank.

    dW_OI = scaling B_OP A_PI ~ B'_OR A'_RI, by QR of both factors and the SVD of the P x P middle in float64: the
    result of a dense SVD (Eckart-Young), without building dW. `rank` is the limit for every layer; `energy` keeps at
    least this share of |dW|_F^2, `frobenius` loses at most this share of |dW|_F, each layer on its own. `share` keeps
    this share of all numbers, by one threshold over all layers: the directions with the largest s_i^2 by number, or
    with the largest of `scores` (layer -> one for each direction; `calibrated` gets them from examples); a layer of
    which nothing stays is left out, and PEFT's `exclude_modules` names it. A rank is never raised: a layer that needs
    no cut keeps its rank and its numbers. The new scaling is 1.

    `lora` is PEFT's folder, which becomes a folder (rank_pattern and alpha_pattern rewritten), or one safetensors
    file of diffusers or kohya's trainer, which becomes a file of the same names (alphas and header rewritten).
    Factors keep their dtype unless `dtype` names another. Everything else is copied. One layer is in memory at a
    time, and the result; losses are measured in the written file. `ExportError` for an update that is not B A or
    not finite, `OptionError` for wrong options, `OutputError` for an output that exists (unless `overwrite`)
    and for one that would replace the LoRA.
    """
    if dtype is not None and dtype not in DTYPES:
        known = ", ".join(str(known).removeprefix("torch.") for known in DTYPES)
        raise OptionError(f"dtype={dtype}: a LoRA can only be stored as {known}. Choose one of them.")
    source, output = read_lora(lora), Path(output)
    _refuse_other_updates(source)
    cut: Cut | dict[str, list[int]]
    if share is None and scores is None:
        cut = Cut(rank=rank, energy=energy, frobenius=frobenius)
    else:
        cut = _places(source, share, scores, [rank, energy, frobenius])
    if overwrite:
        refuse_to_replace(output, source.path)
    if source.config:
        with fresh_folder(output, overwrite=overwrite) as folder:
            resizing = _Resizing(source, cut, dtype, on_layer)
            _copy_the_rest(source.path, folder)
            config = without_layers(_rescaled(source.config, resizing.ranks), resizing.gone)
            write_atomically(folder / "adapter_config.json", json.dumps(config, indent=2, sort_keys=True) + "\n")
            save_tensors(folder / "adapter_model.safetensors", resizing.tensors, source.file.metadata)
            layers = resizing.measure(folder)
    else:
        _refuse_output(output, overwrite)
        resizing = _Resizing(source, cut, dtype, on_layer)
        save_tensors(output, resizing.tensors, _header(source, resizing.ranks))
        layers = resizing.measure(output)
    written = output / "adapter_model.safetensors" if source.config else output
    return Resized(output, layers, source.carried, source.file.path.stat().st_size, written.stat().st_size)


def _places(
    source: LoraFile, share: float | None, scores: Mapping[str, torch.Tensor] | None, others: list[float | None]
) -> dict[str, list[int]]:
    """Get layer -> the directions that stay under a budget over all layers."""
    if share is None or not 0 < share <= 1:
        raise OptionError(f"share={share}: the share of numbers to keep must be above 0 and at most 1, such as 0.25.")
    if any(other is not None for other in others):
        raise OptionError("share: rank, energy and frobenius cut each layer on its own. Give them or the share.")
    shapes = source.file.shapes
    sides = {name: shapes[one.B_name][0] + math.prod(shapes[one.A_name][1:]) for name, one in source.layers.items()}
    return within_share(energies(source) if scores is None else scores, sides, share * source.trained_count)


class _Resizing:
    """The tensors of the new file, layer by layer."""

    def __init__(
        self, source: LoraFile, cut: Cut | dict[str, list[int]], dtype: torch.dtype | None, on_layer: OnCut | None
    ) -> None:
        self.source = source
        self.ranks: dict[str, int] = {}
        self.gone: list[str] = []
        """Layers of which a budget kept nothing."""
        self.cuts: dict[str, float] = {}
        used = {name for layer in source.layers.values() for name in (layer.A_name, layer.B_name)}
        self.tensors = {name: source.file.tensor(name) for name in source.file.names if name not in used}
        for done, layer in enumerate(source.layers, 1):
            self._take(layer, cut, dtype)
            if on_layer is not None:
                on_layer(done, len(source.layers))

    def _take(self, layer: str, cut: Cut | dict[str, list[int]], dtype: torch.dtype | None) -> None:
        place, file = self.source.layers[layer], self.source.file
        B_OP, A_PI = (factor.double() for factor in self.source.factors(layer))
        if not (torch.isfinite(B_OP).all() and torch.isfinite(A_PI).all()):
            raise ExportError(f"{layer}: the factors contain NaN or infinity. Train or copy the LoRA again.")
        # A power of two, as most scalings are, is exact in every dtype.
        if isinstance(cut, Cut):
            B_OR, A_RI, self.cuts[layer] = cut_factors(B_OP * place.scaling, A_PI, cut)
        elif cut[layer]:
            B_OR, A_RI, self.cuts[layer] = _chosen(self.source, layer, cut[layer])
        else:
            self.gone.append(layer)
            self.tensors.pop(_alpha_name(place.A_name), None)
            return
        rank = self.ranks[layer] = len(A_RI)
        for name, factor, first in ((place.B_name, B_OR, None), (place.A_name, A_RI, rank)):
            shape = file.shapes[name]
            sides = (shape[0], rank, *shape[2:]) if first is None else (rank, *shape[1:])
            stored = factor.to(dtype or file.dtypes[name]).reshape(sides)
            if not torch.isfinite(stored).all():
                raise ExportError(f"{layer}: the new factors are too large for {stored.dtype}. Choose dtype float32.")
            self.tensors[name] = stored
        alpha = _alpha_name(place.A_name)
        if alpha in file.shapes:
            self.tensors[alpha] = _exact(rank, file.dtypes[alpha]).reshape(file.shapes[alpha])

    def measure(self, written: Path) -> tuple[ResizedLayer, ...]:
        """Compare the written LoRA with the old one, layer by layer, both read from disk."""
        new, layers = read_lora(written), []
        for name, place in self.source.layers.items():
            if name in self.gone:
                layers.append(ResizedLayer(name, place.rank, 0, 1.0, 1.0))
                continue
            old, now = self.source.delta(name, torch.float64), new.delta(name, torch.float64)
            left_OP = torch.cat([old.left_OP, now.left_OP], dim=1)
            assert isinstance(old.core, torch.Tensor) and isinstance(now.core, torch.Tensor)
            apart = Delta(left_OP, torch.cat([old.core, -now.core]), torch.cat([old.right_QI, now.right_QI]))
            size, missed = (float(torch.linalg.vector_norm(singular_values(delta))) for delta in (old, apart))
            lost = missed / size if size else 0.0
            layers.append(ResizedLayer(name, place.rank, new.layers[name].rank, self.cuts[name], lost))
        return tuple(layers)


def _chosen(source: LoraFile, layer: str, places: list[int]) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Get the factors of some of a layer's directions, and the share of |dW|_F that the others had."""
    B_OK, A_KI = directions_of(source, layer)
    squares_K = B_OK.square().sum(0).square()
    lost = 1 - float(squares_K[places].sum() / squares_K.sum()) if squares_K.any() else 0.0
    return B_OK[:, places], A_KI[places], max(lost, 0.0) ** 0.5


def _alpha_name(A_name: str) -> str:
    stem = next(A_name.removesuffix(A_end) for A_end, _ in ENDINGS if A_name.endswith(A_end))
    return f"{stem}.alpha"


def _exact(rank: int, dtype: torch.dtype) -> torch.Tensor:
    """Get a rank as a tensor in this dtype, or in float32 where it would be rounded (300 in bfloat16)."""
    alpha = torch.tensor(rank, dtype=dtype)
    return alpha if float(alpha) == rank else torch.tensor(rank, dtype=torch.float32)


def _rescaled(options: Mapping[str, Any], ranks: Mapping[str, int]) -> dict[str, Any]:
    """Get PEFT's options with these ranks and a scaling of 1 for each of these layers."""
    r, pattern = rank_pattern(ranks)
    patterns = {"rank_pattern": pattern, "alpha_pattern": dict(pattern)}
    return {**options, "r": r, "lora_alpha": r, **patterns, "use_rslora": False}


def without_layers(options: Mapping[str, Any], gone: list[str]) -> dict[str, Any]:
    """Get PEFT's options that also leave out these layers."""
    if not gone:
        return dict(options)
    old = options.get("exclude_modules") or []
    if isinstance(old, str):  # a regex
        return {
            **options,
            "exclude_modules": "|".join([f"(?:{old})", *(rf"(?:.*\.)?{re.escape(name)}" for name in gone)]),
        }
    return {**options, "exclude_modules": sorted({*old, *gone})}


def _header(source: LoraFile, ranks: Mapping[str, int]) -> dict[str, str]:
    """Get the header of the new file: its ranks and alphas are updated."""
    header = {key: value for key, value in source.file.metadata.items() if key not in KOHYA_HASHES}
    word = str(next(iter(ranks.values()))) if len(set(ranks.values())) == 1 else "Dynamic"
    header |= {key: word for key in KOHYA_RANK if key in header}
    if DIFFUSERS_METADATA in header:
        options: dict[str, Any] = json.loads(header[DIFFUSERS_METADATA])
        for part in sorted({key.partition(".")[0] for key in options}):
            of_part = {name.removeprefix(f"{part}."): r for name, r in ranks.items() if name.startswith(f"{part}.")}
            if of_part:
                options |= {f"{part}.{key}": value for key, value in _rescaled({}, of_part).items()}
        header[DIFFUSERS_METADATA] = json.dumps(options, indent=2, sort_keys=True)
    return header


def _copy_the_rest(source: Path, target: Path) -> None:
    for path in sorted(source.iterdir()):
        if path.is_file() and path.suffix not in OLD_WEIGHTS:
            shutil.copyfile(path, target / path.name)


def _refuse_other_updates(source: LoraFile) -> None:
    for option in OTHER_UPDATES:
        if source.config.get(option):
            raise ExportError(
                f"{source.path}: with {option}, the update is not B A, so it cannot be resized. Merge it instead."
            )


def _refuse_output(output: Path, overwrite: bool) -> None:
    if output.suffix != ".safetensors":
        raise OutputError(
            f"{output}: the LoRA is a single file, so the output must be one. Give a name that ends in .safetensors."
        )
    if output.exists() and not (overwrite and output.is_file()):
        raise OutputError(f"{output}: this file already exists. Choose another name, or replace it with --overwrite.")
    if not output.parent.is_dir():
        raise OutputError(f"{output}: the folder {output.parent} does not exist. Create it first.")
