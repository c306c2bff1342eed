"""Tile order: the positions of a grid tile after tile, so that each tile is one run of the sequence.

A tile is a box of the grid. The grid is cut from its first position on, so that where the sizes do not divide the
last tiles of an axis reach over its end: a tile always has the same number of places, and the places off the grid
hold nothing. Tiles and the places in them are in raster order.

S... axes of the grid, B sequences, N positions, T tiles, P places of a tile.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

from attlas.core.errors import BadInput


@dataclass(frozen=True)
class TileOrder:
    """A grid cut into tiles.

    >>> order = TileOrder((4, 6), (2, 3))
    >>> order.cut(torch.arange(24), 0)[1].tolist()
    [3, 4, 5, 9, 10, 11]

    Attributes:
        shape: positions on each axis of the grid.
        tile: places of a tile on each axis, at most those of the grid.

    Raises:
        BadInput: a tile that the grid does not hold, or of another number of axes.
    """

    shape: tuple[int, ...]
    tile: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.tile) != len(self.shape):
            raise BadInput(f"a tile of {len(self.tile)} axes, {self.tile}, does not cut a grid of {len(self.shape)}")
        if any(not 1 <= side <= length for side, length in zip(self.tile, self.shape, strict=True)):
            raise BadInput(
                f"a tile has at least one place and at most those of the grid on every axis, got {self.tile} "
                f"on a grid of {self.shape}"
            )

    @property
    def counts(self) -> tuple[int, ...]:
        """Tiles on each axis."""
        return tuple(-(-length // side) for side, length in zip(self.tile, self.shape, strict=True))

    @property
    def tiles(self) -> int:
        """How many tiles there are."""
        return prod(self.counts)

    @property
    def places(self) -> int:
        """How many places a tile has, those off the grid included."""
        return prod(self.tile)

    @property
    def even(self) -> bool:
        """Whether no place is off the grid."""
        return self.tiles * self.places == prod(self.shape)

    def sizes(self) -> list[int]:
        """How many places of each tile are on the grid."""
        axes = zip(self.counts, self.tile, self.shape, strict=True)
        sides = [[min(side, length - i * side) for i in range(count)] for count, side, length in axes]
        return [prod(each) for each in itertools.product(*sides)]

    def cut(self, x: Tensor, dim: int = -2) -> Tensor:
        """Positions in raster order as tiles and places: (..., N, ...) -> (..., T, P, ...), 0 off the grid."""
        dim %= x.ndim
        x = x.unflatten(dim, self.shape)
        over = [c * t - s for c, t, s in zip(self.counts, self.tile, self.shape, strict=True)]
        if any(over):
            behind = [0] * (x.ndim - dim - len(over))
            x = F.pad(x, [side for extra in reversed([*over, *behind]) for side in (0, extra)])
        for axis in reversed(range(len(over))):
            x = x.unflatten(dim + axis, (self.counts[axis], self.tile[axis]))
        return self._flatten(self._swap(x, dim, inside_first=False), dim)

    def join(self, x: Tensor, dim: int = -3) -> Tensor:
        """What `cut` made, back in raster order: (..., T, P, ...) -> (..., N, ...); `dim` is that of the tiles."""
        dim %= x.ndim
        x = x.unflatten(dim + 1, self.tile).unflatten(dim, self.counts)
        x = self._swap(x, dim, inside_first=True)
        for axis, length in enumerate(self.shape):
            x = x.flatten(dim + axis, dim + axis + 1).narrow(dim + axis, 0, length)
        return x.flatten(dim, dim + len(self.shape) - 1)

    def _swap(self, x: Tensor, dim: int, inside_first: bool) -> Tensor:
        """(tile 1, place 1, tile 2, place 2, ...) to (tiles..., places...), or back."""
        rank = len(self.shape)
        pairs = [dim + axis + part for axis in range(rank) for part in (0, rank)]
        halves = [*range(dim, dim + 2 * rank, 2), *range(dim + 1, dim + 2 * rank, 2)]
        middle = pairs if inside_first else halves
        return x.permute(*range(dim), *middle, *range(dim + 2 * rank, x.ndim))

    def _flatten(self, x: Tensor, dim: int) -> Tensor:
        rank = len(self.shape)
        return x.flatten(dim + rank, dim + 2 * rank - 1).flatten(dim, dim + rank - 1)

    def real(self, device: torch.device | str = "cpu") -> Tensor:
        """Which places are on the grid, (T, P) bool."""
        return self.cut(torch.ones(prod(self.shape), dtype=torch.bool, device=device), 0)

    def held(self, keep_BN: Tensor | None, like_B: Tensor) -> tuple[Tensor, Tensor | None]:
        """Which places hold a token that is kept.

        Args:
            keep_BN: False for padding; None where there is none.
            like_B: anything of the B sequences, for their number and device.

        Returns:
            (B, T, P) bool, or (1, T, P) without padding; and the same as rows (B, T P), None where all places do.
        """
        held = self.real(like_B.device).unsqueeze(0) if keep_BN is None else self.cut(keep_BN, 1)
        whole = keep_BN is None and self.even
        return held, None if whole else held.flatten(1).expand(len(like_B), -1)

    def owner(self, device: torch.device | str = "cpu") -> Tensor:
        """The tile of each position in raster order, (N,)."""
        tile = torch.arange(self.tiles, device=device)
        return self.join(tile.unsqueeze(1).expand(-1, self.places), 0)
