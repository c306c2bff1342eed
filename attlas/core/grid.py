"""The shape of the positions.

B batch, H heads, N tokens, P prefix tokens, C channels, S... grid axes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from attlas.core.errors import BadInput


@dataclass(frozen=True)
class Grid:
    """Positions on one to three axes, after `prefix` tokens (class token, registers) that have none.

    >>> grid = Grid((2, 3), prefix=1)
    >>> grid.tokens
    7
    """

    shape: tuple[int, ...]
    prefix: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", tuple(int(size) for size in self.shape))
        if not 1 <= len(self.shape) <= 3 or min(self.shape) < 1:
            raise BadInput(f"a grid has one to three axes of at least one position, got {self.shape}")
        if self.prefix < 0:
            raise BadInput(f"prefix counts tokens and cannot be negative, got {self.prefix}")

    @classmethod
    def of(cls, value: Grid | Sequence[int] | int | None, tokens: int) -> Grid:
        """The grid that `value` means for a sequence of `tokens`; None is one axis.

        Tokens in front of the grid are prefix tokens only where `value` is a Grid that says so.
        """
        if value is None:
            return cls((tokens,))
        if isinstance(value, int):
            value = (value,)
        grid = value if isinstance(value, Grid) else cls(tuple(value))
        if grid.tokens != tokens:
            hint = ""
            if not grid.prefix and tokens > grid.tokens:
                hint = f"; with prefix tokens in front pass Grid({grid.shape}, prefix={tokens - grid.tokens})"
            raise BadInput(f"{grid} has {grid.tokens} tokens but the sequence has {tokens}{hint}")
        return grid

    @property
    def positions(self) -> int:
        """Tokens that have a position."""
        return math.prod(self.shape)

    @property
    def tokens(self) -> int:
        """All tokens, the prefix included."""
        return self.prefix + self.positions

    @property
    def rank(self) -> int:
        """How many axes the grid has."""
        return len(self.shape)

    def places(self, device: torch.device | str = "cpu") -> Tensor:
        """Coordinates of the positions in order, (positions, rank)."""
        axes = [torch.arange(size, device=device) for size in self.shape]
        return torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).flatten(0, -2)

    def split(self, x: Tensor, dim: int = -2) -> tuple[Tensor, Tensor]:
        """Cut the token axis `dim` into the prefix and the positions."""
        return x.narrow(dim, 0, self.prefix), x.narrow(dim, self.prefix, self.positions)

    def unflatten(self, x: Tensor, dim: int = -2) -> Tensor:
        """Lay positions (no prefix) out on the grid: (..., positions, C) -> (..., S1, S2, C)."""
        return x.unflatten(dim, self.shape)

    def __str__(self) -> str:
        axes = "x".join(map(str, self.shape))
        return f"grid {axes}" + (f" after {self.prefix} prefix tokens" if self.prefix else "")
