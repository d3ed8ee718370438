"""What a run saves and loads: complete checkpoints without pickles, and whole tensors under every engine."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..adapter import bases_as_parameters, spectral_modules
from .adalora import is_adalora, load_budget, save_budget
from .checkpoints import PARTIAL, OwnCheckpoints, save_whole, write_examples_a_step
from .sharded import (
    OPTIMIZER,
    SCHEDULER,
    load_optimizer,
    load_whole,
    save_optimizer,
    state_by_name,
    trained_tensors,
    written_by_name,
)
from .zero import (
    Named,
    gather_by_layer,
    load_optimizer_state,
    load_parameters,
    names_by_group,
    optimizer_state,
    parts_of,
    whole_state,
)


class Saving:
    """A Trainer's part that saves and loads."""

    is_cut = False
    """Whether ZeRO-3 has cut the model."""
    _run_dir: Path | None = None
    _groups: Named = ()

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: Any) -> Any:
        """Under DeepSpeed, read a checkpoint into the whole model and its own optimizer: DeepSpeed reads pickles."""
        me: Any = self
        prepare, checkpoint = super()._prepare_for_training, resume_from_checkpoint  # type: ignore[misc]
        if not me.is_deepspeed_enabled:
            return prepare(max_steps, train_dataloader, checkpoint)
        self.is_cut = any(hasattr(parameter, "ds_id") for parameter in me.model.parameters())  # by zero.Init
        if checkpoint is not None:
            self._load_from_checkpoint(checkpoint)
        stage = me.accelerator.state.deepspeed_plugin.zero_stage
        if stage == 3:
            bases_as_parameters(me.model)
            gather_by_layer(me.model)
        optimizer = me.create_optimizer()
        state = None if checkpoint is None else state_by_name(me.model, optimizer, Path(checkpoint))
        self._groups = list(names_by_group(me.model, optimizer))
        prepared = prepare(max_steps, train_dataloader, None)
        self.is_cut = stage == 3
        parts_of(me.optimizer.optimizer)
        if state is not None:
            load_optimizer_state(me.optimizer.optimizer, self._groups, state)
            self._load_scheduler(Path(checkpoint))
        return prepared

    def _get_output_dir(self, trial: Any = None) -> str:
        me: Any = self
        return str(self._run_dir or me.args.output_dir)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Unlike transformers, which writes into the final folder, never leave half a checkpoint."""
        me: Any = self
        folder = Path(me.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        keep, me.args.save_total_limit = me.args.save_total_limit, None

        def write() -> None:
            self._run_dir = folder / PARTIAL
            with same_bases(me.model):
                super(Saving, self)._save_checkpoint(model, trial)  # type: ignore[misc]
            if me.args.should_save:
                asked = me.args.per_device_train_batch_size * me.args.gradient_accumulation_steps
                write_examples_a_step(folder / PARTIAL / name, asked * me.args.world_size)
                if is_adalora(me.model):
                    save_budget(me.model, folder / PARTIAL / name)

        name = f"checkpoint-{me.state.global_step}"
        try:
            save_whole(folder, name, write, keep, me.accelerator.wait_for_everyone, me.args.should_save)
        finally:
            self._run_dir, me.args.save_total_limit = None, keep

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        me: Any = self
        if isinstance(me.model, PreTrainedModel):
            # For some architectures (ViT) its files use the names of older releases, which only from_pretrained knows;
            # transformers' own method would silently load nothing.
            saved = type(me.model).from_pretrained(resume_from_checkpoint, local_files_only=True)
            if me.is_fsdp_enabled:
                load_whole(me.model, saved.state_dict())
            elif self.is_cut:
                load_parameters(me.model, saved.state_dict(), me.args.should_save)
            else:
                me.model.load_state_dict(saved.state_dict())
            return
        if me.is_fsdp_enabled:
            load_whole(me.model, trained_tensors(me.model, Path(resume_from_checkpoint)), strict=False)
            return
        if self.is_cut:
            load_parameters(me.model, trained_tensors(me.model, Path(resume_from_checkpoint)), me.args.should_save)
            return
        if is_adalora(me.model):
            load_budget(me.model, Path(resume_from_checkpoint))
            return
        with same_bases(me.model):
            if isinstance(me.model, OwnCheckpoints):
                me.model.load_checkpoint(Path(resume_from_checkpoint))
                return
            super()._load_from_checkpoint(resume_from_checkpoint, model)  # type: ignore[misc]

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        me: Any = self
        # transformers would write the whole base, too, and files that only as many processes can read.
        if me.is_fsdp_enabled:
            save_optimizer(me.model, me.optimizer.optimizer, Path(output_dir), me.args.should_save)
        elif me.is_deepspeed_enabled:
            state = optimizer_state(me.optimizer.optimizer, self._groups, me.args.should_save)
            if me.args.should_save:
                torch.save(state, Path(output_dir, OPTIMIZER))
        else:
            super()._save_optimizer_and_scheduler(output_dir)  # type: ignore[misc]
            return
        if me.args.should_save:
            torch.save(me.lr_scheduler.state_dict(), Path(output_dir, SCHEDULER))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        me: Any = self
        if checkpoint is not None and (me.is_fsdp_enabled or written_by_name(Path(checkpoint))):
            load_optimizer(me.model, me.optimizer.optimizer, Path(checkpoint), me.is_fsdp_enabled)
            self._load_scheduler(Path(checkpoint))
        else:
            super()._load_optimizer_and_scheduler(checkpoint)  # type: ignore[misc]

    def _load_scheduler(self, folder: Path) -> None:
        state = torch.load(folder / SCHEDULER, map_location="cpu", weights_only=True)
        self.lr_scheduler.load_state_dict(state)  # type: ignore[attr-defined]

    def whole(self) -> dict[str, Any]:
        """Get what `save_pretrained` needs where no process holds all of the model; all processes must call it."""
        me: Any = self
        if me.is_fsdp_enabled:
            return {"state_dict": me.accelerator.get_state_dict(me.model)}
        return {"state_dict": whole_state(me.model, me.args.should_save)} if self.is_cut else {}

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        if self.is_cut:  # transformers leaves out bases that the adapter's file contains
            self._save(output_dir, **self.whole())
        else:
            super().save_model(output_dir, _internal_call)  # type: ignore[misc]

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        me: Any = self
        if isinstance(me.model, OwnCheckpoints):
            folder = Path(output_dir or me.args.output_dir)
            folder.mkdir(parents=True, exist_ok=True)
            me.model.save_checkpoint(folder)
            return
        super()._save(output_dir, state_dict)  # type: ignore[misc]
        # A pickle of the arguments; run.yaml has them.
        Path(output_dir or "", "training_args.bin").unlink(missing_ok=True)


@contextmanager
def same_bases(model: nn.Module) -> Iterator[None]:
    """Keep the bases of spectral adapters bit for bit while they are saved or loaded.

    Both rotate a basis to match its sketch, which changes the last bits even if it already matches. If the sketch has
    not changed, the old basis is put back, so that a resumed run ends in exactly the same weights.
    """
    found = [(m, (m.U_OR, m.S_R, m.Vh_RI), m.sketch.clone()) for _, _, m in spectral_modules(model)]
    yield
    for module, basis, sketch in found:
        if torch.equal(module.sketch, sketch):
            module.U_OR, module.S_R, module.Vh_RI = basis
