"""The way from maps to tokens and back.

B batch, N tokens, C channels, H and W the height and width of a map.
"""

from __future__ import annotations

from torch import Tensor

from attlas.core.grid import Grid


def to_tokens(x_BCHW: Tensor) -> tuple[Tensor, Grid]:
    """A map as tokens (B, H W, C), and how they lie; a view where channels lie innermost in memory.

    Both ways keep the strides of the batch axis ordinary: with a batch of 1 and others, the backward pass of PyTorch's
    batch norm (2.11 to 2.15) is wrong.
    """
    return x_BCHW.permute(0, 2, 3, 1).flatten(1, 2), Grid(tuple(x_BCHW.shape[2:]))


def to_map(x_BNC: Tensor, grid: Grid) -> Tensor:
    """Tokens without a prefix as a map (B, C, H, W), a view."""
    return x_BNC.unflatten(1, grid.shape).permute(0, 3, 1, 2)
