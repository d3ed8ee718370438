"""A run on one page: the record of what was done, its spectra, its charts, and the HTML that shows them."""

from .page import write_report as write_report
from .run_record import Example as Example
from .run_record import LayerSpectrum as LayerSpectrum
from .run_record import Metric as Metric
from .run_record import Proof as Proof
from .run_record import RunRecord as RunRecord
from .run_record import Size as Size
from .run_record import machine as machine
from .run_record import versions as versions
from .spectra import layer_spectra as layer_spectra
