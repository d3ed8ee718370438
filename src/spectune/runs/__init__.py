"""A run from its configuration to its folder: tried, trained, measured, read back."""

from .dry_run import DryRun as DryRun
from .dry_run import dry_run as dry_run
from .folder import Run as Run
from .load import load_base as load_base
from .load import load_run as load_run
from .look import look as look
from .measuring import measure as measure
from .provenance import machine as machine
from .provenance import versions as versions
from .range_test import RangeTest as RangeTest
from .range_test import range_test as range_test
from .result import Check as Check
from .result import Drawing as Drawing
from .result import Example as Example
from .result import LayerMove as LayerMove
from .result import LayerSpectrum as LayerSpectrum
from .result import Metric as Metric
from .result import RunResult as RunResult
from .result import Size as Size
from .spectra import layer_spectra as layer_spectra
from .train import Trained as Trained
from .train import run as run
from .train import train_run as train_run
from .updates import layer_updates as layer_updates
