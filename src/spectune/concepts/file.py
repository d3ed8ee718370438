"""`read_concept`: a run of text_to_image from its YAML file, and the commented file to begin with."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, get_type_hints

from ..errors import OptionError, nearest
from ..training.yaml_file import read_yaml
from ..tuner import build_adapter_config
from .options import ADAPTED, ConceptOptions

RECIPE = "text_to_image"
PLACES = ("pipeline", "images", "masks")

EXAMPLE = """\
# Teach a Stable Diffusion pipeline a concept from a few pictures.
recipe: text_to_image
pipeline: stable-diffusion              # folder of a diffusers pipeline: one UNet, one text encoder, a VAE
images: my-dog                          # 3 to 10 pictures; captions in metadata.jsonl or NAME.txt where they differ
token: <my-dog>                         # the new word; leave it out to use words that the base knows
initial_word: dog                       # what the word starts from
caption: a photo of {token}             # of pictures without one of their own
unet: {method: spectral_a, r: 8, target_modules: [to_q, to_k, to_v, to_out.0, conv1, conv2, conv_shortcut]}
# text_encoder: {method: spectral_a, r: 8, target_modules: [q_proj, k_proj, v_proj, out_proj]}
# unet_rate: null                       # learning rates; null is the method's own
# text_encoder_rate: null
# token_rate: 0.001
steps: 500
# batch_size: 2
# seed: 0
prior_prompts: [a photo of a dog]       # the base draws these first, and they are learned beside the concept
# prior_images: 32
# prior_weight: 1.0
# snr_gamma: null                       # 5 weighs the noise levels by min-SNR
# masks: null                           # folder with NAME.png for every picture: white where the loss counts
validation_prompts: ["{token} on a beach", a dog on a beach]
validation_every: 100
# sampling_steps: 20
# guidance: 7.5
"""


def is_concept(path: str | Path) -> bool:
    """Tell whether a YAML file is a run of this recipe."""
    return read_yaml(path).get("recipe") == RECIPE


def read_concept(path: str | Path, overrides: Iterable[str] = ()) -> ConceptOptions:
    """Get the checked options of a run; `OptionError` for an unknown key, a missing one, or a wrong type of value."""
    values = read_yaml(path, overrides)
    values.pop("recipe", None)
    hints, known = get_type_hints(ConceptOptions), {field.name: field for field in fields(ConceptOptions)}
    for key, value in values.items():
        if key not in known:
            raise OptionError(f"{path}: {key}: unknown key. {nearest(key, list(known))}")
        values[key] = _value(str(path), key, value, hints[key])
    missing = [name for name, field in known.items() if field.default is MISSING and name not in values]
    if missing:
        raise OptionError(f"{path}: {missing[0]}: must be given. `spectune init {RECIPE}` prints an example.")
    return ConceptOptions(**values)


def _value(where: str, key: str, value: Any, hint: Any) -> Any:
    if value is None:
        return None
    if key in ADAPTED:
        if not isinstance(value, dict):
            raise OptionError(f"{where}: {key}: found {value!r}, the options of an adapter are wanted: {{method: …}}.")
        return build_adapter_config(value)
    if key in PLACES:
        return Path(str(value)).expanduser()
    if hint == tuple[str, ...]:
        return (value,) if isinstance(value, str) else tuple(map(str, value))
    kinds = [kind for kind in (int, float, str) if kind is hint or kind in getattr(hint, "__args__", ())]
    fits = any(isinstance(value, kind) or (kind is float and isinstance(value, int)) for kind in kinds)
    if isinstance(value, bool) or not fits:
        names = " or ".join(kind.__name__ for kind in kinds)
        raise OptionError(f"{where}: {key}: found {value!r}, {names} is wanted.")
    return value
