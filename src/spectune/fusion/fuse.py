"""The public door of the room: `fuse`, and what it gives back."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..adapter.base_names import base_tensor, by_live_names
from ..checkpoint import Base, Checkpoint, refuse_to_replace
from ..errors import AdapterError, OptionError
from ..records import Delta
from .adapters import Adapter, common_base, open_adapters
from .agreement import common_carried, common_config, without_heads
from .behind import fuse_behind
from .choice import AUTO, choose_rule
from .contract import Fusion, Part
from .experts import expert_parameters, refuse_lora_of_experts
from .folder import Saved, save_lora, save_spectral
from .layers import Layers
from .overlap import LayerOverlap, OverlapReport, PairOverlap, kept_strengths, pair_overlaps
from .same_base import check_same_base
from .spectral import pad
from .table import build_fusion
from .walk import Inputs


@dataclass(frozen=True, eq=False)
class Fused:
    """One adapter made of several, in memory: its updates, and a report of how the parts overlap."""

    report: OverlapReport
    parts: dict[str, Part] = field(repr=False)
    """Layer -> the fused update."""
    config: dict[str, Any] = field(repr=False)
    """The settings on which the adapters' configs agree."""
    carried: dict[str, torch.Tensor] = field(repr=False)
    """Modules trained in full, equal in all adapters."""
    sources: tuple[Path, ...] = field(repr=False)
    """The folders of the adapters and of the base; saving never replaces them."""

    @property
    def deltas(self) -> dict[str, Delta]:
        """Layer -> the update dW_OI in factors, float64."""
        return {layer: part.delta for layer, part in self.parts.items()}

    @property
    def is_spectral(self) -> bool:
        """Whether the result is again a spectral_a adapter."""
        return all(part.method is not None and part.method.direction_axes() for part in self.parts.values())

    def save(
        self,
        output_dir: str | Path,
        *,
        as_lora: bool = False,
        max_rank: int | None = None,
        allow_lossy: bool = False,
        pad: bool = True,
        overwrite: bool = False,
    ) -> Saved:
        """Write an adapter folder: spectral_a if the rule gives one, otherwise (or `as_lora`) a LoRA that PEFT loads.

        A spectral_a folder contains its directions, bit for bit those of the parts. A LoRA's rank in each layer is
        that of the update: stacked factors are reduced by QR if that loses nothing, and padded with zeros to the
        largest, as servers want it (`pad=False` leaves that). `max_rank` cuts further and
        needs `allow_lossy`; `Saved.lost` says how much. `OutputError` for an output folder that is not empty, or
        that would replace an adapter or the base; `ExportError` for a cut that was not allowed, `OptionError` for
        cutting a spectral_a adapter.
        """
        refuse_to_replace(output_dir, *self.sources)
        if self.is_spectral and not as_lora:
            if max_rank is not None:
                raise OptionError(
                    f"max_rank={max_rank}: a spectral_a adapter cannot be cut. Save it with as_lora=True (--as-lora)."
                )
            return save_spectral(output_dir, self.parts, self.config, self.carried, overwrite)
        return save_lora(output_dir, self.parts, self.config, self.carried, max_rank, allow_lossy, overwrite, pad)


