"""Spark-FFN: a feed-forward layer whose first inputs predict which neurons fire.

    y = V (GELU(top-k(K₁ᵀ x¹)) ⊙ K₂ᵀ x²),    x = [x¹; x²],  x¹ the first r channels

top-k is statistical: relu(s - θ) with θ of `attlas.ops.topk`. F neurons take 2 C F weights; a gated layer of
2/3 F neurons takes as many. Only active columns of K₂ and rows of V are needed: 2 (r F + k (C - r) + k C)
FLOPs per token, k of F neurons active.

x (..., C), F neurons, r predicting channels.

Source: You et al., "Spark Transformer", 2025 (arXiv:2506.06644); no official code. Gemma-2 2B in this form has
C = 2304, F = 13824, k = 1106 (8 %). r = 1024 of it is from memory, and by default r is as near to 4/9 C.
GELU is Gemma's, by tanh.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attlas.core.errors import BadInput
from attlas.ops.topk import statistical_topk


class SparkFFN(nn.Module):
    """A feed-forward layer with about `active` of `width` neurons active.

    Args:
        dim: C.
        width: F, the neurons.
        active: k, about how many fire; 8 % by default. `active = width` has no threshold.
        predictor: r, how many channels predict.
    """

    def __init__(self, dim: int, width: int, active: int | None = None, predictor: int | None = None) -> None:
        super().__init__()
        active = max(1, round(0.08 * width)) if active is None else active
        predictor = max(1, round(dim * 4 / 9)) if predictor is None else predictor
        if not 0 < active <= width:
            raise BadInput(f"active is 1 to {width}, the neurons there are, got {active}")
        if not 0 < predictor < dim:
            raise BadInput(f"predictor is 1 to {dim - 1}, less than the {dim} channels, got {predictor}")
        self.active, self.parts = active, (predictor, dim - predictor)
        self.predict = nn.Linear(predictor, width, bias=False)
        self.gate = nn.Linear(dim - predictor, width, bias=False)
        # One row per neuron, so that active ones are read whole.
        self.values = nn.Parameter(torch.empty(width, dim))
        nn.init.uniform_(self.values, -(width**-0.5), width**-0.5)

    def _active(self, first: Tensor) -> tuple[Tensor, Tensor]:
        """GELU of what exceeds the threshold, 0 elsewhere, and which neurons that is."""
        shifted, kept = statistical_topk(self.predict(first), self.active)
        return F.gelu(shifted, approximate="tanh").where(kept, 0), kept

    def forward(self, x: Tensor) -> Tensor:
        """All neurons, for training and long sequences."""
        first, second = x.split(self.parts, -1)
        return (self._active(first)[0] * self.gate(second)) @ self.values

    def gathered(self, x: Tensor) -> Tensor:
        """The same, token by token from the active neurons alone; for decoding."""
        return torch.stack([self._token(token) for token in x.reshape(-1, x.shape[-1])]).reshape(x.shape)

    def _token(self, x_C: Tensor) -> Tensor:
        first, second = x_C.split(self.parts)
        fired, kept = self._active(first)
        which = kept.nonzero().squeeze(-1)
        gate, values = (weight.index_select(0, which) for weight in (self.gate.weight, self.values))
        return (fired[which] * (gate @ second)) @ values
