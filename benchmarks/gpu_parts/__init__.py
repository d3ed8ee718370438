"""The parts of benchmarks/gpu.py, one file each, ordered by worth."""

from .table import PARTS as PARTS
from .table import Part as Part
