"""The adapted layer: base output plus the updates of its active adapters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from peft.utils.quantization_utils import QuantizationBackend
from torch import nn

from ..adapter import Dynamics, Owners, SpectralModule, in_own_dtype, is_autocast
from ..adapter.rows import ROWS, BankedLayer, Groups, refuse_other_rows
from ..algebra import dense
from ..errors import OptionError, WeightError
from ..records import Spectrum
from .base_weight import Layout, backend_of, layout_of
from .bases import find_basis
from .config import SpectralConfig
from .mixed_rows import ROWS_DIFFER
from .pretrained_weight import PretrainedWeight
from .strengths import Strengths


class SpectralLayer(PretrainedWeight, Strengths, BaseTunerLayer):
    """What every adapted layer shares: adapters by name, merge, unmerge, the update in the base's layout.

    The base weight is never changed. A merge puts another parameter in its place, and unmerging puts the
    very same one back, so nothing is ever subtracted.
    """

    adapter_layer_names = ("spectune_adapter",)
    spectune_adapter: nn.ModuleDict
    layout: Layout
    stored_shape: torch.Size
    get_base_layer: Callable[[], Any]
    _cast_input_dtype: Callable[[torch.Tensor, torch.dtype], torch.Tensor]
    _get_embed_scale: Callable[[], torch.Tensor | None]
    other_param_names = ()
    weight_is_read = False
    """Whether the code around this layer reads its weight, which then has the updates in it."""
    is_only_read = False
    """Whether that code never calls the layer."""
    runs_own_forward = False
    """Whether the base layer runs its own code on the tuned weight, so that no update is added to its output."""

    def __init__(self, base_layer: nn.Module, name: str) -> None:
        self.base_layer = base_layer
        backend = backend_of(self.get_base_layer())
        self._begin(name, layout_of(self.get_base_layer(), name, backend), backend)

    def _begin(self, name: str, layout: Layout, backend: QuantizationBackend | None) -> None:
        self.module_name, self.layout, self.quantization_backend = name, layout, backend
        self.spectune_adapter = nn.ModuleDict()
        # The pretrained parameter itself while updates are merged; in a list, so that it is not registered twice.
        self._replaced: list[nn.Parameter] = []
        self.merged_adapters: list[str] = []
        self.bank: BankedLayer | None = None
        self._groups = Groups()
        self._disable_adapters = False
        self.cast_input_dtype_enabled = True
        stored = self._outline()  # once: a quantised weight is dequantised by this
        self.stored_shape = stored.shape
        self.out_features, self.in_features = self.layout.to_matrix(stored).shape

    def active_modules(self) -> list[SpectralModule]:
        """Get the modules of the active adapters that this layer has; adapters may target layers unevenly."""
        return [self.module(name) for name in self.active_adapters if name in self.spectune_adapter]

    def module(self, adapter_name: str) -> SpectralModule:
        """Get the module of one adapter."""
        return cast(SpectralModule, self.spectune_adapter[adapter_name])

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        super().set_adapter(adapter_names, inference_mode=inference_mode)
        self._freeze_bases()

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        super().set_requires_grad(adapter_names, requires_grad)
        self._freeze_bases()

    def _freeze_bases(self) -> None:
        """Freeze the bases that are parameters, for sharding: PEFT has every parameter of an adapter trained."""
        for name in self.spectune_adapter:
            self.module(name).freeze_basis()

    def update_layer(
        self,
        adapter_name: str,
        config: SpectralConfig,
        name: str,
        r: int | None,
        owners: Owners,
        basis: Spectrum | None = None,
    ) -> None:
        """Attach a new adapter, on this basis or a computed one; attaches nothing if anything fails."""
        W_OI = self.layout.to_matrix(self._outline())
        method = config.method_for(name, r, *W_OI.shape)
        if W_OI.is_meta and basis is None and not self.is_cut:
            raise WeightError(
                f"{name}: the base weight is on the meta device and has no numbers to decompose. "
                f"Load the base model with its weights first."
            )
        owner, (rank, _) = owners.of(method, name, *W_OI.shape), method.basis(*W_OI.shape)
        if rank == 0 or config.basis_is_in_file:
            spectrum = Spectrum.unknown(W_OI.shape[0], W_OI.shape[1], rank, name, config.directions)
            spectrum = spectrum.to(self.stored.device if self.is_cut else W_OI.device)
        else:
            spectrum = basis or find_basis(name, self.original_matrix() if self.is_cut else W_OI, method, config)
            method.check(spectrum)
        unsure = config.save_basis == "auto" and not spectrum.is_found_again
        embed = rank > 0 and (config.save_basis == "always" or unsure)
        module = SpectralModule(method, spectrum, embed_basis=embed, random_start=not config.init_weights, owner=owner)
        module.base_matrix = self.original_matrix
        module.dynamics = Dynamics(config.singular_decay, config.grad_norm)
        if W_OI.dtype in (torch.float16, torch.bfloat16, torch.float64):
            # PEFT's rule: adapters begin in the base's dtype, and PEFT lifts half precision to float32
            # afterwards unless autocast_adapter_dtype=False. The frozen basis keeps its dtype.
            for parameter in module.parameters():
                parameter.data = parameter.data.to(W_OI.dtype)
        self.spectune_adapter[adapter_name] = module
        owners.add(module)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """Move an adapter to the base's device. PEFT also casts here, which would round a basis to bfloat16."""
        module = self.module(adapter_name) if adapter_name in self.spectune_adapter else None
        target = device if device is not None else self._get_base_layer_device_and_dtype(self.get_base_layer())[0]
        if module is None or target is None or any(parameter.is_meta for parameter in module.parameters()):
            return
        module.to(target)

    def get_delta_weight(self, adapter_name: str) -> torch.Tensor:
        """Get the update of one adapter in the layout of the base weight, in the dtype of its trained numbers."""
        module = self.module(adapter_name)
        dtypes = [getattr(module, name).dtype for name in module.own_names]
        return self._update_of(adapter_name).to(dtypes[0] if dtypes else module.dtype)

    def _update_of(self, adapter_name: str) -> torch.Tensor:
        """Get it in the dtype of the basis, which loses nothing."""
        module = self.module(adapter_name)
        with torch.no_grad(), in_own_dtype(module.S_R):
            update_OI = dense(module.delta())
            return self.layout.from_matrix(update_OI, self.stored_shape)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the updates to the base weight in float32, with one rounding; the original is kept aside."""
        names = [n for n in check_adapters_to_merge(self, adapter_names) if n in self.spectune_adapter]
        if not names:
            return
        if self.quantization_backend is not None:
            raise WeightError(
                f"{self.module_name}: the base weight is quantised; merging would round the update away. "
                f"Export to LoRA and serve it beside the base, or merge into the unquantised checkpoint."
            )
        if self.is_cut:
            raise WeightError(
                f"{self.module_name}: the base weight is partitioned by DeepSpeed ZeRO-3, and a merged one would be "
                f"whole on every process. Save the adapter, and merge it later, in a single process without zero.Init."
            )
        original = self._original()
        merged = self._with_updates(original, [*self.merged_adapters, *names])
        if safe_merge and not torch.isfinite(merged).all():
            raise ValueError(f"NaNs detected in the merged weights. The adapter {', '.join(names)} seems to be broken")
        self._put(merged)
        self.merged_adapters.extend(names)

    def unmerge(self) -> None:
        """Put the original weight back, bit for bit."""
        if not self.merged:
            import warnings

            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        self._put_back()
        self.merged_adapters.clear()

    def _with_updates(self, original: torch.Tensor, names: list[str]) -> torch.Tensor:
        total = original.to(torch.promote_types(original.dtype, torch.float32), copy=True)
        for name in names:
            total += self._update_of(name).to(total.device)
        return total.to(original.dtype)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Every method is additive, so PEFT's convert_to_lora serves linear layers (by dense SVD; ours is exact)."""
        return self.layout.kind == "linear"


