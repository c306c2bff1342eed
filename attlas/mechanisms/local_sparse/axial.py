"""Axial attention: softmax attention along one axis of a grid; the others are batch.

    o_n = Σ_m softmax_m(q_n . k_m / √D) v_m    over the m that differ from n on axis a alone; causal: m_a <= n_a

q (B, H, N, D), k and v (B, G, N, D), N positions in raster order on a grid of one to three axes. One layer per axis,
one after the other, lets every position reach every other, as in the row and column blocks of the Axial Transformer.
A causal layer looks back along its own axis only, which never is ahead in raster order.

Time O(N S D H) for an axis of S positions, O(N^(1 + 1/r) D H) on a cube of r axes. A causal layer streams in raster
order, on the grid that it was built with, and keeps the keys that later positions see: along the last axis those of
the open line, along another those of all lines that are open side by side; without a grid, or on one of one axis, all
keys. On two or three axes a stream ends where the grid does.

Source: Ho et al., "Axial Attention in Multidimensional Transformers", 2019 (arXiv:1912.12180), official code
google-research/google-research, axial.
"""

from __future__ import annotations

from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from attlas.core.errors import BadInput
from attlas.core.grid import Grid
from attlas.core.mask import Mask
from attlas.core.mechanism import Attend, Call, Cost, Site, Sizes
from attlas.core.registry import register
from attlas.core.spec import Example, Pattern, Spec
from attlas.core.state import KVCache
from attlas.ops.softmax import softmax_attention

PROJECTIONS = 4 * (16 * 16 + 16)

SPEC = Spec(
    name="axial",
    title="Axial Attention in Multidimensional Transformers",
    year=2019,
    paper="arXiv:1912.12180",
    equation="o = softmax(q kᵀ / √D along one axis of the grid) v",
    complexity="O(N S D) time for an axis of S",
    patterns=frozenset({Pattern.NONCAUSAL_SELF, Pattern.CAUSAL_SELF}),
    prefix=False,
    streams=True,
    grouped=True,
    examples=(
        Example(grid=(4, 5), parameters=PROJECTIONS),
        Example(grid=(4, 3), heads=4, kv_heads=2, params={"axis": 0}, parameters=2 * (16 * 16 + 16) + 2 * (16 * 8 + 8)),
        Example(grid=(2, 3, 2), params={"axis": 1}, parameters=PROJECTIONS),
        Example(grid=(7,), parameters=PROJECTIONS),
    ),
)


class AxialState(NamedTuple):
    """Keys and values of the open lines, and how many positions the stream has so far."""

    lines: KVCache
    place: int


