"""Combiner-Mixture: own row and column key by key, the rest twice, as parts of columns and as parts of rows.

Tokens lie in rows of S places. Query (s, u) sees in one softmax

    directly:    its row up to itself, its column above
    as regions:  of every other column, what stands above row s
                 of every row above, what stands left of column u, and what stands right of it

A region has one key K and one value E = Σ_j p(j | Ω) v_j, p(j | Ω) = softmax_j(Q . k_j / √D), with K and Q the
largest key and the largest query of its members, feature by feature, which running maxima give for all regions at once.
Every query gives every key up to itself a positive weight and all of them sum to 1. A key outside the query's row and
column is in two regions and its weight is the sum of both: a mixture. Not causal, a query also sees the rest of its row
and column, of every other column what stands below row s, and parts of the rows below it.

q, k, v (B, H, N, D). Rows are those of a grid of two axes; on one axis every `segment` tokens are a row. The last row
may be shorter. Padding is no member of a region; regions of padding alone, and empty ones, are seen by nobody.

Time O(N (S + N / S) D), with rows of √N places O(N √N D). The causal state is all keys and values, the summaries of
left and right parts of finished rows, those of columns above the open row, and that row's queries.

Source: Ren et al., "Combiner: Full Attention Transformer with Sparse Computation Cost", 2021 (arXiv:2107.05768),
official code google-research/google-research, combiner. Causal, this is its JAX layer; its TensorFlow one sums where
that takes the maximum. Only TensorFlow has a layer that is not causal: it gives empty regions a logit of 0, counts the
query itself twice, and parts of its own row and column among the regions. Ours is the causal one to both sides instead.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from attlas.core.mask import Mask
from attlas.core.mechanism import Attend, Call, Cost, Site, Sizes
from attlas.core.registry import register
from attlas.core.spec import Example, Pattern, Spec
from attlas.core.state import KVCache, Rows
from attlas.ops.combiner import (
    Regions,
    Slots,
    by_segments,
    cached,
    combined_weights,
    cut,
    joint_attention,
    no_queries_missing,
    real_tokens,
    regions_before,
    regions_behind,
    row_length,
    row_width,
    valued,
)
from attlas.ops.pairs import weighted_values
from attlas.ops.precision import wide
from attlas.ops.softmax import blank_padding

PROJECTIONS = 4 * 16 * 16

SPEC = Spec(
    name="combiner_mixture",
    title="Combiner: Full Attention Transformer with Sparse Computation Cost",
    year=2021,
    paper="arXiv:2107.05768",
    equation="o = softmax over row, column, parts of other columns, left and right parts of other rows",
    complexity="O(N √N D) time, O(N D) state",
    patterns=frozenset({Pattern.NONCAUSAL_SELF, Pattern.CAUSAL_SELF}),
    grids=(1, 2),
    prefix=False,
    streams=True,
    shell={"bias": False, "out_bias": False},
    examples=(
        Example(grid=(11,), params={"segment": 4}, parameters=PROJECTIONS),
        Example(grid=(7,), parameters=PROJECTIONS),
        Example(grid=(3, 4), heads=4, parameters=PROJECTIONS),
    ),
)


class MixtureState(NamedTuple):
    """What the open row sees and what it will leave.

    Attributes:
        tokens: keys and values of all finished rows.
        left, right: summaries of their left and right parts, as caches of as many rows.
        above: summaries (B, H, S, D) of the columns above the open row.
        query: the largest query of each of those columns, (B, H, S, D).
        q, row: queries, keys and values of the open row.
    """

    tokens: KVCache
    left: KVCache
    right: KVCache
    above: Regions
    query: Tensor
    q: Rows
    row: KVCache


@register(SPEC)
class CombinerMixture(Attend):
    """Combiner with axial attention and a mixture of regions.

    Args:
        site: where it is installed; its length or its grid gives the rows theirs.
        backend: `auto`, `torch` or `oracle`.
        segment: places of a row, on one axis; the root of the site's length by default, rounded up.
    """

    def __init__(self, site: Site, backend: str = "auto", *, segment: int | None = None) -> None:
        super().__init__(site, backend)
        self.segment = row_length(site, segment)

    def compute(self, q_BHND: Tensor, k_BHMD: Tensor, v_BHMD: Tensor, call: Call) -> Tensor:
        """Summaries of all parts by running maxima, then one softmax."""
        no_queries_missing(q_BHND.shape[2], k_BHMD.shape[2])
        tokens, width = q_BHND.shape[2], row_width(call.grid, self.segment)
        scale = q_BHND.shape[3] ** -0.5
        blanked = blank_padding(call.mask.keys, q_BHND, k_BHMD, v_BHMD)
        q, k, v = (cut(x, width) for x in blanked)
        real = cut(real_tokens(call.mask.keys, q_BHND), width, 1).unsqueeze(1)
        row, column = (torch.arange(count, device=q.device) for count in q.shape[2:4])
        rows_seen, columns_seen = (x.unsqueeze(1) != x for x in (row, column))
        own_row = torch.ones_like(columns_seen)
        if call.mask.causal:
            rows_seen, own_row = row < row.unsqueeze(1), column <= column.unsqueeze(1)
        other_rows = rows_seen.unsqueeze(1)

        def down(live_BHTU: Tensor) -> Tensor:
            """Live slots of a column, as its queries (T, U) see them."""
            return live_BHTU.transpose(2, 3).unsqueeze(2) & other_rows

        q_up, k_up, v_up, real_up = (x.transpose(2, 3) for x in (q, k, v, real))
        slots = [
            Slots(k, v, real.unsqueeze(-2) & own_row),
            Slots(k, v, down(real), across=True),
        ]
        for regions_of in (regions_before,) if call.mask.causal else (regions_before, regions_behind):
            part = regions_of(q_up, k_up, v_up, real_up, scale)
            keys, values, live = part.keys.transpose(2, 3), part.values.transpose(2, 3), part.live.transpose(2, 3)
            slots.append(Slots(keys, values, live.unsqueeze(-2) & columns_seen))
        for regions_of in (regions_before, regions_behind):
            part = regions_of(q, k, v, real, scale)
            slots.append(Slots(part.keys, part.values, down(part.live), across=True))
        return joint_attention(q, slots, scale).flatten(2, 3)[:, :, :tokens]

    def oracle(self, q_BHND: Tensor, k_BHMD: Tensor, v_BHMD: Tensor, call: Call) -> Tensor:
        """The factorisation as an N x N matrix, times the values."""
        no_queries_missing(q_BHND.shape[2], k_BHMD.shape[2])
        tokens, width = q_BHND.shape[2], row_width(call.grid, self.segment)
        places = [divmod(n, width) for n in range(tokens)]

        def sees(n: int) -> tuple[list[int], list[list[int]]]:
            s, u = places[n]
            reach = places[: n + 1] if call.mask.causal else places
            direct = [t * width + w for t, w in reach if t == s or w == u]
            regions: list[list[int]] = []
            for other in range(width):
                if other != u:
                    regions.append([t * width + w for t, w in reach if w == other and t < s])
                    regions.append([t * width + w for t, w in reach if w == other and t > s])
            for other in range(places[-1][0] + 1):
                if other != s:
                    regions.append([t * width + w for t, w in reach if t == other and w < u])
                    regions.append([t * width + w for t, w in reach if t == other and w > u])
            return direct, regions

        q, k, v = blank_padding(call.mask.keys, q_BHND, k_BHMD, v_BHMD)
        return weighted_values(combined_weights(q, k, call.mask.keys, sees, q.shape[3] ** -0.5), v, call.mask)

    def count(self, sizes: Sizes) -> Cost:
        """Slots of all queries and members of all regions that are asked; masked ones are multiplied too."""
        tokens, width, size = sizes.queries, row_width(sizes.grid, self.segment), self.site.head_dim
        causal, copies, rows = self.site.causal, sizes.batch * self.site.heads, -(-tokens // width)
        s, u = torch.arange(rows).unsqueeze(1), torch.arange(width)
        there = s * width + u < tokens
        in_row, in_column = there.sum(1, keepdim=True), there.sum(0)
        left, right = u.minimum(in_row), (in_row - u - 1).clamp(min=0)
        above, below = s.minimum(in_column), (in_column - s - 1).clamp(min=0)
        by_columns, by_rows = in_row > there.long(), in_column > there.long()  # whether another place of the line asks
        if causal:
            by_rows = below > 0
            slots = u + 1 + s + (width - 1) * (s > 0) + s * (u > 0) + s * (u < width - 1)
        else:
            other_columns = (below > 0).sum(1, keepdim=True) - (below > 0).long()
            other_rows = (right > 0).sum(0) - (right > 0).long()
            slots = in_row + in_column - 1 + (width - 1) * (s > 0) + other_columns + (rows - 1) * (u > 0) + other_rows
        made = ((left + right) * by_rows).sum() + (above * by_columns).sum()
        executed = rows * width * (4 * width + 4 * rows)
        if not causal:
            made += (below * by_columns).sum()
            executed += rows * width * (width + rows)
        useful = int((slots * there).sum() + made)
        pairs = Mask(causal=causal).area(tokens, tokens, sizes.batch, self.site.heads)
        return Cost(4 * copies * size * useful, 4 * copies * size * executed, pairs)

    def initial_state(self, batch: int, like: Tensor) -> MixtureState:
        """No row finished, nothing in the open one."""
        heads, size = self.site.heads, self.site.head_dim
        none, nothing = (KVCache.empty(batch, heads, size, size, x) for x in (wide(like), like))
        zeros = wide(like).new_zeros(batch, heads, self.segment, size)
        above = Regions(zeros, zeros, like.new_zeros(batch, 1, self.segment, dtype=torch.bool))
        return MixtureState(nothing, none, none, above, zeros, Rows(like.new_empty(batch, heads, 0, size)), nothing)

    def advance(
        self, q: Tensor, k: Tensor, v: Tensor, state: MixtureState, keep: Tensor | None, tokens: Tensor | None
    ) -> tuple[Tensor, MixtureState]:
        """Row by row."""
        q, k, v = blank_padding(keep, q, k, v)
        real = real_tokens(keep, q)

        def fill(new: slice, state: MixtureState) -> tuple[Tensor, MixtureState]:
            return self._fill(q[:, :, new], k[:, :, new], v[:, :, new], real[:, new], state)

        return by_segments(q.shape[2], self.segment, state, fill)

    def _fill(
        self, q: Tensor, k: Tensor, v: Tensor, real_BU: Tensor, state: MixtureState
    ) -> tuple[Tensor, MixtureState]:
        """Tokens that the open row has room for."""
        width, scale, begin = self.segment, q.shape[3] ** -0.5, state.q.rows.shape[2]
        state = state._replace(q=state.q.append(q), row=state.row.append(k, v, real_BU))
        end, above = state.q.rows.shape[2], state.above
        place = torch.arange(width, device=q.device)
        own = place[begin:end].unsqueeze(1)
        k_row, v_row, real_row = (x.unsqueeze(2) for x in cached(state.row))
        slots = [
            Slots(k_row, v_row, real_row.unsqueeze(3) & (place[:end] <= own)),
            Slots(above.keys.unsqueeze(2), above.values.unsqueeze(2), above.live[:, :, None, None] & (place != own)),
        ]
        for cache in (state.tokens, state.left, state.right):
            keys, values, live = (cut(x, width)[:, :, :, begin:end] for x in cached(cache))
            slots.append(Slots(keys, values, live.transpose(2, 3).unsqueeze(2), across=True))
        o = joint_attention(q.unsqueeze(2), slots, scale).squeeze(2)
        return o, state if end < width else self._close(state, scale)

    def _close(self, state: MixtureState, scale: float) -> MixtureState:
        """Behind a row that is full: its parts, and the columns with it."""
        (k, v, real), q, above = cached(state.row), state.q.rows, state.above
        left, right = (
            cache.append(part.keys, part.values, part.live[:, 0])
            for cache, part in (
                (state.left, regions_before(q, k, v, real, scale)),
                (state.right, regions_behind(q, k, v, real, scale)),
            )
        )
        tokens = state.tokens.append(k, v, real[:, 0])
        live = above.live | real
        query, key = (
            torch.maximum(
                *(x.masked_fill(~has.unsqueeze(-1), torch.finfo(x.dtype).min) for x, has in pair)
            ).masked_fill(~live.unsqueeze(-1), 0)
            for pair in (((state.query, above.live), (q, real)), ((above.keys, above.live), (k, real)))
        )
        k_BHSRD, v_BHSRD, real_B1SR = (cut(x, self.segment).transpose(2, 3) for x in cached(tokens))
        above = valued(query, key, k_BHSRD, v_BHSRD, real_B1SR, scale)
        return self.initial_state(q.shape[0], k)._replace(
            tokens=tokens, left=left, right=right, above=above, query=query
        )
