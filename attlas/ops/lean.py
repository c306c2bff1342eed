"""Decoding by a stream-K schedule (LeanAttention): the keys of all heads, shared out evenly over the workers.

A tile is a block of keys of one output, and an output is one (sequence, key/value head) with all its queries. All
tiles are numbered, output after output, and each worker takes a consecutive range; two ranges differ by one tile at
most, whatever the heads and the lengths are. Softmax over any set of keys is a triple (m, u, w), the largest score,
the sum of the powers and the weighted sum of the values, and triples merge associatively: the worker with the first
tile of an output (its host) gathers what the workers behind it hold, and divides once. Only a worker's first output
can have another host, so one scratch slot per worker holds all partial triples.

Makespan ceil(T / workers) tiles, which is optimal; scratch workers * X * (E + 2) numbers.

Source: Sanovar et al., "Lean Attention: Hardware-Aware Scalable Attention Mechanism for the Decode-Phase of
Transformers", 2024 (arXiv:2405.10480). The causal alignment of several queries and the grouped heads as rows of one
product are ours; powers are of e, where the paper's are of 2.

B batch, H query heads, G key/value heads, R = H / G, N queries, M keys, D head size, E value size, X = R N rows,
T tiles of a schedule.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from attlas.core.errors import BadInput
from attlas.ops.dispatch import Backend, Op
from attlas.ops.flash import partial_softmax
from attlas.ops.precision import as_written, wide
from attlas.ops.scan import RunningSoftmax, merge

TILE = 256
"""Keys of a tile."""


@dataclass(frozen=True)
class Span:
    """Consecutive tiles of one output, `start` to `stop` of its `tiles`."""

    output: int
    start: int
    stop: int
    tiles: int

    def __len__(self) -> int:
        return self.stop - self.start

    @property
    def hosts(self) -> bool:
        """Whether it holds the output's first tile: its worker gathers the other partials and writes the output."""
        return self.start == 0

    @property
    def finishes(self) -> bool:
        """Whether it holds the output's last tile."""
        return self.stop == self.tiles


@dataclass(frozen=True)
class Schedule:
    """Which tiles each worker computes.

    Attributes:
        workers: the spans of each worker, in its order.
        slots: how many partial triples the scratch must hold.
    """

    workers: tuple[tuple[Span, ...], ...]
    slots: int

    @property
    def loads(self) -> list[int]:
        """How many tiles each worker computes."""
        return [sum(map(len, spans)) for spans in self.workers]

    @property
    def makespan(self) -> int:
        """How many tiles the busiest worker computes: the time until all are done."""
        return max(self.loads)

    @property
    def occupancy(self) -> float:
        """The share of the workers' time that is spent on tiles; 1 of no tiles."""
        return sum(self.loads) / (len(self.workers) * self.makespan) if self.makespan else 1.0

    def scratch_bytes(self, rows: int, value: int) -> int:
        """Bytes of the partial triples in float32, for outputs of `rows` queries and values of size `value`."""
        return 4 * self.slots * rows * (value + 2)


def schedule(tile_counts: Sequence[int], workers: int) -> Schedule:
    """Stream-K: all tiles, output after output, cut into one range per worker.

    The tile counts of causal prefill are those of `attlas.ops.flash.tiles`, one output per tile of queries.

    Args:
        tile_counts: of each output; 0 is an output without keys.
        workers: that run at the same time.

    Raises:
        BadInput: a negative count or no worker.

    >>> plan = schedule([10] * 56, 108)
    >>> plan.makespan, sorted(set(plan.loads)), round(plan.occupancy, 3)
    (6, [5, 6], 0.864)
    """
    _check_counts(tile_counts, workers)
    least, longer = divmod(sum(tile_counts), workers)
    pending = [Span(output, 0, tiles, tiles) for output, tiles in enumerate(tile_counts) if tiles][::-1]
    plan = []
    for worker in range(workers):
        room, spans = least + (worker < longer), []
        while room:
            span = pending.pop()
            cut = min(span.stop, span.start + room)
            spans.append(Span(span.output, span.start, cut, span.tiles))
            if cut < span.stop:
                pending.append(Span(span.output, cut, span.stop, span.tiles))
            room -= len(spans[-1])
        plan.append(tuple(spans))
    return Schedule(tuple(plan), slots=workers)


