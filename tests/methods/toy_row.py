"""The toy's row in the table and its lines in the contract's cases; a pytest plugin, so that they are there first."""

from spectune.methods import METHODS
from tests.methods.cases import CASES
from tests.methods.toy import Toy

METHODS[Toy.name] = Toy
CASES |= {"toy": ("toy", {"r": 3}), "toy-steady": ("toy", {"r": 2, "wobble": 0.25})}
