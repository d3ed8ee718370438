"""The PEFT glue, and the only room that imports peft. Importing it registers the method there."""

from . import register as register
from .any_method import build_adapter_config as build_adapter_config
from .attach import attach as attach
from .attach import load_attached as load_attached
from .attach import load_beside as load_beside
from .attach import swap_adapter as swap_adapter
from .base_weight import keep_unpacked as keep_unpacked
from .config import SpectralConfig as SpectralConfig
from .foreign_file import bounded_config as bounded_config
from .kinds import SpectralLinear as SpectralLinear
from .layer import SpectralLayer as SpectralLayer
from .model import SpectralTuner as SpectralTuner
from .prepare import AWAY_SHARE as AWAY_SHARE
from .prepare import layers_of as layers_of
from .prepare import prepare as prepare
from .prepare import wanted as wanted
from .svd_options import SVDOptions as SVDOptions

register.register()
