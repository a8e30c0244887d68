"""A bf16 copy of the fp32 weights for forward and backward (`--precision bf16-weights`).

Mixed-precision training with master weights (Micikevicius et al. 2018), without loss scaling
because bf16 has the range of fp32.
"""

from __future__ import annotations

import copy

import torch

from fastirt.model.encoder import Encoder


class Bf16Copy:
    """`encoder` is `master` in bf16: one cast of all weights per step, and bf16 activations.

    Not a module, so that state dicts hold only the master.
    """

    def __init__(self, master: Encoder) -> None:
        self.encoder = copy.deepcopy(master).to(torch.bfloat16)
        self._masters = [*master.parameters(), *master.buffers()]
        self._weights = [*self.encoder.parameters(), *self.encoder.buffers()]

    @torch.no_grad()
    def copy_weights(self) -> None:
        """Copy the master's weights and drop the copy's gradients."""
        torch._foreach_copy_(self._weights, self._masters)
        for weight in self._weights:
            weight.grad = None

    @torch.no_grad()
    def copy_gradients(self) -> None:
        """Set the master's gradients, in fp32."""
        pairs = [(m, w.grad) for m, w in zip(self._masters, self._weights) if w.grad is not None]
        for master, _ in pairs:
            master.grad = torch.empty_like(master)
        torch._foreach_copy_([master.grad for master, _ in pairs], [gradient for _, gradient in pairs])
