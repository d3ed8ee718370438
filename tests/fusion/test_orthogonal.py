"""Rows of one orthogonal matrix: what the rule promises, and what it refuses."""

from __future__ import annotations

import pytest
import torch

from spectune.algebra import dense
from spectune.errors import AdapterError
from spectune.fusion.orthogonal import Orthogonal

from .parts import lora_part, orthogonal_part


def test_an_input_along_one_concepts_rows_meets_that_concept_alone() -> None:
    parts = [orthogonal_part("a", 0, 1), orthogonal_part("b", 1, 2), orthogonal_part("c", 4, 3)]
    fused = dense(Orthogonal().fuse(parts, [1.0] * 3).delta)
    for part in parts:
        rows_RI = part.delta.right_QI
        torch.testing.assert_close(fused @ rows_RI.mT, dense(part.delta) @ rows_RI.mT, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("second", "line"),
    [
        (orthogonal_part("b", 0, 2), "layer: the rows of two adapters are not orthogonal .*b has rows 0 to 2"),
        (orthogonal_part("b", 1, 2, basis_seed=5), "b has rows 3 to 5 of basis_seed 5"),
        (orthogonal_part("b", 1, 2, r=2), "b has rows 2 to 3"),
    ],
)
def test_rows_that_are_not_disjoint_are_refused(second: object, line: str) -> None:
    parts = [orthogonal_part("a", 0, 1), second]
    with pytest.raises(AdapterError, match=line):
        Orthogonal().fuse(parts, [0.5, 0.5])
    together = sum(dense(part.delta) for part in parts)
    torch.testing.assert_close(dense(Orthogonal(allow_overlap=True).fuse(parts, [0.5, 0.5]).delta), together / 2)


def test_other_methods_are_refused() -> None:
    with pytest.raises(
        AdapterError, match="rule 'orthogonal' only takes orthogonal_adaptation adapters, but b is a LoRA"
    ):
        Orthogonal().fuse([orthogonal_part("a", 0, 1), lora_part("b", 2, 2)], [1.0, 1.0])
