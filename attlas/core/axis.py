"""Which positions of one axis see which, as intervals around each query: the rules of local attention on grids.

N queries, W keys of a window.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from attlas.core.errors import BadInput


class Windows(NamedTuple):
    """The window of each query, all (N, W).

    `key` is where each key stands and `seen` whether the query sees it; `entry` is how far it
    stands behind the first place that any window reaches, `reach` places before the query.
    """

    key: Tensor
    seen: Tensor
    entry: Tensor


@dataclass(frozen=True)
class Axis:
    """Which positions of one axis see which.

    A dilation cuts the axis into groups, the positions of equal remainder; everything below happens
    inside one group. A stride cuts the group into runs of queries that share the window of their leader.
    Not causal: the leader is the run's middle (of an even run the right one), the window reaches
    `window // 2` places to the left of it and the rest to the right, and where it would cross a border it
    is shifted inwards, so that it always holds `window` places. Causal: the leader is the run's last
    query, the window is the `window` places that end there, and a query sees those up to itself.

    Attributes:
        length: positions of the axis.
        window: places of the window.
        dilation: distance between neighbouring places of the window.
        stride: queries that share a window; 1 is sliding, `window` is blocked.
        causal: whether a position sees no later one.

    Raises:
        BadInput: a window that does not fit into an axis that is not causal, a stride that does not fit into the
            window.
    """

    length: int
    window: int
    dilation: int = 1
    stride: int = 1
    causal: bool = False

    def __post_init__(self) -> None:
        if min(self.window, self.dilation, self.stride) < 1:
            raise BadInput(
                f"window, dilation and stride are at least 1, got {self.window}, {self.dilation} and {self.stride}"
            )
        if self.stride > self.window:
            raise BadInput(
                f"stride {self.stride} is more than window {self.window}: some keys would be in no window; "
                f"take a stride of at most {self.window}"
            )
        if not self.causal and self.window * self.dilation > self.length:
            largest = {"window": self.length // self.dilation, "dilation": self.length // self.window}
            cures = [f"a {name} of at most {most}" for name, most in largest.items() if most]
            raise BadInput(
                f"window {self.window} with dilation {self.dilation} spans {self.window * self.dilation} "
                f"positions, the axis has {self.length}; take {' or '.join(cures) or 'less of both'}"
            )

    @property
    def reach(self) -> int:
        """The largest distance between a query and a key that it sees, in places."""
        return self.window - 1

    @property
    def full(self) -> bool:
        """Whether every query sees as many keys as the window has places."""
        return not self.causal

    def sees(self, query: Tensor, key: Tensor) -> Tensor:
        """The rule, on broadcasting positions of queries and of keys."""
        place, leader, size = self._group(query)
        other = key // self.dilation
        together = query % self.dilation == key % self.dilation
        if self.causal:
            return together & (other <= place) & (leader - other < self.window)
        left = self.window // 2
        right = self.window - 1 - left
        centre = leader.clamp(min=left).minimum(size - 1 - right)
        return together & (other >= centre - left) & (other <= centre + right)

    def windows(self, queries: int, device: torch.device | str = "cpu") -> Windows:
        """The windows of the last `queries` positions."""
        query = torch.arange(self.length - queries, self.length, device=device)
        place, leader, size = self._group(query)
        if self.causal:
            first = leader - (self.window - 1)
        else:
            first = (leader - self.window // 2).clamp(min=0).minimum(size - self.window)
        key = first.unsqueeze(1) + torch.arange(self.window, device=device)
        ahead = key - place.unsqueeze(1)
        seen = (key >= 0) & (ahead <= 0) if self.causal else torch.ones_like(key, dtype=torch.bool)
        position = key.clamp(min=0) * self.dilation + (query % self.dilation).unsqueeze(1)
        return Windows(position, seen, ahead + self.reach)

    def bounds(self) -> tuple[Tensor, Tensor]:
        """The first and the last key that each position sees, both (length,); those between are `dilation` apart."""
        query = torch.arange(self.length)
        place, leader, size = self._group(query)
        if self.causal:
            first, last = (leader - (self.window - 1)).clamp(min=0), place
        else:
            first = (leader - self.window // 2).clamp(min=0).minimum(size - self.window)
            last = first + self.window - 1
        line = query % self.dilation
        return first * self.dilation + line, last * self.dilation + line

    def lines(self) -> list[range]:
        """The positions in runs, `dilation` apart, whose queries see no key of another run."""
        return [range(first, self.length, self.dilation) for first in range(self.dilation)]

    def pairs(self) -> int:
        """How many (query, key) pairs see one another."""
        if not self.causal:
            return self.length * self.window
        place, leader, _ = self._group(torch.arange(self.length))
        return int((place - (leader - self.window + 1).clamp(min=0) + 1).sum())

    def _group(self, query: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Inside the query's dilation group: its place, its leader's place, how many places there are."""
        place = query // self.dilation
        size = (self.length - 1 - query % self.dilation) // self.dilation + 1
        lead = self.stride - 1 if self.causal else self.stride // 2
        return place, (place // self.stride * self.stride + lead).minimum(size - 1), size


@dataclass(frozen=True)
class Block:
    """Which positions of one axis see which, where the axis is cut into blocks.

    A query sees its own block and `halo` places to either side of it, inside the axis. With a shift the first block
    holds so many places, which is what shifting the axis round and masking what came from the other side gives;
    the last block holds what remains. The length need not be a multiple of the window.

    Attributes:
        length: positions of the axis.
        window: places of a block.
        shift: places of the first block; 0 if it is a whole one.
        halo: places that are seen to either side.

    Raises:
        BadInput: a window that is larger than the axis, a shift of a window or more.
    """

    length: int
    window: int
    shift: int = 0
    halo: int = 0

    causal = False
    dilation = 1

    def __post_init__(self) -> None:
        if self.window < 1 or min(self.shift, self.halo) < 0:
            raise BadInput(
                f"a block holds a position at least, shift and halo are not negative, got window {self.window}, "
                f"shift {self.shift} and halo {self.halo}"
            )
        if self.window > self.length:
            raise BadInput(f"window {self.window} is larger than the axis; take one of at most {self.length}")
        if self.shift >= self.window:
            raise BadInput(f"shift {self.shift} is not less than window {self.window}; take it modulo the window")

    @property
    def reach(self) -> int:
        """The largest distance between a query and a key that it sees."""
        return self.window + self.halo - 1

    @property
    def full(self) -> bool:
        """Whether every query sees as many keys as the window has places."""
        return self.length % self.window == self.shift == self.halo == 0

    def sees(self, query: Tensor, key: Tensor) -> Tensor:
        """The rule, on broadcasting positions of queries and of keys."""
        first, end = self._borders(query)
        return (key >= first - self.halo) & (key < end + self.halo)

    def windows(self, queries: int, device: torch.device | str = "cpu") -> Windows:
        """The windows of the last `queries` positions."""
        query = torch.arange(self.length - queries, self.length, device=device).unsqueeze(1)
        first, end = self._borders(query)
        key = first - self.halo + torch.arange(self.window + 2 * self.halo, device=device)
        seen = (key >= 0) & (key < (end + self.halo).clamp(max=self.length))
        return Windows(key.clamp(0, self.length - 1), seen, (key - query + self.reach).clamp(0, 2 * self.reach))

    def bounds(self) -> tuple[Tensor, Tensor]:
        """The first and the last key that each position sees, both (length,)."""
        first, end = self._borders(torch.arange(self.length))
        return (first - self.halo).clamp(min=0), (end - 1 + self.halo).clamp(max=self.length - 1)

    def lines(self) -> list[range]:
        """The blocks."""
        borders = [0, *range(self.shift or self.window, self.length, self.window), self.length]
        return [range(first, end) for first, end in pairwise(borders)]

    def pairs(self) -> int:
        """How many (query, key) pairs see one another."""
        ends = [(max(0, line.start - self.halo), min(self.length, line.stop + self.halo)) for line in self.lines()]
        return sum(len(line) * (end - first) for line, (first, end) in zip(self.lines(), ends, strict=True))

    def _borders(self, query: Tensor) -> tuple[Tensor, Tensor]:
        """Where the query's block begins and ends, inside the axis."""
        first = (query - self.shift).div(self.window, rounding_mode="floor") * self.window + self.shift
        return first.clamp(min=0), (first + self.window).clamp(max=self.length)
