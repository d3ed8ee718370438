"""What must hold on CUDA: the checks of part a of benchmarks/gpu.py; on a CPU the test of the script runs them."""

from __future__ import annotations

import pytest
import torch
from gpu_parts.correctness import listed
from gpu_parts.notebook import NotHere

CHECKS = dict(listed("cuda", "inductor"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", list(CHECKS))
def test_it_holds_on_cuda(name: str) -> None:
    try:
        CHECKS[name]()
    except NotHere as why:
        pytest.skip(str(why))
