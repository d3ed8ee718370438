"""Equal bytes, equal fingerprint; anything else differs."""

import hashlib

import pytest
import torch

from spectune.checkpoint import fingerprint
from spectune.checkpoint import fingerprint as fingerprint_function
from spectune.errors import WeightError

MODULE = __import__("sys").modules[fingerprint_function.__module__]


def test_it_is_sha256_over_dtype_shape_and_bytes():
    x = torch.arange(6.0).reshape(2, 3)
    assert fingerprint(x) == hashlib.sha256(b"torch.float32 (2, 3)" + x.numpy().tobytes()).hexdigest()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.bool, torch.int64, torch.complex64])
def test_strides_and_gradients_do_not_matter(dtype):
    x = (torch.randn(5, 7) * 3).to(dtype)
    views = [x.T.contiguous().T, torch.cat([x, x], 1)[:, :7], torch.stack([x, x], -1)[..., 0]]
    assert {fingerprint(view) for view in views} == {fingerprint(x)}
    if x.is_floating_point():
        assert fingerprint(torch.nn.Parameter(x)) == fingerprint(x)


def test_conjugate_views_count_as_their_values():
    x = torch.randn(3, dtype=torch.complex64)
    assert fingerprint(x.conj()) == fingerprint(x.conj().resolve_conj()) != fingerprint(x)


def test_dtype_shape_and_every_bit_count():
    x = torch.zeros(2, 3)
    others = [
        x.to(torch.float64),
        x.reshape(3, 2),
        -x,
        x.to(torch.int32),
        torch.zeros(0, 3),
        torch.zeros(3, 0),
    ]
    assert len({fingerprint(t) for t in [x, *others]}) == 7


@pytest.mark.parametrize("shape", [(), (1,), (100,), (1, 100), (100, 1), (7, 13), (1, 1, 5, 9)])
def test_blocks_give_the_digest_of_the_whole(shape, monkeypatch):
    x = torch.randn(shape)
    whole = fingerprint(x)
    monkeypatch.setattr(MODULE, "BLOCK_BYTES", 24)
    assert fingerprint(x) == whole


def test_no_block_is_larger_than_asked(monkeypatch):
    monkeypatch.setattr(MODULE, "BLOCK_BYTES", 64)
    for x in (torch.zeros(3, 50), torch.zeros(50, 3).T, torch.zeros(1, 1, 77)):
        blocks = list(MODULE._blocks(x))
        assert sum(block.numel() for block in blocks) == x.numel()
        assert max(block.numel() * 4 for block in blocks) <= 64


def test_a_tensor_without_bytes_is_refused():
    with pytest.raises(WeightError, match="meta device"):
        fingerprint(torch.empty(2, device="meta"))
    with pytest.raises(WeightError, match="layout"):
        fingerprint(torch.eye(2).to_sparse())
