"""What some examples say of each number that an adapter could train: its gradient before the first step."""

from __future__ import annotations

import torch
import torch.distributed as dist

from ..algebra import apply
from ..methods import Method
from ..records import Spectrum

SCORES = {
    "fisher": "the mean over batches of the squared gradient, E[g^2]",
    "gradient": "the squared mean gradient, E[g]^2: what a step on all examples gains",
}


class NumberScores:
    """One score for each number of a method on one weight, from the inputs x and output gradients g of the batches.

    The gradients are those of the trained numbers at their start, through the factors of the update: for a dense core
    U^T G V, G the gradient of the weight. No O x I matrix is made. Kept is one number for each that may be trained.
    """

    def __init__(self, kind: str, method: Method, spectrum: Spectrum) -> None:
        self.kind, self.method, self.tokens = kind, method, 0
        self.spectrum = spectrum.to(dtype=torch.float32)
        device = spectrum.S_R.device
        self.frozen = {name: tensor.to(device) for name, tensor in method.frozen(self.spectrum).items()}
        start = method.start(*spectrum.shape[:2])
        self.start = {name: tensor.to(device).requires_grad_() for name, tensor in start.items()}
        self.sums = {name: torch.zeros_like(tensor, requires_grad=False) for name, tensor in self.start.items()}

    def add(self, x_NI: torch.Tensor, g_NO: torch.Tensor) -> None:
        """Add the inputs of one batch and the gradients of the loss with respect to the outputs."""
        self.tokens += len(x_NI)
        with torch.enable_grad():
            delta = self.method.delta(self.spectrum, self.start, self.frozen)
            first_order = (apply(delta, x_NI.float()) * g_NO.float()).sum()
        found = torch.autograd.grad(first_order, list(self.start.values()), allow_unused=True)
        for sums, g in zip(self.sums.values(), found, strict=True):
            if g is not None:
                sums += g.square() if self.kind == "fisher" else g

    def add_up(self) -> None:
        """Add what the other processes of a distributed run have seen."""
        tokens = torch.tensor(float(self.tokens))
        for sums in (*self.sums.values(), tokens):
            parcel = sums.cuda() if "nccl" in dist.get_backend() else sums.cpu()
            dist.all_reduce(parcel)
            dist.broadcast(parcel, src=0)  # equal sums need not have equal last bits on two machines
            sums.copy_(parcel)
        self.tokens = int(tokens)

    def totals(self) -> dict[str, torch.Tensor]:
        """Get trained tensor -> scores of its numbers, up to a factor that all weights have in common."""
        return {name: sums if self.kind == "fisher" else sums.square() for name, sums in self.sums.items()}
