"""The run that ships with the package: a real small model learns 24 languages, offline."""

from .demo import Demo as Demo
from .demo import DemoOptions as DemoOptions
from .demo import base_folder as base_folder
from .demo import opened_folder as opened_folder
from .demo import run_demo as run_demo
from .languages import LANGUAGES as LANGUAGES
from .languages import load_languages as load_languages
from .languages import write_languages as write_languages
