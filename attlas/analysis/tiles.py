"""How much of what neighborhood attention saves a tiled kernel can keep: its speed-up bound, tile by tile.

    bound(tiles) = all pairs of tiles / pairs that are visited,      bound(FLOPs) = all pairs / visible pairs

A kernel works on tiles: it takes a tile of queries and visits every tile of keys that holds a key which one of them
sees. What it visits of such a tile beyond the windows is masked, and wasted. The bound compares with a dense kernel of
the same tiles, so that it says what the shapes allow on any machine. Queries that share their window (a stride) waste
less, and where strides fit tiles nothing is wasted: the bound of the tiles is then that of the FLOPs.

Windows and tiles are products over the axes, so that axes are counted one by one and multiplied. A dilation cuts an
axis into groups, which are tiled one by one. Prefix tokens, which all see, are left out.

Source: Hassani et al., "Generalized Neighborhood Attention", 2025 (arXiv:2504.16922). Its simulator was not published
when this was written; the counts follow the definitions of the paper.

T places of a tile.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod

import torch

from attlas.core.axis import Axis
from attlas.core.errors import BadInput


@dataclass(frozen=True)
class Tiling:
    """Neighborhood attention on a grid and the tiles of a kernel.

    Attributes:
        axes: the window's rule on each axis.
        query_tile, key_tile: places of a tile on each axis, in places of a dilation group.
    """

    axes: tuple[Axis, ...]
    query_tile: tuple[int, ...]
    key_tile: tuple[int, ...]

    def __post_init__(self) -> None:
        for name, tile in (("query_tile", self.query_tile), ("key_tile", self.key_tile)):
            if len(tile) != len(self.axes) or min(tile) < 1:
                raise BadInput(f"{name} is one size of at least 1 for each of {len(self.axes)} axes, got {tile}")

    @staticmethod
    def of(
        grid: Sequence[int],
        window: Sequence[int],
        *,
        stride: Sequence[int] | int = 1,
        dilation: Sequence[int] | int = 1,
        causal: Sequence[bool] | bool = False,
        query_tile: Sequence[int],
        key_tile: Sequence[int],
    ) -> Tiling:
        """The tiling of a grid; one number holds for all axes.

        >>> Tiling.of((32,), (8,), query_tile=(4,), key_tile=(4,)).visited()
        22

        Raises:
            BadInput: settings for another number of axes, or such as have no meaning.
        """
        rank = len(grid)
        settings = []
        for name, value in (("window", window), ("dilation", dilation), ("stride", stride), ("causal", causal)):
            each = tuple(value) if isinstance(value, Sequence) else (value,) * rank
            if len(each) != rank:
                raise BadInput(f"{name} {each} is for {len(each)} axes, the grid has {rank}")
            settings.append(each)
        axes = tuple(Axis(*each) for each in zip(grid, *settings, strict=True))
        return Tiling(axes, tuple(query_tile), tuple(key_tile))

    def visits(self) -> list[list[int]]:
        """On each axis, how many tiles of keys each tile of queries visits, dilation groups one after the other."""
        return [
            [visited for group in axis.lines() for visited in _visits(axis, group, *tiles)]
            for axis, *tiles in zip(self.axes, self.query_tile, self.key_tile, strict=True)
        ]

    def visited(self) -> int:
        """Pairs of tiles that the kernel visits."""
        return prod(sum(each) for each in self.visits())

    def tiles(self) -> int:
        """Pairs of tiles of dense attention."""
        return prod(
            -(-axis.length // queries) * -(-axis.length // keys)
            for axis, queries, keys in zip(self.axes, self.query_tile, self.key_tile, strict=True)
        )

    def bound(self) -> float:
        """How many times fewer tiles than dense attention the kernel visits."""
        return self.tiles() / self.visited()

    def flop_bound(self) -> float:
        """How many times fewer pairs than dense attention are visible."""
        return prod(axis.length**2 for axis in self.axes) / prod(axis.pairs() for axis in self.axes)

    def with_strides(self, strides: Sequence[int]) -> Tiling:
        """The same with these strides."""
        if len(strides) != len(self.axes):
            raise BadInput(f"stride {tuple(strides)} is for {len(strides)} axes, the grid has {len(self.axes)}")
        return replace(self, axes=tuple(replace(axis, stride=s) for axis, s in zip(self.axes, strides, strict=True)))

    def with_stride(self, stride: int) -> Tiling:
        """The same with one stride for all axes, on each at most the window."""
        return self.with_strides([min(stride, axis.window) for axis in self.axes])

    def smallest_stride(self) -> tuple[int, ...] | None:
        """On each axis the smallest stride that wastes nothing; None where an axis has none up to its window.

        An axis wastes nothing where its tiles alone reach the bound of its FLOPs.
        """
        found = []
        for axis, queries, keys in zip(self.axes, self.query_tile, self.key_tile, strict=True):
            for stride in range(1, axis.window + 1):
                alone = Tiling((replace(axis, stride=stride),), (queries,), (keys,))
                if alone.bound() >= alone.flop_bound() * (1 - 1e-12):
                    found.append(stride)
                    break
            else:
                return None
        return tuple(found)


def _visits(axis: Axis, group: range, query_tile: int, key_tile: int) -> list[int]:
    """How many tiles of keys each tile of queries of one dilation group visits: those from its first key to its last.

    Windows of neighbouring queries overlap or touch, as a stride is at most the window, so that none lies between.
    """
    # First and last keys never fall from one query to the next: those of a tile are its first and its last query's.
    starts = torch.tensor(group[::query_tile])
    ends = (starts + (query_tile - 1) * axis.dilation).clamp(max=group[-1])
    low, high = (bound // axis.dilation for bound in axis.bounds())
    visited = high[ends] // key_tile - low[starts] // key_tile + 1
    return [int(count) for count in visited]
