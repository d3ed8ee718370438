"""`SpectralConfig`: the one configuration, for every method."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from peft.config import PeftConfig

from ..adapter.saved import FORMAT_VERSION, refuse_absurd
from ..checkpoint import TENSOR_FILE, read_adapter_folder
from ..errors import OptionError, nearest, one_line
from ..methods import METHODS, Method, build_method
from ..spectrum import DataSpectra
from .budget import check_budget
from .config_types import (
    check_own_size,
    check_plain_types,
    check_rank_pattern,
    check_types,
    described,
    with_checked_keywords,
)
from .directions import check_basis, check_directions
from .how_to_load import REQUIRES, say_how_to_load
from .method_options import METHOD_OPTIONS, MethodOptions
from .origin import Origin, came_with_a_file
from .peft_type import PEFT_TYPE
from .svd_options import SVDOptions, svd_options_of

SAVE_BASIS = ("auto", "always", "never")


@dataclass
class SpectralConfig(MethodOptions, PeftConfig):
    """Configuration of a spectral adapter: which method, on which layers, in which singular directions.

    No field is mandatory. An option that the chosen method does not use is refused, one that is left
    out gets the method's default, which the config then contains. Raises `OptionError` (a ValueError)
    for a wrong option and `UnknownOptionError` (a TypeError too) for a wrong keyword.
    """

    method: str = field(default="spectral_a", metadata={"help": "One of spectune.METHODS."})
    directions: str = field(
        default="weight",
        metadata={
            "help": "Which directions: weight, or those of data, found by `spectune.prepare`: gradient, gradient_mean, "
            "activation, weight_x_activation (svft and specadapt)."
        },
    )
    budget: int | None = field(
        default=None,
        metadata={
            "help": "Trained numbers of the whole adapter, shared out over the layers by `spectune.prepare`; r (or "
            "basis_rank) is then the most for one layer. The sizes are saved in rank_pattern."
        },
    )
    budget_by: str = field(
        default="fisher",
        metadata={"help": "The score of a number: fisher, E[g^2] over batches, or gradient, E[g]^2."},
    )
    basis: str | None = field(
        default=None,
        metadata={
            "help": "File with directions of data that many adapters share, so that each saves only its own numbers. "
            "Not part of the config's file."
        },
    )
    basis_id: str | None = field(
        default=None, metadata={"help": "Identity of the shared basis; set when the file is read, do not set it."}
    )
    singular_decay: float = field(
        default=0.0,
        metadata={"help": "Decay of each number by its direction's weakness, per step and unit of learning rate."},
    )
    grad_norm: str | None = field(
        default=None,
        metadata={"help": "Normalise gradients before the optimizer's step: rms, layer or None."},
    )
    svd: SVDOptions | dict[str, Any] = field(
        default_factory=SVDOptions, metadata={"help": "How the basis is computed."}
    )
    save_basis: str = field(
        default="auto",
        metadata={
            "help": "Embed the basis in the file: always, never (rebuild it on load), or auto (only where needed)."
        },
    )

    target_modules: set[str] | list[str] | str | None = field(
        default=None,
        metadata={"help": "Module names, a regex, or 'all-linear'. None: the usual ones of the architecture."},
    )
    target_parameters: list[str] | None = field(
        default=None,
        metadata={
            "help": "Ends of the paths of parameters, for experts that are stored in one; each matrix is tuned as a "
            "weight of its own. With target_modules=[] nothing else is."
        },
    )
    exclude_modules: set[str] | list[str] | str | None = field(
        default=None, metadata={"help": "Module names, or a regex, to leave out."}
    )
    layers_to_transform: list[int] | int | None = field(default=None, metadata={"help": "Only these layer indices."})
    layers_pattern: list[str] | str | None = field(
        default=None, metadata={"help": "Name of the layer list, with layers_to_transform."}
    )
    rank_pattern: dict[str, int] = field(
        default_factory=dict,
        metadata={"help": "Another r for layers matching a name; for svft and svdiff another basis_rank or places."},
    )
    modules_to_save: list[str] | None = field(
        default=None,
        metadata={"help": "Modules trained in full and saved with the adapter, such as a classifier."},
    )
    trainable_token_indices: list[int] | dict[str, list[int]] | None = field(
        default=None,
        metadata={"help": "Tokens whose vectors are trained: of the embedding, or of each layer named here."},
    )
    ensure_weight_tying: bool = field(
        default=False,
        metadata={"help": "Keep tied what modules_to_save or trainable_token_indices trains of tied embeddings."},
    )
    bias: Literal["none", "all", "spectune_only"] = field(
        default="none", metadata={"help": "Train no biases, all, or those of the adapted layers."}
    )
    init_weights: bool = field(
        default=True,
        metadata={"help": "True: the update starts at exactly zero. False: small random numbers (for tests)."},
    )
    format_version: int = field(default=FORMAT_VERSION, metadata={"help": "Layout of the adapter file; do not set it."})

    spectra: DataSpectra | None = field(
        default=None,
        repr=False,
        compare=False,
        metadata={"help": "The directions of data, filled by `spectune.prepare`. Not part of the config's file."},
    )
    origin: Origin | None = field(
        default=None,
        repr=False,
        compare=False,
        metadata={"help": "Where this config was read, set by its readers; None is your own. Not part of the file."},
    )

    def __post_init__(self) -> None:
        check_types(self)
        try:
            super().__post_init__()
        except ValueError as error:  # PEFT's word on task_type
            raise OptionError(f"task_type: {one_line(error)}. Correct it.") from None
        self.peft_type = PEFT_TYPE
        if isinstance(self.svd, dict):
            self.svd = svd_options_of(self.svd)
        if not isinstance(self.svd, SVDOptions):
            raise OptionError(f"svd={self.svd!r}: cannot be {type(self.svd).__name__}. Correct it.")
        check_plain_types(self.svd, "svd.")
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)
        if self.target_parameters is not None:
            self.target_parameters = sorted(set(self.target_parameters))
        if isinstance(self.exclude_modules, list):
            self.exclude_modules = set(self.exclude_modules)
        if self.origin is not None:  # a copy with changes: the patterns are as strange, but its file backs it no more
            self.origin = Origin()
        self._fill_method_options()
        self._check_choices()

    def _fill_method_options(self) -> None:
        method = self.build_method()
        for option in method.options():
            value = getattr(method, option)
            setattr(self, option, list(value) if isinstance(value, tuple) else value)

    def __setattr__(self, name: str, value: Any) -> None:
        """Refuse, in a finished config, an option that the method does not use."""
        finished = "origin" in self.__dict__  # the last field that __init__ sets
        if finished and value is not None and name in METHOD_OPTIONS and name not in METHODS[self.method].options():
            raise OptionError(f"method {self.method!r} has no option {name!r} (given: {value!r}). Leave it out.")
        super().__setattr__(name, value)

    @property
    def basis_is_in_file(self) -> bool:
        """Whether the tensors of this config contain the basis, so that it need not be computed."""
        if self.origin is None:
            return False
        if self.directions != "weight":  # nothing else could
            return self.spectra is None
        return self.save_basis == "always" and self.origin.place is not None

    @property
    def needs_examples(self) -> str:
        """The option for which a new adapter needs `spectune.prepare`, with its value; empty if there is none."""
        if self.directions != "weight" and self.basis is None and self.basis_id is None:
            return f"directions={self.directions!r}"
        if self.build_method().needs_examples():
            return f"pattern={self.pattern!r}"
        return "" if self.budget is None else f"budget={self.budget}"

    @property
    def basis_is_prepared(self) -> bool:
        """Whether the basis comes from `spectune.prepare`: directions of data, or with places that data have chosen."""
        return self.directions != "weight" or (self.spectra is not None and self.build_method().needs_examples())

    @property
    def svd_options(self) -> SVDOptions:
        """How the basis is computed."""
        assert isinstance(self.svd, SVDOptions)
        return self.svd

    def build_method(self, r: int | None = None) -> Method:
        """Get the method with its options; `r` is another size for one layer (rank_pattern)."""
        given = {name: getattr(self, name) for name in METHOD_OPTIONS if getattr(self, name) is not None}
        given = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
        refuse_absurd(given if r is None else {**given, "r": r})
        method = build_method(self.method, given)
        return method if r is None else method.sized(r)

    def method_for(self, layer: str, r: int | None, rows_O: int, cols_I: int) -> Method:
        """Get the method of one layer: with its `r` of rank_pattern as it is, or else with `r` as low as its weight."""
        method = self.build_method(r)
        if r is None:
            return method.fitted(rows_O, cols_I, layer)
        check_own_size(method, r, rows_O, cols_I, layer)
        return method

    def _check_choices(self) -> None:
        for option, value, known in (
            ("save_basis", self.save_basis, SAVE_BASIS),
            ("grad_norm", self.grad_norm, (None, "rms", "layer")),
            ("bias", self.bias, ("none", "all", "spectune_only")),
        ):
            if value not in known:
                words = [str(word) for word in known]
                raise OptionError(f"{option}={value!r} does not exist. {nearest(str(value), words)}")
        check_directions(self.directions, METHODS[self.method], self.save_basis)
        check_basis(self, self.build_method())
        check_rank_pattern(self.build_method(), self.rank_pattern)
        check_budget(self, self.build_method())
        if self.target_parameters and self.bias == "spectune_only":
            raise OptionError(
                "bias='spectune_only' cannot be used with target_parameters: a stack of experts has no bias of its own."
            )
        if not 0 <= self.singular_decay < float("inf"):
            raise OptionError(f"singular_decay={self.singular_decay} must not be negative or infinite.")
        if isinstance(self.target_modules, str) and self.layers_to_transform is not None:
            raise OptionError(
                "layers_to_transform cannot be used when target_modules is a regex. Write it in the regex."
            )
        if isinstance(self.target_modules, str) and self.layers_pattern is not None:
            raise OptionError("layers_pattern does not work if target_modules is a regex. Write it in the regex.")
        if self.layers_pattern is not None and self.layers_to_transform is None:
            raise OptionError("layers_pattern needs layers_to_transform. Give it, or leave layers_pattern out.")

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str, **kwargs: Any) -> SpectralConfig:  # type: ignore[override]
        """Read the config of a saved adapter; a local folder's tensor file is checked before any work."""
        folder, basis = Path(pretrained_model_name_or_path, kwargs.get("subfolder") or ""), kwargs.pop("basis", None)
        # A pickle too: PEFT would fall back to it, read_adapter_folder refuses it.
        brings_tensors = any((folder / name).exists() for name in (TENSOR_FILE, "adapter_model.bin"))
        if brings_tensors:
            read_adapter_folder(folder)
        config: SpectralConfig = super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        if isinstance(config, SpectralConfig):  # PEFT makes what the file says
            came_with_a_file(config, Origin(str(pretrained_model_name_or_path), folder if brings_tensors else None))
            config.basis = basis
        return config

    def to_dict(self) -> dict[str, Any]:
        """Get the config as JSON can hold it; sets are sorted, so that equal configs are equal files."""
        values = asdict(self)
        del values["origin"], values["spectra"], values["basis"]
        for name, value in values.items():
            if isinstance(value, set):
                values[name] = sorted(value)
        del values["svd"]["cache_dir"]  # a place on this machine is nothing to send with a file
        return values | REQUIRES

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write adapter_config.json; it and the README.md beside it say which package loads the adapter."""
        super().save_pretrained(save_directory, **kwargs)
        say_how_to_load(Path(save_directory), self.method)


SpectralConfig.__doc__ = described(SpectralConfig)
SpectralConfig.__init__ = with_checked_keywords(SpectralConfig)  # type: ignore[method-assign]
