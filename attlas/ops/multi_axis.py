"""Matrices over one of two axes into which a grid is cut: over the places of a block, or over blocks at one place.

The grid is cut into blocks of equal size. One matrix mixes the places of each block, another what stands at the same
place of every block. With blocks of fixed size in the first and a fixed number of blocks in the second, the weights fit
every grid that divides.

B batch, N tokens, L blocks, P places of a block, C channels.

Source: Tu et al., "MAXIM: Multi-Axis MLP for Image Processing", 2022 (arXiv:2201.02973).
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch.nn.functional as F
from torch import Tensor, nn

from attlas.core.errors import BadInput
from attlas.core.grid import Grid


def partition(x_BNC: Tensor, grid: Grid, places: Sequence[int]) -> Tensor:
    """Tokens by block and place in it, (B, L, P, C); `places` counts them on each axis."""
    x = grid.unflatten(x_BNC)
    for axis, each in enumerate(places):
        x = x.unflatten(1 + 2 * axis, (-1, each))
    rank = len(places)
    x = x.permute(0, *range(1, 2 * rank, 2), *range(2, 2 * rank + 1, 2), 1 + 2 * rank)
    return x.flatten(1 + rank, 2 * rank).flatten(1, rank)


def join(x_BLPC: Tensor, grid: Grid, places: Sequence[int]) -> Tensor:
    """What `partition` undoes."""
    rank = len(places)
    blocks = [length // each for length, each in zip(grid.shape, places, strict=True)]
    x = x_BLPC.unflatten(2, tuple(places)).unflatten(1, blocks)
    return x.permute(0, *(axis for each in range(1, 1 + rank) for axis in (each, each + rank)), -1).flatten(1, -2)


class MultiAxisLinear(nn.Linear):
    """y = W x + b over one of the two axes, for every channel.

    Args:
        counts: places of a block on each axis, or blocks on each axis.
        across: whether blocks are counted and mixed, or the places of each.
    """

    def __init__(self, counts: Sequence[int], across: bool) -> None:
        super().__init__(prod(counts), prod(counts))
        self.counts, self.across = tuple(counts), across
        nn.init.normal_(self.weight, std=0.02)
        nn.init.zeros_(self.bias)

    def places(self, grid: Grid) -> tuple[int, ...]:
        """Of a block, on each axis.

        Raises:
            BadInput: a grid that does not divide.
        """
        if grid.rank != len(self.counts) or any(a % b for a, b in zip(grid.shape, self.counts, strict=True)):
            what = "blocks" if self.across else "places of a block"
            raise BadInput(f"a grid is cut into {self.counts} {what}, which does not divide a {grid}")
        if self.across:
            return tuple(length // count for length, count in zip(grid.shape, self.counts, strict=True))
        return self.counts

    def forward(self, x_BNC: Tensor, grid: Grid) -> Tensor:  # type: ignore[override]
        """Mix."""
        places = self.places(grid)
        x_BLPC = partition(x_BNC, grid, places)
        axis = 1 if self.across else 2
        mixed = F.linear(x_BLPC.movedim(axis, -1), self.weight, self.bias).movedim(-1, axis)
        return join(mixed, grid, places)
