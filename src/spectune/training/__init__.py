"""The training loop: a run's configuration, rates, checkpoints and processes."""

from .checkpoints import Interrupted as Interrupted
from .config import RunConfig as RunConfig
from .processes import join as join
from .rates import advice as advice
from .rates import choice as choice
from .rates import learning_rate as learning_rate
from .rates import method_of as method_of
from .rates import tuned_by as tuned_by
