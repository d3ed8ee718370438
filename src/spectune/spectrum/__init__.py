"""Weight -> Spectrum."""

from .align import align as align
from .align import sketch as sketch
from .align import sketch_tolerance as sketch_tolerance
from .align import sketch_width as sketch_width
from .cache import BasisCache as BasisCache
from .cache import default_folder as default_folder
from .cache import open_cache as open_cache
from .cache import parse_bytes as parse_bytes
from .data import DIRECTIONS as DIRECTIONS
from .data import Moments as Moments
from .data import OthersInputs as OthersInputs
from .data_spectra import FOREIGN_GAIN as FOREIGN_GAIN
from .data_spectra import DataSpectra as DataSpectra
from .data_spectra import gain_off as gain_off
from .distributed import all_have as all_have
from .distributed import as_the_first as as_the_first
from .distributed import is_first as is_first
from .distributed import processes as processes
from .engine import SOLVERS as SOLVERS
from .engine import Request as Request
from .engine import decompose as decompose
from .engine import decompose_many as decompose_many
from .entry import Key as Key
from .obtain import obtain as obtain
from .stream import Done as Done
from .stream import fill_cache as fill_cache
