"""What mechanisms that cut a grid into blocks share: settings for every axis, and what a forward costs."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from attlas.core.axis import Block
from attlas.core.errors import BadInput
from attlas.core.mechanism import Cost, Site, Sizes


def per_axis(name: str, value: int | Sequence[int], rank: int) -> tuple[int, ...]:
    """The setting of each axis; one number holds for all.

    Raises:
        BadInput: a setting for another number of axes.
    """
    if not isinstance(value, Sequence):
        return (value,) * rank
    if len(value) != rank:
        raise BadInput(f"{name} {tuple(value)} is for {len(value)} axes, the grid has {rank}")
    return tuple(value)


def block_cost(site: Site, sizes: Sizes, axes: Sequence[Block], score: int | None = None) -> Cost:
    """Scores and values of the visible pairs; the torch backend multiplies the border's blocks as if they were whole.

    Args:
        site, sizes: of the mechanism and of the call.
        axes: the rule of every axis of the grid.
        score: features of a query that the torch backend multiplies, those of a head by default.
    """
    size, prefix, positions = site.head_dim, sizes.grid.prefix, sizes.grid.positions
    either = prefix * (prefix + 2 * positions)
    pairs = either + prod(axis.pairs() for axis in axes)
    executed = either + positions * prod(axis.window + 2 * axis.halo for axis in axes)
    heads = sizes.batch * site.heads
    score = size if score is None else score
    return Cost(4 * heads * pairs * size, 2 * heads * executed * (score + size), heads * pairs)
