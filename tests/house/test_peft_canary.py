"""What Spectune leans on in PEFT, by name. A release of PEFT that moves one of these fails here, with a sentence.

PEFT offers no plug-in interface for a whole method, so some of these names are private. Each line says where it is used
and what for; a new import of PEFT needs a line.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import pickle
from pathlib import Path
from typing import Any

import pytest

from spectune.cli.env import _note

SOURCE = Path(__file__).parents[2] / "src" / "spectune"

# module, name, parameters that are given to it (or that it is overridden with), who uses it
LEANED_ON: list[tuple[str, str, tuple[str, ...], str]] = [
    ("peft", "PeftConfig", (), "tuner/attach.py: the type of a configuration"),
    ("peft", "PeftModel", (), "tuner/attach.py: load a saved adapter"),
    ("peft", "LoraConfig", (), "tuner/targets.py: where PEFT refuses a LoRA"),
    (
        "peft.tuners.tuners_utils",
        "BaseTuner._check_target_module_compatiblity",
        ("peft_config", "model", "target_name"),
        "tuner/targets.py: where PEFT refuses a LoRA; private",
    ),
    (
        "peft.tuners.tuners_utils",
        "BaseTuner._add_modules_to_save_to_tie",
        ("peft_config", "tied_weight_keys"),
        "tuner/model.py: overridden, ensure_weight_tying; private",
    ),
    (
        "peft.tuners.tuners_utils",
        "BaseTuner._add_targets_to_tie",
        ("peft_config", "tied_weight_keys"),
        "tuner/model.py: overridden, ensure_weight_tying; private",
    ),
    ("peft", "PeftModel.from_pretrained", ("model", "model_id", "is_trainable"), "tuner/attach.py: load an adapter"),
    ("peft", "get_peft_model", ("model", "peft_config"), "tuner/attach.py: a new adapter"),
    ("peft", "set_peft_model_state_dict", ("model", "peft_model_state_dict", "adapter_name"), "tuner/attach.py: swap"),
    ("peft", "PEFT_TYPE_TO_CONFIG_MAPPING", (), "tuner/any_method.py: configs of PEFT's own methods"),
    ("peft.mapping", "PEFT_TYPE_TO_CONFIG_MAPPING", (), "tuner/register.py: is the method entered already?"),
    ("peft.mapping", "PEFT_TYPE_TO_TUNER_MAPPING", (), "tuner/register.py: is the tuner entered already?"),
    ("peft.config", "PeftConfig", (), "tuner/config.py: the base of SpectralConfig"),
    (
        "peft.config",
        "PeftConfig.from_pretrained",
        ("pretrained_model_name_or_path",),
        "tuner/config.py: reads it",
    ),
    ("peft.utils", "register_peft_method", ("name", "config_cls", "model_cls"), "tuner/register.py: enters the method"),
    ("peft.utils", "AuxiliaryTrainingWrapper", (), "tuner/model.py: modules_to_save in mixed batches"),
    ("peft.utils", "TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING", (), "tuner/model.py: the usual targets"),
    ("peft.utils.peft_types", "PeftType", (), "tuner/peft_type.py: the closed enum that gets a new member"),
    (
        "peft.utils.quantization_utils",
        "resolve_quantization_backend",
        ("get_apply_tensor_subclass",),
        "tuner/base_weight.py: how a quantised layer is turned into numbers",
    ),
    ("peft.utils.integrations", "init_empty_weights", (), "tuner/model.py: experts of an adapter about to be loaded"),
    (
        "peft.tuners.tuners_utils",
        "BaseTuner._inject_parameters",
        ("peft_config", "model", "adapter_name", "low_cpu_mem_usage"),
        "tuner/model.py: overridden, target_parameters; private",
    ),
    ("peft.utils.quantization_utils", "QuantizationBackend", (), "tuner/base_weight.py: the type of the above"),
    ("peft.utils.quantization_utils", "QuantizationBackend.get_base_weight", (), "tuner/layer.py: dequantise"),
    (
        "peft.tuners.tuners_utils",
        "_maybe_include_all_linear_layers",
        ("peft_config", "model"),
        "tuner/model.py: 'all-linear' before the bases are found; private",
    ),
    ("peft.tuners.tuners_utils", "check_adapters_to_merge", ("module", "adapter_names"), "tuner/layer.py: merge"),
    ("peft.tuners.tuners_utils", "BaseTuner", (), "tuner/model.py: the base of SpectralTuner"),
    ("peft.tuners.tuners_utils", "BaseTuner.inject_adapter", ("model", "adapter_name"), "tuner/model.py: overridden"),
    (
        "peft.tuners.tuners_utils",
        "BaseTuner._prepare_adapter_config",
        ("peft_config", "model_config"),
        "tuner/model.py: the usual targets before a file's patterns are matched; private",
    ),
    ("peft.tuners.tuners_utils", "BaseTuner.get_model_config", ("model",), "tuner/model.py: given to the above"),
    (
        "peft.tuners.tuners_utils",
        "check_target_module_exists",
        ("config", "key"),
        "tuner/from_file.py: chooses the same layers in bounded time (tests/hostile/test_live_load.py)",
    ),
    ("peft.tuners.tuners_utils", "BaseTuner._prepare_model", ("peft_config", "model"), "tuner/model.py: overridden"),
    ("peft.tuners.tuners_utils", "BaseTuner._check_target_module_exists", ("peft_config", "key"), "tuner/model.py"),
    (
        "peft.tuners.tuners_utils",
        "BaseTuner._create_and_replace",
        ("peft_config", "adapter_name", "target", "target_name", "parent", "current_key", "parameter_name"),
        "tuner/model.py: overridden; adapts one layer",
    ),
    (
        "peft.tuners.tuners_utils",
        "BaseTuner._replace_module",
        ("parent", "child_name", "new_module", "child"),
        "tuner/model.py: puts an adapted layer in its place; private",
    ),
    ("peft.tuners.tuners_utils", "BaseTuner._get_adapter_state_dict", ("model",), "tuner/model.py: overridden, saves"),
    (
        "peft.tuners.tuners_utils",
        "BaseTuner._remap_adapter_state_dict_for_load",
        ("model", "config", "adapter_name", "state_dict"),
        "tuner/model.py: overridden; checks a file before anything is loaded",
    ),
    ("peft.tuners.tuners_utils", "BaseTunerLayer", (), "tuner/layer.py: the base of SpectralLayer"),
    ("peft.tuners.tuners_utils", "BaseTunerLayer.get_base_layer", (), "tuner/layer.py: the layer inside"),
    ("peft.tuners.tuners_utils", "BaseTunerLayer.set_adapter", ("adapter_names",), "tuner/layer.py: activates"),
    ("peft.tuners.tuners_utils", "BaseTunerLayer.delete_adapter", ("adapter_name",), "tuner/model.py: takes back"),
    ("peft.tuners.tuners_utils", "BaseTunerLayer.active_adapters", (), "tuner/layer.py: which ones act"),
    ("peft.tuners.tuners_utils", "BaseTunerLayer._get_embed_scale", (), "tuner/kinds.py: scaled embeddings; private"),
    ("peft.tuners.tuners_utils", "BaseTunerLayer._cast_input_dtype", ("x", "dtype"), "tuner/layer.py; private"),
    (
        "peft.tuners.tuners_utils",
        "BaseTunerLayer._get_base_layer_device_and_dtype",
        ("base_layer",),
        "tuner/layer.py: where a new adapter goes; private",
    ),
    (
        "peft.tuners.tuners_utils",
        "BaseTunerLayer._move_adapter_to_device_of_base_layer",
        ("adapter_name", "device"),
        "tuner/layer.py: overridden, since PEFT's would round a basis; private",
    ),
    ("peft.tuners.tuners_utils", "BaseTunerLayer.supports_lora_conversion", ("adapter_name",), "tuner/layer.py"),
]


def found(module: str, name: str) -> Any:
    """Get what stands there now, or fail with the sentence that a maintainer needs."""
    import peft

    use = next(use for where, what, _, use in LEANED_ON if (where, what) == (module, name))
    try:
        place: Any = importlib.import_module(module)
        for part in name.split("."):
            place = getattr(place, part)
    except (ImportError, AttributeError):
        pytest.fail(f"PEFT {peft.__version__} has no {module}.{name} any more. It is used in {use}. Adapt that file.")
    return place


@pytest.mark.parametrize(
    ("module", "name", "parameters", "use"), LEANED_ON, ids=[f"{m}.{n}" for m, n, _, _ in LEANED_ON]
)
def test_peft_still_has_what_is_leaned_on(module: str, name: str, parameters: tuple[str, ...], use: str) -> None:
    import peft

    thing = found(module, name)
    if parameters:
        accepted = inspect.signature(thing).parameters
        open_ended = any(kind.kind is inspect.Parameter.VAR_KEYWORD for kind in accepted.values())
        missing = [parameter for parameter in parameters if parameter not in accepted]
        if missing and not open_ended:
            pytest.fail(
                f"PEFT {peft.__version__}: {module}.{name} takes {', '.join(accepted)} and no {missing[0]!r} any more. "
                f"It is used in {use}. Adapt that file."
            )


def test_every_import_of_peft_stands_in_the_list() -> None:
    listed = {(module, name) for module, name, _, _ in LEANED_ON}
    missing = []
    for path in sorted((SOURCE / "tuner").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level == 0 and (node.module or "").split(".")[0] == "peft":
                missing += [
                    f"{path.name}: {node.module}.{alias.name}"
                    for alias in node.names
                    if (node.module, alias.name) not in listed
                ]
    assert missing == [], "a name that is imported from PEFT needs a line in LEANED_ON"


def test_the_enum_of_methods_can_still_be_extended() -> None:
    """A closed enum is opened by the three tables that Python keeps for it, and an attribute."""
    PeftType = found("peft.utils.peft_types", "PeftType")
    import spectune

    kind = spectune.SpectralConfig().peft_type
    assert PeftType.SPECTUNE is PeftType["SPECTUNE"] is PeftType("SPECTUNE") is kind and kind in PeftType
    assert vars(PeftType)["SPECTUNE"] is kind, "from Python 3.12 on members are found as attributes alone"
    assert kind in list(PeftType) and pickle.loads(pickle.dumps(kind)) is kind
    for table in ("_member_map_", "_value2member_map_", "_member_names_"):
        assert hasattr(PeftType, table), f"Python's enums have no {table} any more; see tuner/peft_type.py"
    assert issubclass(PeftType, str), "PeftType is no str any more; see tuner/peft_type.py"


def test_peft_still_asks_the_tuner_before_the_first_layer_is_replaced() -> None:
    """All bases are found in `_prepare_model`, in one pass: it must run once and before `_create_and_replace`."""
    import torch
    from peft import LoraConfig
    from peft.tuners.lora import LoraModel

    calls: list[str] = []

    class Watched(LoraModel):
        def _prepare_model(self, *args: Any, **kwargs: Any) -> None:
            calls.append("prepare")
            super()._prepare_model(*args, **kwargs)

        def _create_and_replace(self, *args: Any, **kwargs: Any) -> None:
            calls.append("replace")
            super()._create_and_replace(*args, **kwargs)

    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    Watched(model, LoraConfig(target_modules=["0", "1"]), "default")
    assert calls == ["prepare", "replace", "replace"], "PEFT calls its hooks in another order; see tuner/model.py"


def test_peft_still_drops_unknown_keys_by_the_words_of_python() -> None:
    """`SpectralConfig` words its error so that a file with a key of a later PEFT can be read."""
    source = inspect.getsource(importlib.import_module("peft.config"))
    assert "got an unexpected keyword argument" in source, "see _with_checked_keywords in tuner/config.py"


def test_peft_still_keeps_the_state_of_a_layer_under_these_names() -> None:
    """export/logits.py and tuner/layer.py set them directly."""
    from peft import LoraConfig, get_peft_model
    from torch import nn

    model = get_peft_model(nn.Sequential(nn.Linear(2, 2)), LoraConfig(target_modules=["0"]))
    layer = model.base_model.model[0]
    for name in ("_active_adapter", "_disable_adapters", "merged_adapters", "base_layer"):
        assert hasattr(layer, name), f"PEFT's layers have no {name} any more; see export/logits.py and tuner/layer.py"


def test_peft_still_passes_adapter_names_to_the_tuner() -> None:
    """Batches whose rows use different adapters come through this hook of the tuner."""
    source = inspect.getsource(importlib.import_module("peft.peft_model"))
    assert "_enable_peft_forward_hooks" in source, "see _enable_peft_forward_hooks in tuner/model.py"


def test_the_installed_transformers_takes_the_installed_peft() -> None:
    """transformers 5.24 wanted a PEFT that was not released: `nox -s beyond` finds the next such pair by this."""
    assert _note() is None
