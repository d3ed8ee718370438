"""(Spectrum, trained numbers) -> Delta: one file per method, and the table that names them all."""

from .contract import Method as Method
from .table import METHODS as METHODS
from .table import build_method as build_method
