"""Which queries look at which keys, as the tiles that `tiles.cpp` goes through.

A tile is up to 64 queries and the runs of keys that any of them sees, with bits for who sees what.

P plans, N queries, M keys, R runs of queries, C blocks of keys, n queries and U keys of a tile.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from math import prod
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from attlas.core.axis import Axis, Block

QUERIES = 64
"""Of a tile at most, as in the C++ source."""

LANES = 16

FEW_ROWS = 16
"""A run of fewer queries would leave lanes empty: its queries are sorted by the blocks that they see instead."""

RANGE = 2048
"""Queries that are sorted together: what was summed for them stays in the cache."""

SIZES = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 24, 32, 48, 64)
"""Lengths of a tile along an axis that are tried."""

SPEED = {16: 0.7, 32: 0.9, 48: 0.85, 64: 1.0}
"""Of products with so many lanes, about."""

PACKING = 6
"""Lanes whose products take as long as packing a key."""

KEPT = 64 << 20

Ints = NDArray[np.int64]


class Plan(NamedTuple):
    """The lists of `Plan` in `tiles.cpp`, by the same names, and numbers beside them.

    `heads` is (batch or 1, heads or 1): how many plans there are. `groups` is how many groups each has, `work` how many
    pairs the largest goes through, hidden ones included, and `pairs` how many all of them see, but for causality.
    """

    group_start: Tensor
    tile_start: Tensor
    query: Tensor
    query_begin: Tensor
    query_end: Tensor
    run_begin: Tensor
    run_end: Tensor
    run_first: Tensor
    run_count: Tensor
    pattern: Tensor | None
    seen: Tensor | None
    entry: Tensor | None
    heads: tuple[int, int]
    step: int
    once: bool
    groups: int
    work: int
    pairs: int

    @property
    def nbytes(self) -> int:
        """Of all lists."""
        return sum(x.nbytes for x in self if isinstance(x, Tensor))


_kept: dict[object, Plan] = {}


class _AxisTile(NamedTuple):
    """Some queries of one axis, the first and last key that each of them sees, and all these keys."""

    axis: Axis | Block
    query: Ints
    low: Ints
    high: Ints
    key: Ints

    @property
    def form(self) -> bytes:
        """What tiles have in common that differ in their place alone."""
        return (np.stack([self.query, self.low, self.high]) - self.key[0]).tobytes() + bytes(
            f"{len(self.key)}", "ascii"
        )

    @property
    def seen(self) -> NDArray[np.bool_]:
        """Which query sees which key, (n, U)."""
        return (self.key >= self.low[:, None]) & (self.key <= self.high[:, None])

    @property
    def entry(self) -> Ints:
        """The place in the axis's bias table, (n, U)."""
        axis = self.axis
        ahead = self.key // axis.dilation - self.query[:, None] // axis.dilation
        return (ahead + axis.reach).clip(0, 2 * axis.reach)


