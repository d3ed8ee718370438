"""`extract_adapter`: a LoRA or a `spectral_a` adapter from a full fine-tune, one weight at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..checkpoint import Checkpoint, find_base, fresh_folder, refuse_to_replace
from ..errors import ExportError, LeftOutError, OptionError, nearest
from ..export.architecture import ADAPTABLE, Architecture, Place, read_architecture
from ..export.lora import DTYPES
from ..export.lora_config import target_modules
from .cut import Cut
from .drafts import Draft, Fit, LoraDraft, SpectralDraft, write_draft
from .extracted import Extracted, ExtractedLayer, RestTensor
from .pairs import Pairs, pair
from .rest import Rest, saved_whole

FORMS = (LoraDraft.form, SpectralDraft.form)
DEFAULT_RANK = 8  # PEFT's and spectral_a's own default
OnWeight = Callable[[str, int, int], None]
"""Called with (what is being done, weights done, all weights)."""


@torch.no_grad()
def extract_adapter(
    base: str | Path,
    tuned: str | Path,
    output_dir: str | Path,
    *,
    to: str = "lora",
    rank: int | None = None,
    energy: float | None = None,
    frobenius: float | None = None,
    columns: Any = None,
    embeddings: bool = False,
    save_rest: bool = False,
    exclude: Iterable[str] = (),
    dtype: torch.dtype = torch.float32,
    overwrite: bool = False,
    on_weight: OnWeight | None = None,
) -> Extracted:
    """Write an adapter that turns BASE into TUNED as closely as its form allows, and measure how closely.

    For every linear layer and convolution that differs, dW_OI = W_tuned - W_base in float32 (kernels flattened):

    - `to="lora"`: the best B_OP A_PI of rank `rank` (Eckart-Young), factors balanced, scaling 1. `energy` keeps at
      least this share of |dW|_F^2 per layer, `frobenius` loses at most this share of |dW|_F; `rank` is then a limit.
      `dtype` is that of the factors.
    - `to="spectral_a"`: the best (U + A_U) diag(S) (Vh + A_Vh) on `rank` directions of the base weight (`columns`, by
      default the top ones), see `fit_spectral_a`. Exact for a model that spectral_a tuned in these directions.

    `base` and `tuned` are models of equal tensors, named as for `find_base`; `exclude` names modules or tensors to
    leave out. `embeddings` also adapts embeddings and output heads. What changes outside of the adapted layers is
    listed in `Extracted.rest`; `save_rest` saves it whole beside the adapter (modules_to_save, and bias="all" where
    biases of adapted layers changed). One weight of each model is in memory at a time.

    The figures are measured in the written file, against both models. `ExportError` for models that are equal or do
    not match, changes only outside adaptable layers, quantised checkpoints, and a written file that is further off
    than rounding explains; `OptionError` for options that do not go together.
    """
    draft = _draft(to, rank, energy, frobenius, columns, dtype)
    before, after = find_base(base), find_base(tuned)
    base_model, tuned_model = before.checkpoint, after.checkpoint
    architecture = read_architecture(*(model.path for model in (after, before) if model.path.is_dir()))
    pairs = pair(base_model, tuned_model, exclude, allow_new=save_rest)
    if embeddings:
        _refuse_tied(architecture, tuned_model)
    work = _Work(base_model, tuned_model, architecture, pairs, embeddings, on_weight or (lambda *_: None))
    if overwrite:
        refuse_to_replace(output_dir, before.path, after.path)
    with fresh_folder(output_dir, overwrite=overwrite) as folder:
        work.compare(draft)
        _refuse_nothing(work, draft)
        saved = saved_whole(work.rest, architecture, tuned_model, draft.ranks) if save_rest else Rest()
        paths = set(architecture.modules) or _parents(tuned_model.names)
        shared = {
            "base_model_name_or_path": before.name,
            "task_type": architecture.task_type,
            "target_modules": target_modules(sorted(draft.ranks), paths, list(saved.modules)),
            "modules_to_save": list(saved.modules) or None,
            "bias": "all" if saved.biases else "none",
        }
        write_draft(draft, folder, saved.tensors, shared)
        layers = tuple(work.prove(draft, folder))
        size = (folder / "adapter_model.safetensors").stat().st_size
    rest = tuple(RestTensor(t.name, t.why, t.change, t.relative, t.name in saved.names) for t in work.rest)
    dtypes = tuple(_dtype_of(model) for model in (base_model, tuned_model))
    return Extracted(
        Path(output_dir),
        draft.form,
        layers,
        rest,
        tuple(work.unchanged),
        pairs.excluded,
        architecture.source,
        dtypes,
        size,
    )


def _draft(to: str, rank: int | None, energy: float | None, frobenius: float | None, columns: Any, dtype: Any) -> Draft:
    if to == LoraDraft.form:
        if columns is not None:
            raise OptionError(
                f"columns={columns} are singular directions of the base, which only spectral_a uses. Leave them out."
            )
        if dtype not in DTYPES:
            known = ", ".join(str(known).removeprefix("torch.") for known in DTYPES)
            raise OptionError(f"dtype={dtype}: a LoRA can only be stored as {known}. Choose one of them.")
        only_rank = DEFAULT_RANK if (rank, energy, frobenius) == (None, None, None) else rank
        return LoraDraft(Cut(rank=only_rank, energy=energy, frobenius=frobenius), dtype)
    if to != SpectralDraft.form:
        raise OptionError(f"to={to!r}: only lora and spectral_a can be extracted. {nearest(to, FORMS)}")
    if energy is not None or frobenius is not None or dtype != torch.float32:
        raise OptionError(
            "energy, frobenius and dtype only go with lora; spectral_a takes a rank and columns. Leave them out."
        )
    if isinstance(columns, (list, tuple)):
        columns, rank = tuple(columns), len(columns) if rank is None else rank
    return SpectralDraft(DEFAULT_RANK if rank is None else rank, "top" if columns is None else columns)


@dataclass
class _Work:
    """Two models, and what is known about their tensors so far."""

    base: Checkpoint
    tuned: Checkpoint
    architecture: Architecture
    pairs: Pairs
    embeddings: bool
    on_weight: OnWeight
    places: dict[str, Place] = field(default_factory=dict)
    stored: dict[str, str] = field(default_factory=dict)
    """Adapted layer -> its tensor in TUNED."""
    fits: dict[str, Fit] = field(default_factory=dict)
    rest: list[RestTensor] = field(default_factory=list)
    unchanged: list[str] = field(default_factory=list)

    def compare(self, draft: Draft) -> None:
        """Sort the tensors of both models: into the draft, the rest, or the unchanged ones."""
        names = sorted([*self.pairs.base_names, *self.pairs.new])
        for done, name in enumerate(names, 1):
            self._take(name, draft)
            self.on_weight("comparing", done, len(names))

    def _take(self, name: str, draft: Draft) -> None:
        place = self.architecture.place(name, self.tuned.shapes[name])
        if name in self.pairs.new:
            size = float(torch.linalg.vector_norm(self.tuned.tensor(name).float()))
            self.rest.append(RestTensor(name, "only the tuned model has it", size, None, False))
            return
        before, change = self._change(name)
        size = float(torch.linalg.vector_norm(change))
        if size == 0:
            self.unchanged.append(name)
        elif place.kind in (ADAPTABLE if self.embeddings else ADAPTABLE[:2]):
            try:
                fit = draft.add(place, change.shape, place.matrix(before), place.matrix(change))
            except LeftOutError as error:  # zeros in BASE have no singular directions
                self._leave(name, error.why, before, size)
                return
            self.fits[place.module], self.places[place.module], self.stored[place.module] = fit, place, name
        else:
            self._leave(name, place.kind, before, size)

    def _leave(self, name: str, why: str, before: torch.Tensor, size: float) -> None:
        whole = float(torch.linalg.vector_norm(before))
        self.rest.append(RestTensor(name, why, size, size / whole if whole else None, False))

    def prove(self, draft: Draft, folder: Path) -> Iterator[ExtractedLayer]:
        """Compare the written adapter with both models, layer by layer."""
        for done, (layer, update_OI) in enumerate(draft.updates(folder, self._base_matrix), 1):
            before, change = self._change(self.stored[layer])
            dW_OI, fit = self.places[layer].matrix(change), self.fits[layer]
            size, whole = float(torch.linalg.vector_norm(dW_OI)), float(torch.linalg.vector_norm(before))
            lost = float(torch.linalg.vector_norm(dW_OI - update_OI)) / size
            # A NaN compares false, so ask for what must hold.
            if not lost <= fit.best + fit.rounding:
                raise ExportError(
                    f"{layer}: the written adapter misses {lost:.2%} of the change, more than expected "
                    f"({fit.best:.2%}, and {fit.rounding:.2%} for rounding). Extract in float32."
                )
            relative = size / whole if whole else float("inf")
            yield ExtractedLayer(layer, fit.rank, size, relative, lost, fit.best)
            self.on_weight("checking", done, len(self.fits))

    def _base_matrix(self, layer: str) -> torch.Tensor:
        return self.places[layer].matrix(self.base.tensor(self.pairs.base_names[self.stored[layer]]))

    def _change(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Get (W_base, W_tuned - W_base) in float32, in the stored shape; float64 is subtracted as float64."""
        before, after = self.base.tensor(self.pairs.base_names[name]), self.tuned.tensor(name)
        wide = torch.promote_types(torch.promote_types(before.dtype, after.dtype), torch.float32)
        return before.float(), (after.to(wide) - before.to(wide)).float()


