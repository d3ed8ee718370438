"""The run that ships with the package: a real small model learns 24 languages, offline."""

from .demo import Demo as Demo
from .demo import DemoOptions as DemoOptions
from .demo import run_demo as run_demo