class _Line:
    """A line of an axis: its queries, and the first and last key of each."""

    def __init__(self, axis: Axis | Block, line: range, low: Ints, high: Ints) -> None:
        self.axis, self.query = axis, np.array(line)
        self.low, self.high = low[self.query], high[self.query]

    def keys(self, size: int) -> int:
        """Keys of all tiles of up to `size` queries."""
        starts = np.arange(0, len(self.query), size)
        span = np.maximum.reduceat(self.high, starts) - np.minimum.reduceat(self.low, starts)
        return int((span // self.axis.dilation + 1).sum())

    def tiles(self, size: int) -> Iterator[_AxisTile]:
        """Tiles of up to `size` queries."""
        for start in range(0, len(self.query), size):
            query, low, high = (x[start : start + size] for x in (self.query, self.low, self.high))
            key = np.arange(low.min(), high.max() + 1, self.axis.dilation)
            yield _AxisTile(self.axis, query, low, high, key)


def _lines(axis: Axis | Block, queries: int) -> list[_Line]:
    """The lines of an axis, with the last `queries` positions as queries."""
    low, high = (bound.numpy() for bound in axis.bounds())
    first = axis.length - queries
    lines = [line[max(0, -(-(first - line.start) // line.step)) :] for line in axis.lines()]
    return [_Line(axis, line, low, high) for line in lines if line]


def _sizes(axes: list[list[_Line]]) -> tuple[int, ...]:
    """The lengths of a tile that make the least work."""
    keys = [{size: sum(line.keys(size) for line in lines) for size in SIZES} for lines in axes]

    def cost(sizes: tuple[int, ...]) -> float:
        lanes = -(-prod(sizes) // LANES) * LANES
        met = prod(each[size] for each, size in zip(keys, sizes, strict=True))
        return met * (lanes / SPEED[lanes] + PACKING)

    possible = itertools.product(SIZES, repeat=len(axes))
    return min((sizes for sizes in possible if prod(sizes) <= QUERIES), key=cost)


@dataclass
class _Builder:
    """Collects tiles that differ in their queries, and shares what they have in common."""

    biased: bool
    query: list[Ints] = field(default_factory=list)
    runs: list[Ints] = field(default_factory=list)
    pattern: list[int] = field(default_factory=list)
    words: list[Ints] = field(default_factory=list)
    entries: list[NDArray[np.int32]] = field(default_factory=list)
    known: dict[object, tuple[int, int]] = field(default_factory=dict)
    length: int = 0
    work: int = 0
    pairs: int = 0

    def add(self, query: Ints, runs: Ints, pattern: tuple[int, int]) -> None:
        self.query.append(query)
        self.runs.append(runs)
        self.pattern.append(pattern[0])
        self.work += len(query) * int(runs[:, 1].sum())
        self.pairs += pattern[1]

    def place(self, key: object, seen: NDArray[np.bool_], entry: Ints) -> tuple[int, int]:
        """Where the bits (n, U) and entries stand, and how many pairs are seen.

        Where everything is seen and nothing added, they stand nowhere: -1.
        """
        everything = bool(seen.all()) and not self.biased
        self.known[key] = pattern = (-1 if everything else self.length, int(seen.sum()))
        if everything:
            return pattern
        bits = np.zeros((seen.shape[1], QUERIES), dtype=np.uint8)
        bits[:, : len(seen)] = seen.T
        self.words.append(np.packbits(bits, 1, "little").view(np.int64)[:, 0])
        if self.biased:
            spread = np.zeros(bits.shape, dtype=np.int32)
            spread[:, : len(entry)] = entry.T
            self.entries.append(spread)
        self.length += len(bits)
        return pattern

    def plan(self, step: int) -> Plan:
        tiles = len(self.query)
        query_end, run_end = (np.cumsum([len(x) for x in lists]) for lists in (self.query, self.runs))
        runs = np.concatenate(self.runs)
        patterned = bool(self.words)
        return Plan(
            torch.tensor([0, tiles]),
            torch.arange(tiles + 1),
            _int32(np.concatenate(self.query)),
            torch.from_numpy(query_end - [len(x) for x in self.query]),
            torch.from_numpy(query_end),
            torch.from_numpy(run_end - [len(x) for x in self.runs]),
            torch.from_numpy(run_end),
            _int32(runs[:, 0]),
            _int32(runs[:, 1]),
            torch.tensor(self.pattern) if patterned else None,
            torch.from_numpy(np.concatenate(self.words)) if patterned else None,
            torch.from_numpy(np.concatenate(self.entries)) if self.biased else None,
            (1, 1),
            step,
            True,
            tiles,
            self.work,
            self.pairs,
        )


def _int32(x: Ints) -> Tensor:
    return torch.from_numpy(x.astype(np.int32))


def plan_axes(axes: tuple[Axis | Block, ...], queries: int, prefix: int, context: int, biased: bool) -> Plan:
    """Neighborhoods: see `attlas.ops.neighborhood` for what is asked. `queries` counts prefix tokens.

    The last plans are kept, up to `KEPT` bytes of them.
    """
    asked = (axes, queries, prefix, context, biased)
    plan = _kept.pop(asked, None) or _plan_axes(*asked)
    _kept[asked] = plan  # the newest last
    while len(_kept) > 1 and sum(each.nbytes for each in _kept.values()) > KEPT:
        _kept.pop(next(iter(_kept)), None)
    return plan


def _plan_axes(axes: tuple[Axis | Block, ...], queries: int, prefix: int, context: int, biased: bool) -> Plan:
    missing = prefix + prod(axis.length for axis in axes) - queries  # of a plain sequence, positions without a query
    lines = [_lines(axis, axis.length - missing) for axis in axes]
    sizes = _sizes(lines)
    strides = [prod(axis.length for axis in axes[i + 1 :]) for i in range(len(axes))]
    step, common = axes[-1].dilation, context + prefix
    tokens = common + prod(axis.length for axis in axes)
    nowhere = prod(2 * axis.reach + 1 for axis in axes)  # the entry of keys without a position
    builder = _Builder(biased)
    in_front = _strided(common, step)

    tiles = [[tile for line in each for tile in line.tiles(size)] for each, size in zip(lines, sizes, strict=True)]
    for parts in itertools.product(*tiles):
        query = (
            _outer_sum([part.query * stride for part, stride in zip(parts, strides, strict=True)]) + prefix - missing
        )
        firsts = [part.key * stride for part, stride in zip(parts[:-1], strides, strict=False)]
        first = _outer_sum([*firsts, parts[-1].key[:1]]) + common
        runs = np.concatenate([in_front, np.stack([first, np.full_like(first, len(parts[-1].key))], 1)])
        key = tuple(part.form for part in parts)
        if key in builder.known:
            builder.add(query, runs, builder.known[key])
            continue
        seen = functools.reduce(np.kron, [part.seen for part in parts])
        seen = np.concatenate([np.ones((len(query), common), dtype=bool), seen], 1)
        entry = np.concatenate([np.full((len(query), common), nowhere), _entries(axes, parts)], 1)
        builder.add(query, runs, builder.place(key, seen, entry))

    causal = all(axis.causal for axis in axes)
    for start in range(0, prefix, QUERIES):
        query = np.arange(start, min(start + QUERIES, prefix))
        runs = _strided(common if causal else tokens, step)
        token = np.concatenate([first + step * np.arange(count) for first, count in runs])
        seen = token <= query[:, None] + context if causal else np.ones((len(query), len(token)), dtype=bool)
        builder.add(query, runs, builder.place(start, seen, np.full(seen.shape, nowhere)))
    return builder.plan(step)


def _strided(keys: int, step: int) -> Ints:
    """The first `keys` keys as runs of keys `step` apart."""
    return np.array([(first, -(-(keys - first) // step)) for first in range(min(step, keys))], dtype=np.int64).reshape(
        -1, 2
    )


def _outer_sum(parts: list[Ints]) -> Ints:
    return functools.reduce(lambda a, b: (a[:, None] + b).ravel(), parts)


def _entries(axes: tuple[Axis | Block, ...], parts: tuple[_AxisTile, ...]) -> Ints:
    """The places in a flattened bias table, (n, U)."""
    whole = parts[0].entry
    for axis, part in zip(axes[1:], parts[1:], strict=True):
        joined = whole[:, None, :, None] * (2 * axis.reach + 1) + part.entry[None, :, None, :]
        whole = joined.reshape(len(whole) * len(part.query), -1)
    return whole


def plan_blocks(chosen: Tensor, rows: int, columns: int, queries: int, keys: int) -> Plan:
    """Chosen blocks (batch or 1, heads or 1, R, C): see `attlas.ops.block_sparse`."""
    if rows < FEW_ROWS:
        return _plan_choices(chosen.repeat_interleave(rows, 2)[:, :, :queries], columns, keys)
    batch, heads, runs, blocks = chosen.shape
    plans = batch * heads
    where = chosen.reshape(plans * runs, blocks)
    end = where.sum(1).cumsum(0)
    begin = end - where.sum(1)
    first = where.nonzero()[:, 1] * columns
    count = (keys - first).clamp(max=columns)

    each = -(-rows // QUERIES)  # tiles of a run
    size = -(-rows // each)
    start = torch.arange(runs).unsqueeze(1) * rows + torch.arange(each) * size
    stop = (start + size).minimum((torch.arange(1, runs + 1) * rows).unsqueeze(1)).clamp(max=queries)
    run = torch.arange(runs).unsqueeze(1).expand_as(start)
    real = start < stop
    start, stop, run = start[real], stop[real], run[real]
    tiles = len(start)
    of_run = (torch.arange(plans).unsqueeze(1) * runs + run).flatten()
    met = F.pad(count.cumsum(0), (1, 0))
    visited = ((met[end] - met[begin])[of_run].view(plans, tiles) * (stop - start)).sum(1).tolist()
    return Plan(
        torch.arange(plans + 1) * tiles,
        torch.arange(plans * tiles + 1),
        torch.arange(queries, dtype=torch.int32),
        start.repeat(plans),
        stop.repeat(plans),
        begin[of_run],
        end[of_run],
        first.int(),
        count.int(),
        None,
        None,
        None,
        (batch, heads),
        1,
        True,
        tiles,
        max(visited),
        sum(visited),
    )


def _plan_choices(chosen: Tensor, columns: int, keys: int) -> Plan:
    """Each query (batch or 1, heads or 1, N, C) its own blocks.

    The queries of a range that see a block make its tiles. A query is in as many tiles as it sees blocks.
    """
    batch, heads, queries, blocks = chosen.shape
    size = min(RANGE, queries)
    plans, ranges = batch * heads, -(-queries // size)
    whole = F.pad(chosen.reshape(plans, queries, blocks), (0, 0, 0, ranges * size - queries))
    sorted_ = whole.view(plans, ranges, size, blocks).transpose(2, 3).contiguous()
    count = sorted_.sum(-1).flatten()  # of (plan, range, block)
    query = sorted_.nonzero()
    query = query[:, 1] * size + query[:, 3]
    tiles = -(-count // QUERIES)
    bucket = torch.repeat_interleave(torch.arange(len(count)), tiles)
    nth = torch.arange(len(bucket)) - (tiles.cumsum(0) - tiles)[bucket]
    begin = (count.cumsum(0) - count)[bucket] + nth * QUERIES
    end = (begin + QUERIES).minimum(count.cumsum(0)[bucket])
    block = bucket % blocks
    first = torch.arange(blocks) * columns
    width = (keys - first).clamp(max=columns)
    visited = (count.view(-1, blocks) * width).view(plans, -1).sum(1).tolist()
    return Plan(
        torch.arange(plans + 1) * ranges,
        F.pad(tiles.view(-1, blocks).sum(1).cumsum(0), (1, 0)),
        query.int(),
        begin,
        end,
        block,
        block + 1,
        first.int(),
        width.int(),
        None,
        None,
        None,
        (batch, heads),
        1,
        False,
        ranges,
        max(visited),
        sum(visited),
    )