class SpectralAdapted(nn.Module, SpectralLayer):
    """The forward of an adapted layer; a kind of layer only says what one adapter adds to the output."""

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        config: SpectralConfig,
        name: str,
        r: int | None,
        owners: Owners,
        basis: Spectrum | None = None,
    ) -> None:
        super().__init__()
        SpectralLayer.__init__(self, base_layer, name)
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config, name, r, owners, basis)

    @property
    def weight(self) -> torch.Tensor:
        """The base weight, including the updates if the model's code reads it."""
        stored: torch.Tensor = getattr(self.get_base_layer(), self.layout.attribute)
        if not self.weight_is_read or self.quantization_backend is not None:
            return stored
        if ROWS_DIFFER.get() or (self.bank is not None and ROWS.get() is not None):
            raise OptionError(
                f"{self.module_name}: the model reads this layer's weight, so all rows of a batch must use the same "
                f"adapter. Run one adapter at a time, or train without this layer."
            )
        return self.tuned_weight()

    def tuned_weight(self) -> torch.Tensor:
        """Get the stored weight plus the updates of the active adapters, differentiable in their numbers."""
        weight: torch.Tensor = getattr(self.get_base_layer(), self.layout.attribute)
        if self.disable_adapters and self._replaced:
            return self._replaced[0]
        if self.disable_adapters or self.merged:
            return weight
        for module in self.active_modules():
            update = self.layout.from_matrix(dense(module.training_delta()), self.stored_shape)
            weight = weight + update.to(weight.dtype)
        return weight

    def update(self, module: SpectralModule, x: torch.Tensor) -> torch.Tensor:
        """Get what one adapter adds to the output of the base layer."""
        raise NotImplementedError

    def working_dtype(self, x: torch.Tensor, module: SpectralModule) -> torch.dtype:
        """Get the dtype in which an adapter meets an input: autocast's, or that of the basis.

        A bfloat16 input stays as it is and the adapter is rounded: casting N x I numbers up costs more than all the
        products with the factors, and the sum is rounded to bfloat16 anyway. float16, which the products may leave,
        is cast up.
        """
        if is_autocast(x) and x.dtype != torch.float64:
            return torch.get_autocast_dtype(x.device.type)
        stays = x.dtype == torch.bfloat16 or not self.cast_input_dtype_enabled
        return x.dtype if stays else module.dtype

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        adapter_names = kwargs.pop("adapter_names", None)
        if self.disable_adapters and self.merged:
            self.unmerge()
        if adapter_names is not None and not self.disable_adapters:
            return self._forward_mixed(x, adapter_names, *args, **kwargs)
        result = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters or self.merged:
            return result
        for module in self.active_modules():
            result = result + self.update(module, x).to(result.dtype)
        return result

    def _forward_mixed(self, x: torch.Tensor, adapter_names: list[str], *args: Any, **kwargs: Any) -> torch.Tensor:
        """Give every row of the batch its own adapter; `__base__` for none."""
        refuse_other_rows(self.module_name, len(adapter_names), len(x))
        if self.merged:
            raise ValueError(
                "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
            )
        result: torch.Tensor = self.base_layer(x, *args, **kwargs)
        return self.add_to_rows(result, x, adapter_names)

    def add_to_rows(self, result: torch.Tensor, x: torch.Tensor, adapter_names: list[str]) -> torch.Tensor:
        """Get the base's output with the update of each row's adapter: one adapter after the other."""
        for name in dict.fromkeys(adapter_names):
            if name in self.spectune_adapter:
                rows_B = torch.tensor([i for i, n in enumerate(adapter_names) if n == name], device=x.device)
                added = self.update(self.module(name), x[rows_B]).to(result.dtype)
                result = result.index_add(0, rows_B, added)
        return result

    def __repr__(self) -> str:
        return "spectune." + super().__repr__()
