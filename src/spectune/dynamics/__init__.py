"""What is done to the trained numbers right before each optimizer step: SpecAdapt's two rules, for every method."""

from .attach import attach_dynamics as attach_dynamics
from .attach import watch_every_optimizer as watch_every_optimizer
from .rules import GRADIENT_NORMS as GRADIENT_NORMS
from .rules import decay_by_spectrum as decay_by_spectrum
from .rules import normalise_gradients as normalise_gradients
