"""Tasks: data, model, metric, each read from top to bottom, on one shared loop."""

from .example_yaml import commented_yaml as commented_yaml
from .recipe import Answered as Answered
from .recipe import Recipe as Recipe
from .table import RECIPES as RECIPES
from .table import load_config as load_config
from .table import parse_config as parse_config
from .table import with_reward as with_reward
