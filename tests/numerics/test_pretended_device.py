"""Training on a pretended accelerator: nothing in a step is made on the CPU, and nothing waits for a value."""

from __future__ import annotations

import pytest
from torch.utils import backend_registration

from spectune import METHODS

from ..warm import script

pytestmark = pytest.mark.skipif(
    not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="this torch makes no device in Python",
)

CASES = """
import torch
from tests.numerics import pretended
from tests.models import MODELS
from spectune import METHODS

pretended.register()
kinds = ["mlp", "vit"]  # decoders make their masks by vmap, which has no kernel for such a device
"""


def test_every_method_trains_on_the_device_in_both_dtypes() -> None:
    done = script(
        CASES
        + """
for method in METHODS:
    for dtype in (torch.float32, torch.bfloat16):
        pretended.train_two_steps(MODELS["mlp"], method, dtype)
        print(method)
pretended.train_two_steps(MODELS["vit"], "spectral_a", torch.float32)
"""
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.split("\n")) == 2 * len(METHODS) + 1


FORMS = [
    {"pattern": "dense", "off_diagonals": None, "basis_rank": 5},
    {"pattern": "dense", "off_diagonals": None, "core": [5, 3]},
    {"pattern": "banded"},
    {"pattern": "plain", "off_diagonals": None},
    {"basis_rank": 4, "gate": True},
]


def test_the_patterns_of_svft_and_muon_train_on_the_device() -> None:
    done = script(
        CASES
        + f"forms = {FORMS!r}"
        + """
for form in forms:
    for kind in kinds:
        pretended.train_two_steps(MODELS[kind], "svft", torch.float32, muon=form.get("pattern") == "dense", **form)
        print(form, kind)
"""
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.split("\n")) == 2 * len(FORMS) + 1


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("delta.left_OP * torch.ones(1, 1).item()", "DataDependentOutputException"),
        ("delta.left_OP @ torch.eye(delta.left_OP.shape[1])", "FakeTensorDeviceMismatchError"),
    ],
)
def test_a_fault_of_a_layer_shows_there(line: str, words: str) -> None:
    """What the two tests above are worth: both kinds of fault, put into a layer's own arithmetic, are found."""
    done = script(
        CASES
        + f"""
from dataclasses import replace
from spectune.adapter import modules
apply = modules.apply
modules.apply = lambda delta, x: apply(replace(delta, left_OP={line}), x)
pretended.train_two_steps(MODELS["mlp"], "spectral_r", torch.float32)
"""
    )
    assert done.returncode != 0
    assert words in done.stderr
