"""The tuner: finds the layers, adapts them, and reads and writes their part of an adapter file."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, _maybe_include_all_linear_layers
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from peft.utils.integrations import init_empty_weights
from torch import nn

from ..adapter import Owners, SpectralModule, spectral_modules
from ..adapter.saved import LayerRanks
from ..checkpoint import PEFT_PREFIX
from ..errors import LeftOutError, OptionError, SpectuneError, one_line
from ..records import Spectrum, Weight
from .attention import SpectralAttentionLinear
from .base_weight import keep_unpacked
from .bases import find_bases, weights_of_layers
from .concessions import Concessions
from .config import SpectralConfig
from .cut_weights import Sent, bases_of_cut, cut_basis, cut_weights, refuse_parts
from .directions import bring_spectra, refuse_unprepared
from .experts import SpectralParameters
from .file_checks import expect_what_the_file_has, refuse_non_finite, refuse_surplus
from .from_file import out_of_peft_s_sight, refuse_unbacked
from .full_precision import bases_of_quantised
from .kinds import KINDS, kind_of
from .layer import SpectralLayer
from .named_adapters import NamedAdapters
from .other_files import refuse_other_files
from .own_code import is_read
from .parameters import chosen_parameters, ranks_of_modules, say_what_all_linear_leaves_out
from .progress import ticking
from .shared_basis import basis_apart, with_basis
from .take_back import take_back
from .targets import (
    refuse_name_of_a_part,
    refuse_output_of_attention,
    refuse_tied_targets,
    refuse_unmatched_targets,
    refuse_what_lora_cannot_have,
    tie_saved_modules,
)
from .trained_tokens import refuse_wrong_tokens
from .twins import hand_over, own_copy, twins
from .usual_layers import choose_usual_layers


class SpectralTuner(NamedAdapters):
    """Spectral adapters in a model, as PEFT's `get_peft_model` and `inject_adapter_in_model` make them."""

    prefix = "spectune_"
    tuner_layer_cls = SpectralLayer
    _chosen: frozenset[str] | None = None
    """The layers that the patterns of a stranger's config choose, while they are adapted."""
    _model: nn.Module
    _bases: dict[str, Spectrum | Sent]
    _twins: dict[str, SpectralModule]
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Adapt the targeted layers. When one of them cannot be adapted, the model is left as it was."""
        config = self.peft_config[adapter_name]
        bring_spectra(config)
        choose_usual_layers(config, model)
        refuse_unmatched_targets(config, model)
        refuse_name_of_a_part(adapter_name, model)
        refuse_wrong_tokens(config, model)
        say_what_all_linear_leaves_out(config, model)
        self._stacked = chosen_parameters(config, model)
        try:
            with nullcontext() if config.origin is None else self._bounded(config, model):
                self._inject(model, adapter_name, *args, **kwargs)
            try:
                self._concessions.close(any(name == adapter_name for _, name, _ in spectral_modules(model)))
            except OptionError:
                take_back(model, adapter_name)
                raise
        except TypeError as error:  # PEFT's: the embedding of trained tokens is an adapted layer, too
            if isinstance(error, SpectuneError) or config.trainable_token_indices is None:
                raise
            raise OptionError(f"trainable_token_indices: {one_line(error)}. Take it out of target_modules.") from error
        except ValueError as error:  # PEFT's: a pattern names no layer of this model
            if isinstance(error, SpectuneError):
                raise
            raise OptionError(f"target_modules: {one_line(error)}.") from error

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict[str, Any]) -> Any:
        try:
            return super()._prepare_adapter_config(peft_config, model_config)
        except ValueError as error:  # PEFT knows no usual layers for this model
            if peft_config.target_parameters:
                peft_config.target_modules = set()
                return peft_config
            found = model_config.get("model_type") or "this model"
            raise OptionError(
                f"target_modules: PEFT's table has no usual layers for {found}. Please specify `target_modules` (names "
                f"of layers, a regex, or 'all-linear')."
            ) from error

    @contextmanager
    def _bounded(self, config: SpectralConfig, model: nn.Module) -> Iterator[None]:
        """Hold a config from a file to bounded time and to the memory that the file backs."""
        complete = self._prepare_adapter_config(config, self.get_model_config(model))
        parameters = [target.path for target in self._stacked]
        complete = _maybe_include_all_linear_layers(complete, model)
        with out_of_peft_s_sight(complete, model, parameters) as self._chosen:
            try:
                refuse_unbacked(config, model, self._chosen, list(self._experts(model)))
                yield
            finally:
                self._chosen = None

    def _inject(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        config = self.peft_config[adapter_name]
        self._model, self._bases = model, {}
        self._twins = twins(model, adapter_name, self.peft_config)
        self._ranks = LayerRanks(config.rank_pattern, config.target_parameters)
        self._concessions = Concessions(config)
        present = [(path, module) for path, name, module in spectral_modules(model) if name == adapter_name]
        self._owners = Owners(present)
        if present:
            complete = self._prepare_adapter_config(config, self.get_model_config(model))
            complete = _maybe_include_all_linear_layers(complete, model)
            self._owners.refuse_left_behind(lambda path: bool(self._check_target_module_exists(complete, path)))
        try:
            with ticking("decomposed {} weights") as self._tick, ranks_of_modules(config, self._stacked):
                super().inject_adapter(model, adapter_name, *args, **kwargs)
            hand_over(model, adapter_name, self._twins)
        except SpectuneError:
            take_back(model, adapter_name)
            raise
        finally:
            del self._tick, self._bases, self._twins, self._ranks, self._owners, self._model

    def _check_target_module_exists(self, peft_config: SpectralConfig, key: str) -> Any:  # type: ignore[override]
        if self._chosen is None:
            return BaseTuner._check_target_module_exists(peft_config, key)
        return key in self._chosen

    def _prepare_model(self, peft_config: SpectralConfig, model: nn.Module) -> None:
        """Find all bases before the first layer is replaced: PEFT calls this when the config is complete."""
        refuse_unprepared(peft_config)
        complete = _maybe_include_all_linear_layers(peft_config, model)
        keep_unpacked(model)

        def targets(path: str) -> Any:
            return path not in self._twins and self._check_target_module_exists(complete, path)

        experts = [weight for weight in self._experts(model) if weight.name not in self._twins]
        self._bases = {**find_bases([*weights_of_layers(model, targets), *experts], complete, self._ranks, self._tick)}
        self._bases |= bases_of_cut(cut_weights(model, targets), complete, self._ranks, self._tick)
        self._bases |= bases_of_quantised(model, targets, complete, self._ranks, self._tick)
        if not complete.basis_is_in_file:
            self._bases |= {name: own_copy(twin) for name, twin in self._twins.items()}

    def _experts(self, model: nn.Module) -> Iterator[Weight]:
        return (weight for target in self._stacked for weight in target.weights(model))

    def _inject_parameters(
        self, peft_config: SpectralConfig, model: nn.Module, adapter_name: str, low_cpu_mem_usage: bool
    ) -> list[str]:
        """Adapt what target_parameters names, in place of PEFT's own loop, which knows its own layers by name."""
        with init_empty_weights() if low_cpu_mem_usage else nullcontext():
            for target in self._stacked:
                for expert in target.experts(model, adapter_name):
                    self._create_and_replace(peft_config, adapter_name, expert, "", model, expert.module_name)
        return [target.path for target in self._stacked]

    def _add_modules_to_save_to_tie(self, peft_config: SpectralConfig, tied_weight_keys: list[str]) -> None:
        tie_saved_modules(peft_config, self.model, tied_weight_keys)

    def _add_targets_to_tie(self, peft_config: SpectralConfig, tied_weight_keys: list[str]) -> None:
        refuse_tied_targets()

    def _create_and_replace(
        self,
        peft_config: SpectralConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
    ) -> None:
        found = self._bases.pop(current_key, None)
        if found is None:
            self._tick(current_key)
        basis = found() if callable(found) else found
        try:
            adapted = self._adapt(peft_config, adapter_name, target, target_name, parent, current_key, basis)
        except LeftOutError as error:
            self._concessions.leave_out(current_key, error)
        else:
            self._concessions.note(current_key, adapted.module(adapter_name), self._ranks.of(current_key))
            if adapted.is_cut and peft_config.origin is None:  # a saved basis is first rotated to match its file
                cut_basis(adapted.module(adapter_name), adapted.stored)

    def _adapt(
        self,
        peft_config: SpectralConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        basis: Spectrum | None,
    ) -> SpectralLayer:
        r = self._ranks.of(current_key)
        if isinstance(target, SpectralLayer):
            target.update_layer(adapter_name, peft_config, current_key, r, self._owners, basis)
            if isinstance(target, SpectralAttentionLinear):
                target.update_out_proj(adapter_name, peft_config, r, self._owners)
            return target
        refuse_output_of_attention(parent, target_name, current_key)
        if peft_config.origin is None:
            refuse_what_lora_cannot_have(self, self._model, target_name, current_key)
        innermost: Any = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        kind = kind_of(innermost, current_key)
        adapted = kind(target, adapter_name, peft_config, current_key, r, self._owners, basis)
        adapted.weight_is_read, adapted.is_only_read = is_read(self._model, current_key)
        if isinstance(adapted, SpectralAttentionLinear):
            adapted.adapt_out_proj(KINDS["linear"], adapter_name, peft_config, r, self._owners)
        if adapter_name not in self.active_adapters:
            adapted.requires_grad_(False)
        self._replace_module(parent, target_name, adapted, target)
        return adapted

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        if isinstance(child, SpectralParameters) or not hasattr(new_module, "base_layer"):
            setattr(parent, child_name, new_module)  # PEFT would look for a `weight`, which not every layer has
        else:
            super()._replace_module(parent, child_name, new_module, child)

    @classmethod
    def _get_adapter_state_dict(cls, model: nn.Module, **kwargs: Any) -> dict[str, torch.Tensor]:
        refuse_other_files()
        for _, _, module in spectral_modules(model):
            module.settle()
        tensors: dict[str, torch.Tensor] = super()._get_adapter_state_dict(model=model, **kwargs)
        found_again = {
            f"{layer}.spectune_adapter.{adapter}.{name}"
            for layer, adapter, module in spectral_modules(model)
            for name in module.found_names
        }
        shared, halved = basis_apart(model, kwargs["config"])
        refuse_parts(model, {name: tensor for name, tensor in tensors.items() if name not in found_again | shared})
        return {
            name: tensor.to(torch.bfloat16) if name in halved else tensor
            for name, tensor in tensors.items()
            if name not in found_again | shared
        }

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: SpectralConfig, adapter_name: str, state_dict: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """Check the file against the model, tensor by tensor, before anything is loaded."""
        refuse_non_finite(state_dict)
        state_dict = with_basis(model, config, adapter_name, state_dict)
        in_file = {key.removeprefix(PEFT_PREFIX) for key in state_dict}
        for layer_name, name, module in spectral_modules(model):
            if name == adapter_name:
                expect_what_the_file_has(layer_name.removeprefix(PEFT_PREFIX), module, in_file)
        refuse_surplus(model, adapter_name, in_file)
        remapped: dict[str, torch.Tensor] = super()._remap_adapter_state_dict_for_load(
            model=model, config=config, adapter_name=adapter_name, state_dict=state_dict
        )
        return remapped
