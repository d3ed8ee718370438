"""The experiments of the papers, ready to run at full size and small."""

from .computations import COMPUTATIONS as COMPUTATIONS
from .computations import Computed as Computed
from .experiments import Experiment as Experiment
from .experiments import experiment_names as experiment_names
from .experiments import load_experiment as load_experiment
from .experiments import prepare as prepare