@torch.no_grad()
def fuse(
    adapters: Sequence[str | Path],
    *,
    rule: str = "spectral",
    weights: Sequence[float] | float | None = None,
    base: str | Path | None = None,
    allow_overlap: bool | None = None,
    activations: Sequence[Mapping[str, torch.Tensor]] | None = None,
    eps: float | None = None,
    model: nn.Module | None = None,
    examples: Sequence[Sequence[Inputs]] | None = None,
    keep: Sequence[Inputs] | None = None,
    rank: int | None = None,
    density: float | None = None,
    common: float | None = None,
    heads_apart: bool = False,
    on_layers: Callable[[int, int], Any] | None = None,
) -> Fused:
    """Get one adapter out of several saved ones, with a report of how much they overlap; `.save(folder)` writes it.

    `adapters` are folders of spectral adapters or of PEFT LoRAs, trained on one base; `rule` is one of FUSIONS, or
    auto, which chooses by what is given and says why (`report.why`).
    `weights` is one number each, or one for all; None is 1 for task_singular, isotropic, core, aligned_ties and
    calibrated, else 1/N. With rule="spectral" and weights=1 every adapter keeps its tuned columns exactly when no two
    share one. `base` (named as for `find_base`; None: what the adapters name, if it is on this machine) proves that
    all belong to it; a file that keeps only a sketch of its directions needs it.
    `activations` and `eps` belong to rule="gradient": the result of `collect_grams` for each adapter. All updates
    are in memory as factors in float64, and one base weight is read at a time.
    The rules `match` and `sequential` run the base `model` (not changed) over `examples`, a list of batches for each
    adapter (some 64 to 256 examples, no labels), layer by layer behind what is merged; `keep` are batches of neutral
    use whose outputs the merge should leave alone, `rank` that of match's result. `density` belongs to core and
    aligned_ties, `common` to isotropic. `on_layers` is told of the progress.
    Modules that the adapters trained in full, such as heads, must be equal; `heads_apart` leaves them out.

    `AdapterError` names the layer and the reason: different bases, shapes, clashing columns (unless
    `allow_overlap=True`), methods that the rule does not accept. `OptionError` for options that the rule does not use.
    """
    if not adapters:
        raise OptionError("no adapters to fuse. Name at least one.")
    options = {"allow_overlap": allow_overlap, "eps": eps, "rank": rank, "density": density, "common": common}
    known = {name: value for name, value in options.items() if value is not None}
    chosen, why = None if rule == AUTO else build_fusion(rule, known), ""
    opened = open_adapters(adapters)
    _check_counts(opened, activations, examples)
    if chosen is not None:
        _check_looks(chosen, model, examples, keep, activations)
        if rule != "spectral":
            refuse_lora_of_experts(opened, f"rule {rule!r}")
    found = common_base(opened, base)
    adapted = [layer for adapter in opened for layer in adapter.layers]
    checkpoint = None if found is None else by_live_names(found.checkpoint, adapted, expert_parameters(opened))
    layers = Layers(opened, checkpoint, activations)
    foreign = max(check_same_base(parts) for parts in layers.values())
    if chosen is None:
        by_data = "match" if examples is not None else "gradient" if activations is not None else None
        rule, why = choose_rule(layers, by_data)
        if rule != "spectral":
            refuse_lora_of_experts(opened, f"rule {rule!r}")
        chosen = build_fusion(rule, known)
        _check_looks(chosen, model, examples, keep, activations)
    config, carried = common_config(opened, layers, found), {} if heads_apart else common_carried(opened)
    if heads_apart:
        config |= without_heads(config)
    shares = _weights(opened, 1.0 if weights is None and chosen.whole_weights else weights)
    report = _Report(chosen.name, opened, shares, _proof(opened, found, foreign), why)
    if model is not None and examples is not None:
        own = {adapter.name: batches for adapter, batches in zip(opened, examples, strict=True)}
        fused = fuse_behind(chosen, model, layers, shares, own, keep or (), on_layers)
        for layer, parts in layers.items():
            report.add(parts, fused[layer])
    else:
        fused = {}
        for layer, parts in layers.items():
            fused[layer] = chosen.fuse(parts, [shares[part.adapter] for part in parts])
            report.add(parts, fused[layer])
            if on_layers is not None:
                on_layers(len(fused), len(layers))
    if rule == "spectral":
        fused = _on_equal_columns(fused, checkpoint)
    read = [adapter.folder.path for adapter in opened] + ([] if found is None else [found.path])
    sources = tuple(path.absolute() for path in read)
    return Fused(report.finished(), fused, config, carried, sources)


def _weights(adapters: Sequence[Adapter], weights: Sequence[float] | float | None) -> dict[str, float]:
    if weights is None:
        weights = 1 / len(adapters)
    given = [float(weights)] * len(adapters) if isinstance(weights, (int, float)) else [float(w) for w in weights]
    if len(given) != len(adapters) or not all(math.isfinite(weight) for weight in given):
        raise OptionError(f"weights={given}: expected {len(adapters)} finite numbers, one for each adapter.")
    return {adapter.name: weight for adapter, weight in zip(adapters, given, strict=True)}


