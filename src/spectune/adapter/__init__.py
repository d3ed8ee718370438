"""An adapter on one weight: live in a model, or in a file."""

from .adapted_models import ADAPTERS_ATTRIBUTE as ADAPTERS_ATTRIBUTE
from .adapted_models import attach_dynamics as attach_dynamics
from .adapted_models import bases_as_parameters as bases_as_parameters
from .adapted_models import in_eval_mode as in_eval_mode
from .adapted_models import spectral_modules as spectral_modules
from .autocast import in_own_dtype as in_own_dtype
from .autocast import is_autocast as is_autocast
from .dynamics import Dynamics as Dynamics
from .kept_basis import BASIS as BASIS
from .modules import SpectralModule as SpectralModule
from .offloading import at_hand as at_hand
from .offloading import forward_of as forward_of
from .offloading import gathered as gathered
from .offloading import is_cut as is_cut
from .rules import GRADIENT_NORMS as GRADIENT_NORMS
from .saved import base_tensor as base_tensor
from .saved import saved_modules as saved_modules
from .sharing import Owners as Owners
from .sharing import group_of as group_of
from .sharing import kind_of_layer as kind_of_layer
