"""What mixers with a recurrent state share: the sizes of heads, sequences without their gaps, a short convolution.

B batch, N tokens, C channels, L lags.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from attlas.core.errors import BadInput
from attlas.ops.lags import lagged_sum


def head_size(name: str, share: float, dim: int, heads: int) -> int:
    """Features of a head where all heads together have `share` of `dim` channels; else `BadInput` naming it."""
    width = round(share * dim) if share > 0 else 0
    if width < 1 or abs(width - share * dim) > 1e-6 or width % heads:
        raise BadInput(f"{name} times dim splits into heads: {share} of {dim} channels do not split into {heads} heads")
    return width // heads


def alone(run: Callable[[Tensor], Tensor], x_BNC: Tensor, keep_BN: Tensor | None) -> Tensor:
    """`run` on each sequence alone, (1, n, C) -> (1, n, C), as if its padding were not there; 0 for padding."""
    if keep_BN is None:
        return torch.cat([run(x_1NC) for x_1NC in x_BNC.split(1)])
    y_BNC = torch.zeros_like(x_BNC)
    for b, keep_N in enumerate(keep_BN):
        if keep_N.any():
            y_BNC[b, keep_N] = run(x_BNC[b : b + 1, keep_N])[0]
    return y_BNC


def short_convolution(
    x_BNC: Tensor, w_LC: Tensor, tail_BLC: Tensor, keep_BN: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The weighted sum of each token and the L - 1 real ones before it: padding between them is skipped.

    Args:
        x_BNC: tokens.
        w_LC: a weight for each channel at each lag.
        tail_BLC: the last L - 1 real tokens before these, zeros for those that there are not.
        keep_BN: False where there is no token.

    Returns:
        (B, N, C), 0 for padding, and the tail behind the last token.
    """
    before, tokens = tail_BLC.shape[1], x_BNC.shape[1]
    if keep_BN is None:
        rows = torch.cat([tail_BLC, x_BNC], 1)
        return lagged_sum(rows, w_LC, tokens), rows[:, tokens:]
    # Moved to the end in their order, real tokens have nothing but the tail and then padding before them.
    rows = torch.cat([tail_BLC, x_BNC.masked_fill(~keep_BN.unsqueeze(-1), 0)], 1)
    real = torch.cat([keep_BN.new_ones(keep_BN.shape[0], before), keep_BN], 1)
    order = real.int().argsort(dim=1, stable=True)
    rows = _take(rows, order)
    place = (order.argsort(dim=1)[:, before:] - before).clamp(min=0)
    y = _take(lagged_sum(rows, w_LC, tokens), place)
    return y.masked_fill(~keep_BN.unsqueeze(-1), 0), rows[:, tokens:]


def _take(x_BNC: Tensor, place_BN: Tensor) -> Tensor:
    return x_BNC.gather(1, place_BN.unsqueeze(-1).expand(-1, -1, x_BNC.shape[2]))
