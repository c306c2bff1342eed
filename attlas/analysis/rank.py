"""How many directions a matrix has: of an attention map, and of what comes out of it.

With s the singular values of the matrix and p = s / sum s,

    numerical rank = number of s above a share of the largest        effective rank = exp(-sum p log p)

A product of N x D features with D x N features has a rank of at most D, which a softmax lifts: rows of linear attention
with a small head cannot differ as much as rows of softmax attention.

Sources: Fan et al., "Breaking the Low-Rank Dilemma of Linear Attention", 2024 (arXiv:2411.07635); the effective rank is
Roy and Vetterli's, 2007.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from attlas.analysis.implied import implied_matrix, listen
from attlas.core.errors import Unsupported
from attlas.core.grid import Grid
from attlas.core.mechanism import Mixer


def numerical_rank(x: Tensor, tolerance: float = 1e-6) -> Tensor:
    """The singular values above `tolerance` times the largest, of matrices (..., N, M); 0 of zeros."""
    s = torch.linalg.svdvals(x)
    return (s > tolerance * s[..., :1]).sum(-1)


def effective_rank(x: Tensor) -> Tensor:
    """The exponential of the entropy of the singular values, of matrices (..., N, M); 0 of zeros.

    >>> import torch
    >>> round(float(effective_rank(torch.eye(5))), 4)
    5.0
    """
    s = torch.linalg.svdvals(x)
    total = s.sum(-1, keepdim=True)
    p = s / total.where(total > 0, 1)
    return (-p.xlogy(p).sum(-1)).exp().where(total.squeeze(-1) > 0, 0)


class Ranks(NamedTuple):
    """Ranks of a layer's map, mean over heads, and of its output (N, C); means over sequences.

    Attributes:
        numerical, effective: of the implied matrix; None where there is none.
        output_numerical, output_effective: of the output.
        refusal: why there is no implied matrix, or None.
    """

    numerical: float | None
    effective: float | None
    output_numerical: float
    output_effective: float
    refusal: str | None = None


@torch.no_grad()
def ranks(layer: Mixer, x_BNC: Tensor, *, grid: Grid | Sequence[int] | None = None) -> Ranks:
    """The ranks of a layer in float64 on these tokens."""
    y_BNC = layer(x_BNC, grid=grid)
    output = float(numerical_rank(y_BNC).double().mean()), float(effective_rank(y_BNC).mean())
    try:
        weights_BHNM = implied_matrix(listen(layer, x_BNC, grid=grid))
    except Unsupported as refusal:
        return Ranks(None, None, *output, str(refusal))
    return Ranks(
        float(numerical_rank(weights_BHNM).double().mean()), float(effective_rank(weights_BHNM).mean()), *output
    )