def _refuse_tied(architecture: Architecture, tuned: Checkpoint) -> None:
    stored = {architecture.place(name, shape).module for name, shape in tuned.shapes.items()}
    for group in architecture.tied:
        if group - stored:
            raise ExportError(
                f"{tuned.path}: {' and '.join(sorted(group))} share one weight, so an adapter on one embedding would "
                "leave the others unchanged. Pass --save-rest, which saves them whole, and leave --embeddings out."
            )


def _refuse_nothing(work: _Work, draft: Draft) -> None:
    if draft.ranks:
        return
    if not work.rest:
        raise ExportError(
            f"{work.tuned.path}: all {len(work.unchanged)} tensors are equal to those of {work.base.path}, so there is "
            "nothing to extract. Check the two paths."
        )
    what = sorted({tensor.why for tensor in work.rest})
    raise ExportError(
        f"{work.tuned.path}: {len(work.rest)} tensors changed, but none is a linear layer or a convolution "
        f"({', '.join(what)}), so an adapter would be empty. Use the model itself, or pass --embeddings."
    )


def _parents(names: Iterable[str]) -> set[str]:
    """Get the paths of all modules that appear in these tensor names."""
    parts = [name.split(".") for name in names]
    return {".".join(name[:end]) for name in parts for end in range(1, len(name))}


def _dtype_of(model: Checkpoint) -> str:
    dtypes = [dtype for dtype in model.dtypes.values() if dtype.is_floating_point]
    return str(max(sorted(set(dtypes), key=str), key=dtypes.count)).removeprefix("torch.")
