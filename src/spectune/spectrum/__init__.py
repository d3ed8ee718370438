"""Weight -> Spectrum."""

from .align import align as align
from .align import sketch as sketch
from .align import sketch_tolerance as sketch_tolerance
from .align import sketch_width as sketch_width
from .engine import SOLVERS as SOLVERS
from .engine import decompose as decompose
