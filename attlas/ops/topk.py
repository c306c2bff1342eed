"""The largest of a row: exactly, by sorting, and statistically, by a threshold from its mean and deviation.

Statistical top-k:

    θ = mean(x) + std(x) Q(1 - k / m),    Q the quantile function of the standard normal

over the m visible entries of the row; of normally distributed entries k exceed θ in expectation. It sorts
nothing and takes O(m). A row with k visible entries or fewer has no threshold.
"""

from __future__ import annotations

from statistics import NormalDist

import torch
from torch import Tensor

from attlas.core.errors import BadInput
from attlas.ops.precision import wide

LONG = 1 << 14
"""Rows from here on are sorted faster as integers, one by one."""


def descending(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows (..., m) from the largest to the smallest, and where each entry stood; of equal ones the first comes first.

    On a CPU PyTorch sorts long rows of integers by their digits, some five times faster than rows of numbers, and the
    bits of a number are an integer that grows with it, but for the sign. A graph that is traced sorts numbers: a loop
    over rows would fix how many there are.
    """
    plain = torch.compiler.is_compiling() or x.device.type != "cpu" or not x.numel()
    if plain or x.shape[-1] < LONG or x.dtype not in (torch.float32, torch.float64):
        values, index = x.sort(dim=-1, descending=True, stable=True)
        return values, index
    integer = torch.int32 if x.dtype == torch.float32 else torch.int64
    bits = (x + 0).contiguous().view(integer)  # -0 becomes 0
    falling = ~(bits ^ (bits >> (8 * x.itemsize - 1)) & torch.iinfo(integer).max)
    rows = [row.sort(stable=True).indices for row in falling.flatten(0, -2)]
    index = torch.stack(rows).view(x.shape)
    return x.gather(-1, index), index


def largest(x: Tensor, k: int | Tensor) -> Tensor:
    """Which entries of rows (..., m) are among the k largest of their row, bool; of equal ones the first are.

    k is one number, or one for each row, (..., 1).
    """
    index = descending(x)[1]
    best = (torch.arange(x.shape[-1], device=x.device) < k).expand_as(index)
    return torch.zeros_like(x, dtype=torch.bool).scatter(-1, index, best)


def statistical_threshold(x: Tensor, k: int, keep: Tensor | None = None) -> Tensor:
    """θ of every row, (..., 1), in float32 or better; -inf where nothing needs to go.

    Args:
        x: rows (..., m).
        k: how many entries of a row should exceed θ.
        keep: which entries are visible, (..., m) or broadcast to it; the others have no part in θ. None for all.
    """
    if k < 1:
        raise BadInput(f"k counts entries that stay and is at least 1, got {k}")
    x = wide(x)
    if keep is None:
        if k >= x.shape[-1]:
            return x.new_full((*x.shape[:-1], 1), -torch.inf)
        return x.mean(-1, keepdim=True) + _deviation(x) * NormalDist().inv_cdf(1 - k / x.shape[-1])
    count = keep.sum(-1, keepdim=True)
    limited = count > k
    mean = x.where(keep, 0).sum(-1, keepdim=True) / count.clamp(min=1)
    quantile = torch.special.ndtri(1 - k / count.where(limited, 2 * k).to(x.dtype))
    deviation = _deviation((x - mean).where(keep, 0), count.clamp(min=1))
    return (mean + deviation * quantile).where(limited, -torch.inf)


def _deviation(x: Tensor, count: Tensor | None = None) -> Tensor:
    """The biased standard deviation of rows, with a gradient of 0 where it is 0; centred rows if counted."""
    variance = x.var(-1, correction=0, keepdim=True) if count is None else x.square().sum(-1, keepdim=True) / count
    spread = variance > 0
    return variance.where(spread, 1).sqrt().where(spread, 0)


def statistical_topk(x: Tensor, k: int, keep: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Rows less their threshold, and which entries exceed it.

    Args:
        x: rows (..., m).
        k: how many entries of a row should stay.
        keep: which entries are visible, (..., m) or broadcast to it; None for all.

    Returns:
        x - θ, in the dtype of x, and x itself in rows without a threshold; bool, False for what is not visible.
    """
    threshold = statistical_threshold(x, k, keep)
    kept = wide(x) > threshold
    kept = kept if keep is None else kept & keep
    return (wide(x) - threshold.masked_fill(threshold == -torch.inf, 0)).to(x.dtype), kept
