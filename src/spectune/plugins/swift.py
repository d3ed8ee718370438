"""The ms-swift tuner: `swift sft --external_plugins …/spectune/plugins/swift.py --tuner_type spectral_a …`.

Only ms-swift imports this file, by its path. `--lora_rank` is the method's r; the environment variable
SPECTUNE_ADAPTER has further options, as YAML: `{columns: bottom, svd: {tolerance: 1e-4}}`.
"""

from __future__ import annotations

import os
from typing import Any

from swift.tuner_plugin import PeftTuner, tuners_map

from spectune.errors import OptionError
from spectune.methods import METHODS
from spectune.plugins.options import config_of, value_of
from spectune.tuner import attach

OPTIONS = "SPECTUNE_ADAPTER"


class SpectuneTuner(PeftTuner):  # type: ignore[misc, unused-ignore]
    """A tuner of ms-swift; it saves and loads as PEFT's do."""

    @staticmethod
    def prepare_model(args: Any, model: Any) -> Any:
        """Get the model with a new adapter of the method that `--tuner_type` names."""
        options = value_of(OPTIONS, [os.environ.get(OPTIONS, "{}")])
        if not isinstance(options, dict):
            raise OptionError(f"{OPTIONS}={options!r}: must be options with values, such as {{r: 8}}.")
        targets = args.target_regex or args.target_modules
        targets = "all-linear" if isinstance(targets, list) and "all-linear" in targets else targets
        r = args.lora_rank if "r" in METHODS[args.tuner_type].options() else None
        known = {"target_modules": targets or None, "modules_to_save": args.modules_to_save or None, "r": r}
        return attach(model, config_of(args.tuner_type, options, task_type="CAUSAL_LM", **known))


tuners_map.update(dict.fromkeys(METHODS, SpectuneTuner))
