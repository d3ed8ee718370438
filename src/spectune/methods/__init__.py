"""(Spectrum, trained numbers) -> Delta: one file per method, and the table that names them all."""

from .contract import Method as Method
from .modules import Dynamics as Dynamics
from .modules import SpectralModule as SpectralModule
from .modules import bases_as_parameters as bases_as_parameters
from .modules import modules_with_dynamics as modules_with_dynamics
from .modules import spectral_modules as spectral_modules
from .saved import base_tensor as base_tensor
from .saved import rank_for as rank_for
from .saved import saved_modules as saved_modules
from .table import METHODS as METHODS
from .table import build_method as build_method
