"""Training runs: data, model, metric, each read from top to bottom, on one shared loop."""

from .demo import Demo as Demo
from .demo import DemoOptions as DemoOptions
from .demo import run_demo as run_demo