def one_worker_per_output(tile_counts: Sequence[int], workers: int) -> Schedule:
    """FlashAttention-2's: an output is never divided; the next one goes to the worker that is free first.

    >>> one_worker_per_output([10] * 56, 108).makespan
    10
    """
    return fixed_split(tile_counts, workers, 1)


def fixed_split(tile_counts: Sequence[int], workers: int, parts: int) -> Schedule:
    """Flash-Decoding's: every output in `parts` parts of equal size; the next one goes to the worker free first.

    Every part of a divided output is written to scratch, for a second launch that merges them.

    >>> fixed_split([10] * 56, 108, 2).makespan
    10
    """
    _check_counts(tile_counts, workers)
    if parts < 1:
        raise BadInput(f"an output is split into at least one part, got {parts}")
    plan: list[list[Span]] = [[] for _ in range(workers)]
    free = [(0, worker) for worker in range(workers)]
    slots = 0
    for output, tiles in enumerate(tile_counts):
        size = max(-(-tiles // parts), 1)
        pieces = [Span(output, start, min(start + size, tiles), tiles) for start in range(0, tiles, size)]
        slots += len(pieces) if len(pieces) > 1 else 0
        for piece in pieces:
            busy, worker = free[0]
            heapq.heapreplace(free, (busy + len(piece), worker))
            plan[worker].append(piece)
    return Schedule(tuple(map(tuple, plan)), slots)


def _check_counts(tile_counts: Sequence[int], workers: int) -> None:
    if workers < 1:
        raise BadInput(f"a schedule needs at least one worker, got {workers}")
    for output, tiles in enumerate(tile_counts):
        if tiles < 0:
            raise BadInput(f"output {output} has {tiles} tiles")


def _lengths(q: Tensor, k: Tensor, v: Tensor, lengths_B: Tensor | None) -> list[int]:
    """How many keys each sequence has, after checking what was given."""
    if q.shape[1] % k.shape[1] or k.shape[:3] != v.shape[:3] or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise BadInput(
            "queries (B, H, N, D), keys (B, G, M, D) and values (B, G, M, E) with H a multiple of G, "
            f"got {tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)}"
        )
    batch, keys = q.shape[0], k.shape[2]
    if lengths_B is None:
        return [keys] * batch
    if lengths_B.shape != (batch,) or lengths_B.is_floating_point() or lengths_B.dtype == torch.bool:
        raise BadInput(
            f"lengths are {batch} integers, one per sequence, got {lengths_B.dtype} {tuple(lengths_B.shape)}"
        )
    lengths = lengths_B.tolist()
    for sequence, length in enumerate(lengths):
        if not 0 <= length <= keys:
            raise BadInput(f"sequence {sequence} has length {length}, the cache holds 0 to {keys} keys")
    return lengths


def _oracle(
    q_BHND: Tensor,
    k_BGMD: Tensor,
    v_BGME: Tensor,
    lengths_B: Tensor | None = None,
    *,
    workers: int,
    tile: int = TILE,
    causal: bool = True,
    scale: float | None = None,
) -> Tensor:
    """Softmax attention of one or few queries per sequence over caches of different lengths.

    Args:
        q_BHND, k_BGMD, v_BGME: queries, keys, values; H is a multiple of G.
        lengths_B: how many of the M keys each sequence has, all by default. What lies behind is not read.
        workers: among which the tiles are shared out; the result does not depend on it.
        tile: keys of a tile; the result does not depend on it.
        causal: whether the queries are the last N of a sequence's positions and see no later one. A single
            query sees all keys either way.
        scale: of the scores, D ** -0.5 by default.

    Returns:
        (B, H, N, E); a query that sees nothing, as in an empty sequence, gives 0.

    Raises:
        BadInput: shapes that do not fit together, or a length that the cache does not hold.
    """
    scale = q_BHND.shape[3] ** -0.5 if scale is None else scale
    shared = q_BHND.shape[1] // k_BGMD.shape[1]
    o = torch.zeros(*q_BHND.shape[:3], v_BGME.shape[3], dtype=wide(q_BHND).dtype, device=q_BHND.device)
    for b, length in enumerate(_lengths(q_BHND, k_BGMD, v_BGME, lengths_B)):
        for h in range(q_BHND.shape[1]):
            for n in range(q_BHND.shape[2]):
                reach = length - q_BHND.shape[2] + n + 1 if causal else length
                if reach > 0:
                    scores_M = wide(k_BGMD[b, h // shared, :reach]) @ wide(q_BHND[b, h, n]) * scale
                    o[b, h, n] = scores_M.softmax(0) @ wide(v_BGME[b, h // shared, :reach])
    return o.to(q_BHND.dtype)


def _torch(
    q_BHND: Tensor,
    k_BGMD: Tensor,
    v_BGME: Tensor,
    lengths_B: Tensor | None = None,
    *,
    workers: int,
    tile: int = TILE,
    causal: bool = True,
    scale: float | None = None,
) -> Tensor:
    return _execute(q_BHND, k_BGMD, v_BGME, lengths_B, workers, tile, causal, scale, range(max(workers, 0)))


def _execute(
    q_BHND: Tensor,
    k_BGMD: Tensor,
    v_BGME: Tensor,
    lengths_B: Tensor | None,
    workers: int,
    tile: int,
    causal: bool,
    scale: float | None,
    order: Sequence[int],
) -> Tensor:
    """One worker after the other, in the given order, then the hosts gather."""
    lengths = _lengths(q_BHND, k_BGMD, v_BGME, lengths_B)
    if tile < 1:
        raise BadInput(f"a tile holds at least one key, got {tile}")
    scale = q_BHND.shape[3] ** -0.5 if scale is None else scale
    groups, queries = k_BGMD.shape[1], q_BHND.shape[2]
    counts = [-(-length // tile) for length in lengths for _ in range(groups)]
    plan = schedule(counts, workers)
    # The query heads that share keys are rows of one product: every key is read once.
    q_OXD = (wide(q_BHND) * scale).unflatten(1, (groups, -1)).flatten(2, 3).flatten(0, 1)
    k_OMD, v_OME = k_BGMD.flatten(0, 1), v_BGME.flatten(0, 1)
    row = torch.arange(q_OXD.shape[1], device=q_OXD.device).unsqueeze(1) % queries

    def attend(span: Span) -> RunningSoftmax:
        length = lengths[span.output // groups]
        runs = []
        for start in range(span.start * tile, min(span.stop * tile, length), tile):
            stop = min(start + tile, length)
            scores_Xm = q_OXD[span.output] @ wide(k_OMD[span.output, start:stop]).mT
            if causal and stop > length - queries + 1:  # the first query does not see all of it
                key = torch.arange(start, stop, device=row.device)
                scores_Xm = scores_Xm.masked_fill(key > length - queries + row, -torch.inf)
            runs.append(partial_softmax(scores_Xm, wide(v_OME[span.output, start:stop])))
        return reduce(merge, runs)

    hosted: dict[int, tuple[int, Span, RunningSoftmax]] = {}
    slots: dict[int, tuple[Span, RunningSoftmax]] = {}
    with as_written(q_OXD):
        for worker in order:
            for span in plan.workers[worker]:
                if span.hosts:
                    hosted[span.output] = worker, span, attend(span)
                else:
                    slots[worker] = span, attend(span)
    o_OXE = q_OXD.new_zeros(*q_OXD.shape[:2], v_BGME.shape[3])
    for output, (host, span, run) in hosted.items():
        following = host
        while not span.finishes:
            following += 1
            span, partial = slots[following]
            run = merge(run, partial)
        o_OXE[output] = run.average
    o_BGXE = o_OXE.unflatten(0, (len(lengths), groups))
    return o_BGXE.unflatten(2, (-1, queries)).flatten(1, 2).to(q_BHND.dtype)


lean_attention = Op("lean_attention", Backend("torch", _torch), Backend("oracle", _oracle))