def _check_counts(
    adapters: Sequence[Adapter],
    activations: Sequence[Mapping[str, torch.Tensor]] | None,
    examples: Sequence[Sequence[Inputs]] | None,
) -> None:
    if activations is not None and len(activations) != len(adapters):
        raise OptionError(
            f"activations: {len(activations)} were given for {len(adapters)} adapters. Give one for each adapter."
        )
    if examples is not None and (len(examples) != len(adapters) or not all(len(batches) for batches in examples)):
        raise OptionError(
            f"examples: {len(examples)} lists of batches were given for {len(adapters)} adapters. Give one for each, "
            f"none of them empty."
        )


def _check_looks(
    rule: Fusion,
    model: nn.Module | None,
    examples: Sequence[Sequence[Inputs]] | None,
    keep: Sequence[Inputs] | None,
    activations: Sequence[Mapping[str, torch.Tensor]] | None,
) -> None:
    if activations is not None and rule.name != "gradient":
        raise OptionError(f"activations: rule {rule.name!r} does not use them. Leave them out, or use rule='gradient'.")
    if not rule.behind and (model is not None or examples is not None or keep is not None):
        raise OptionError(
            f"model, examples and keep: rule {rule.name!r} does not use them. Leave them out, or use rule='match'."
        )
    if rule.behind and (model is None or examples is None):
        raise OptionError(
            f"rule {rule.name!r} looks at what the merged model does with each adapter's examples. Pass model=the base "
            f"and examples=[batches of each adapter], or --examples on the command line."
        )


def _on_equal_columns(fused: dict[str, Part], base: Checkpoint | None) -> dict[str, Part]:
    """Get the same updates with the same columns in every layer that has them, which one config can then name."""
    union = sorted({column for part in fused.values() for column in part.columns})
    equal = {}
    for layer, part in fused.items():
        present = [column for column in union if column < min(part.delta.shape)]
        missing = [column for column in present if column not in part.columns]
        if missing and base is None:
            raise AdapterError(
                f"{layer}: columns {missing} were tuned in other layers only, and giving this layer the same ones "
                "(with zeros) takes the base. Pass --base FOLDER."
            )
        if missing and base is not None:
            stored = base.tensor(base_tensor(layer, base))
            part = pad(part, present, stored.T if part.stored.transposed else stored.flatten(1))
        equal[layer] = part
    return equal


class _Report:
    """The overlap report, put together layer after layer."""

    def __init__(self, rule: str, adapters: Sequence[Adapter], weights: dict[str, float], proof: str, why: str) -> None:
        self.rule, self.weights, self.proof, self.why = rule, weights, proof, why
        self.pairs: list[PairOverlap] = []
        self.rows: list[LayerOverlap] = []
        self.sums = {adapter.name: [0.0, 0.0] for adapter in adapters}

    def add(self, parts: Sequence[Part], fused: Part) -> None:
        self.pairs += pair_overlaps(parts)
        strengths = kept_strengths(parts, fused.compact)
        for name, (shared, own) in strengths.items():
            self.sums[name][0] += shared
            self.sums[name][1] += own
        kept = {name: shared / own if own else 1.0 for name, (shared, own) in strengths.items()}
        self.rows.append(LayerOverlap(fused.layer, len(fused.compact.S_P), kept))

    def finished(self) -> OverlapReport:
        total = {name: shared / own if own else 1.0 for name, (shared, own) in self.sums.items()}
        names, weights = tuple(self.weights), tuple(self.weights.values())
        return OverlapReport(
            self.rule, names, weights, self.proof, tuple(self.pairs), tuple(self.rows), total, self.why
        )


def _proof(adapters: Sequence[Adapter], base: Base | None, foreign: float) -> str:
    loras = [adapter.name for adapter in adapters if adapter.lora is not None]
    said = "; for a LoRA, only names and shapes can be compared" if loras else ""
    if base is not None:
        return f"checked on {base.name}, layer by layer{said}"
    if len(loras) == len(adapters):
        return "names and shapes agree; a LoRA has nothing else to compare"
    return f"the saved directions fit one base (misfit {foreign:.2g}; unrelated weights give 1){said}"