@register(SPEC)
class Axial(Attend):
    """Axial attention.

    Args:
        site: where it is installed; streams on a grid of two or three axes need it there.
        backend: of the softmax attention along the lines.
        axis: of the grid, from 0, or from the last one backwards from -1.
    """

    def __init__(self, site: Site, backend: str = "auto", *, axis: int = -1) -> None:
        super().__init__(site, backend)
        if not isinstance(axis, int):
            raise BadInput(f"axis is a whole number, got {axis}")
        self.axis = axis
        if site.grid is not None:
            self._axis(site.grid)
        elif not -3 <= axis < 3:
            raise BadInput(f"axis is one of at most three, -3 to 2, got {axis}")

    def _axis(self, grid: Grid) -> int:
        """Which axis of a grid it is, from 0."""
        if not -grid.rank <= self.axis < grid.rank:
            raise BadInput(f"axis {self.axis} is not on a {grid}: take {-grid.rank} to {grid.rank - 1}")
        return self.axis % grid.rank

    def compute(self, q_BHND: Tensor, k_BGMD: Tensor, v_BGME: Tensor, call: Call) -> Tensor:
        """Lines as a batch."""
        axis, grid, keep = self._axis(call.grid), call.grid, call.mask.keys
        if q_BHND.shape[2] != k_BGMD.shape[2]:
            self._check_last(q_BHND, k_BGMD, grid)
            return self._attend(q_BHND, k_BGMD, v_BGME, call.mask)

        def lines(x: Tensor) -> Tensor:
            """(B, H, N, D) as (lines, H, S, D)."""
            return x.unflatten(2, grid.shape).movedim(2 + axis, -2).movedim(1, -3).flatten(0, -4)

        others = [length for number, length in enumerate(grid.shape) if number != axis]
        keys = None if keep is None else lines(keep[:, None, :, None])[:, 0, :, 0]
        mask = Mask(causal=call.mask.causal, keys=keys)
        o = self._attend(lines(q_BHND), lines(k_BGMD), lines(v_BGME), mask)
        return o.unflatten(0, (-1, *others)).movedim(-3, 1).movedim(-2, 2 + axis).flatten(2, -2)

    def _check_last(self, q: Tensor, k: Tensor, grid: Grid) -> None:
        home = self.site.grid or grid
        if home.rank > 1:
            raise BadInput(
                f"on a {home} every token is a query, got {q.shape[2]} queries for {k.shape[2]} keys; "
                "to go on from earlier tokens, stream"
            )

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Tensor:
        return softmax_attention(q, k, v, mask, backend=self.backend)

    def oracle(self, q_BHND: Tensor, k_BGMD: Tensor, v_BGME: Tensor, call: Call) -> Tensor:
        """Dense attention, masked to what differs on no other axis."""
        axis, keys = self._axis(call.grid), k_BGMD.shape[2]
        if q_BHND.shape[2] != keys:
            self._check_last(q_BHND, k_BGMD, call.grid)
            return softmax_attention(q_BHND, k_BGMD, v_BGME, call.mask, backend="oracle")
        differs = call.grid.places(q_BHND.device).unsqueeze(1) != call.grid.places(q_BHND.device)
        elsewhere = [number for number in range(call.grid.rank) if number != axis]
        mask = call.mask & Mask.pairs_(~differs[..., elsewhere].any(-1))
        return softmax_attention(q_BHND, k_BGMD, v_BGME, mask, backend="oracle")

    def count(self, sizes: Sizes) -> Cost:
        """Two products per visible pair; the torch backend multiplies whole lines."""
        length = sizes.grid.shape[self._axis(sizes.grid)]
        lines = sizes.batch * self.site.heads * sizes.grid.positions // length
        pairs = lines * Mask(causal=self.site.causal).area(length, length)
        return Cost(4 * pairs * self.site.head_dim, 4 * lines * length * length * self.site.head_dim, pairs)

    def initial_state(self, batch: int, like: Tensor) -> AxialState:
        """No line open."""
        if self.site.grid is None and self.axis not in (0, -1):
            raise BadInput(f"a stream along axis {self.axis} needs a grid: build the layer with grid=")
        size = self.site.head_dim
        return AxialState(KVCache.empty(batch, self.site.kv_heads, size, size, like), 0)

    def advance(
        self, q: Tensor, k: Tensor, v: Tensor, state: AxialState, keep: Tensor | None, tokens: Tensor | None
    ) -> tuple[Tensor, AxialState]:
        """Piece by piece, none longer than its lines or, where these lie across, than the places side by side."""
        end = q.shape[2]
        grid = self.site.grid or Grid((end,))
        axis = self._axis(grid)
        if grid.rank > 1 and state.place + end > grid.positions:
            raise BadInput(
                f"the {grid} has {grid.positions} positions, the stream {state.place} and {end} more: the next grid "
                "begins with initial_state"
            )
        across = prod(grid.shape[axis + 1 :])  # lines that are open side by side
        whole = state.place + end if grid.rank == 1 else across * grid.shape[axis]
        parts, start = [], 0
        while start < end:
            run = whole if across == 1 else across
            stop = min(start + run - state.place % run, end)
            lines = state.lines.append(
                k[:, :, start:stop], v[:, :, start:stop], None if keep is None else keep[:, start:stop]
            )
            parts.append(self._piece(q[:, :, start:stop], lines, across, state.place % across))
            place = state.place + stop - start
            closed = grid.rank > 1 and place % whole == 0
            state = AxialState(self.initial_state(q.shape[0], k).lines if closed else lines, place)
            start = stop
        return torch.cat(parts, 2), state

    def _piece(self, q: Tensor, lines: KVCache, across: int, first: int) -> Tensor:
        """Queries of one line; or of as many lines as there are queries, from line `first` of those side by side."""
        keys, values, keep = lines.k.rows, lines.v.rows, lines.keys
        if across == 1:
            return self._attend(q, keys, values, Mask(causal=True, keys=keep))
        count = q.shape[2]
        before = keys.shape[2] - first - count

        def column(x: Tensor) -> Tensor:
            """What the lines hold, (B, G, M, D) as (B lines, G, S, D)."""
            earlier = x[:, :, :before].unflatten(2, (-1, across))[:, :, :, first : first + count]
            mine = torch.cat([earlier, x[:, :, before + first :].unsqueeze(2)], 2)
            return mine.permute(0, 3, 1, 2, 4).flatten(0, 1)

        seen = None if keep is None else column(keep[:, None, :, None])[:, 0, :, 0]
        asked = q.transpose(1, 2).unsqueeze(3).flatten(0, 1)
        o = self._attend(asked, column(keys), column(values), Mask(keys=seen))
        return o.unflatten(0, (-1, count)).squeeze(3).transpose(1, 2)
