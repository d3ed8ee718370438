"""`fingerprint`: the identity of a tensor's bytes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import torch

from ..errors import WeightError

# Bytes copied to the host at a time: large enough for a disk or a bus at full speed, small next to
# any model. Chosen, not measured.
BLOCK_BYTES = 16 * 2**20


def fingerprint(tensor: torch.Tensor) -> str:
    """Get the identity of a tensor: 64 hex digits, equal for equal dtype, shape and bytes.

    SHA-256 over "dtype shape" and the elements in row-major order. The device, the strides and
    requires_grad do not matter. It compares bytes and not values: 0.0 and -0.0 differ, and a bfloat16
    copy is another tensor. At most `BLOCK_BYTES` are copied at a time. `WeightError` for a tensor
    without data (meta) or without a dense layout.
    """
    if tensor.is_meta or tensor.layout is not torch.strided:
        kind = "on the meta device" if tensor.is_meta else f"of layout {tensor.layout}"
        raise WeightError(f"fingerprint: the tensor's bytes are needed, but it is {kind}. Load its data first.")
    tensor = tensor.detach().resolve_conj().resolve_neg()
    digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    for block in _blocks(tensor):
        flat = block.to("cpu").contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _blocks(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """Get the tensor in row-major pieces of at most BLOCK_BYTES (or of one element)."""
    size = tensor.numel() * tensor.element_size()
    if size <= BLOCK_BYTES:
        if size:
            yield tensor
        return
    row_bytes = size // tensor.shape[0]
    if row_bytes > BLOCK_BYTES:
        for row in tensor:
            yield from _blocks(row)
        return
    yield from torch.split(tensor, BLOCK_BYTES // row_bytes)
