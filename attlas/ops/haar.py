"""The Haar wavelet transform of tokens: orthonormal and decimated, or causal and undecimated.

N tokens, D features; any axes in front. Level i of J has details of scale 2^i.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

ROOT_HALF = math.sqrt(0.5)


def dwt(x_ND: Tensor, levels: int) -> list[Tensor]:
    """Details of level 1 to J and the last approximation, (..., ceil(N / 2^i), D) each.

    Zeros follow the last token, and what is made of them alone is left out. Orthonormal: squares sum to those of x.
    """
    a = x_ND
    details = []
    for _ in range(levels):
        a = F.pad(a, (0, 0, 0, a.shape[-2] % 2))
        even, odd = a[..., 0::2, :], a[..., 1::2, :]
        details.append((even - odd) * ROOT_HALF)
        a = (even + odd) * ROOT_HALF
    return [*details, a]


def idwt(coefficients: Sequence[Tensor], length: int) -> Tensor:
    """The first `length` tokens that `dwt` made these coefficients of, (..., length, D)."""
    *details, a = coefficients
    for d in reversed(details):
        a = a[..., : d.shape[-2], :]
        a = torch.stack([a + d, a - d], -2).flatten(-3, -2) * ROOT_HALF
    return a[..., :length, :]


def causal_scales(x_ND: Tensor, levels: int) -> list[Tensor]:
    """Details of level 1 to J and the last approximation, each (..., N, D); together they sum to x.

        a_0 = x,    a_i[t] = (a_{i-1}[t] + a_{i-1}[t - 2^(i-1)]) / 2,    d_i = a_{i-1} - a_i

    a_i[t] is the mean of the last 2^i tokens; before the first there are zeros.
    """
    a = x_ND
    details = []
    for level in range(levels):
        before = F.pad(a, (0, 0, min(1 << level, a.shape[-2]), 0))[..., : a.shape[-2], :]
        smooth = (a + before) / 2
        details.append(a - smooth)
        a = smooth
    return [*details, a]
