"""Training runs: data, model, metric, each read from top to bottom, on one shared loop."""

from .checkpoints import Interrupted as Interrupted
from .demo import Demo as Demo
from .demo import DemoOptions as DemoOptions
from .demo import run_demo as run_demo
from .dry_run import DryRun as DryRun
from .dry_run import dry_run as dry_run
from .example_yaml import commented_yaml as commented_yaml
from .lr_range import RangeTest as RangeTest
from .lr_range import range_test as range_test
from .rates import advice as advice
from .rates import learning_rate as learning_rate
from .rates import method_of as method_of
from .recipe import Answered as Answered
from .recipe import Recipe as Recipe
from .run_config import RunConfig as RunConfig
from .runs import RunResult as RunResult
from .runs import Trained as Trained
from .runs import load_run as load_run
from .runs import measure as measure
from .runs import run as run
from .runs import train_run as train_run
from .table import RECIPES as RECIPES
from .table import load_config as load_config
from .table import parse_config as parse_config
