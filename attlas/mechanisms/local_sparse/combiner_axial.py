"""Combiner-Axial, row-major: own row key by key, every other row through the token of it that stands in one's column.

Tokens lie in rows of S places. First every token attends to its whole row,

    E_tu = Σ_w softmax_w(q_tu . k_tw / √D) v_tw,    K_tu = W_k LayerNorm(W_s E_tu + x_tu)

and what it found stands for its row: query (s, u) sees in one softmax the keys k_sw of its own row, w up to u where
causal, and K_tu with value E_tu for every other row t, where causal those above it. A row is finished when a later one
reads it, so that looking at all of it breaks no causality. Every query gives every key that it may see a positive
weight, softmax over the slots times softmax inside a row, and all of them sum to 1.

x (B, N, H D), q, k, v (B, H, N, D); W_s and W_k without bias, x the tokens that queries are made of. Rows are those of
a grid of two axes; on one axis every `segment` tokens are a row. The last row may be shorter: where it does not
reach, a layer that is not causal has no token to read it through. Likewise padding stands for no row and is no member
of one.

Time O(N (S + N / S) D), with rows of √N places O(N √N D). The causal state is K and E of the finished rows and the
open row itself.

Source: Ren et al., "Combiner: Full Attention Transformer with Sparse Computation Cost", 2021 (arXiv:2107.05768),
official code google-research/google-research, combiner: its JAX layer. In its TensorFlow layer, the one that can also
be not causal, a query then sees its own row a second time, as a region; here regions are the other rows.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from attlas.core.errors import BadInput
from attlas.core.mask import Mask
from attlas.core.mechanism import Attend, Call, Cost, Site, Sizes
from attlas.core.registry import register
from attlas.core.spec import Example, Pattern, Spec
from attlas.core.state import KVCache, Rows
from attlas.ops.combiner import (
    Slots,
    by_segments,
    cached,
    cut,
    joint_attention,
    masked_softmax,
    no_queries_missing,
    real_tokens,
    row_length,
    row_width,
)
from attlas.ops.precision import as_written, wide
from attlas.ops.softmax import blank_padding

PARAMETERS = 6 * 16 * 16 + 2 * 16

SPEC = Spec(
    name="combiner_axial",
    title="Combiner: Full Attention Transformer with Sparse Computation Cost",
    year=2021,
    paper="arXiv:2107.05768",
    equation="o = softmax over (own row, summaries of the rows above in the own column)",
    complexity="O(N √N D) time, O(N D) state",
    patterns=frozenset({Pattern.NONCAUSAL_SELF, Pattern.CAUSAL_SELF}),
    grids=(1, 2),
    prefix=False,
    streams=True,
    shell={"bias": False, "out_bias": False},
    examples=(
        Example(grid=(11,), params={"segment": 4}, parameters=PARAMETERS),
        Example(grid=(7,), parameters=PARAMETERS),
        Example(grid=(3, 4), heads=4, parameters=PARAMETERS),
    ),
)


class AxialState(NamedTuple):
    """K and E of the finished rows; tokens (B, 1, n, C), queries, keys and values of the open one."""

    finished: KVCache
    x: Rows
    q: Rows
    row: KVCache


@register(SPEC)
class CombinerAxial(Attend):
    """Combiner with rows summarised by axial attention.

    Args:
        site: where it is installed; its length or its grid gives the rows theirs.
        backend: `auto`, `torch` or `oracle`.
        segment: places of a row, on one axis; the root of the site's length by default, rounded up.
    """

    def __init__(self, site: Site, backend: str = "auto", *, segment: int | None = None) -> None:
        super().__init__(site, backend)
        self.segment = row_length(site, segment)
        channels = site.heads * site.head_dim
        self.summary_proj = nn.Linear(channels, site.dim, bias=False)
        self.norm = nn.LayerNorm(site.dim, eps=1e-6)
        self.key_proj = nn.Linear(site.dim, channels, bias=False)

    def compute(self, q_BHND: Tensor, k_BHMD: Tensor, v_BHMD: Tensor, call: Call) -> Tensor:
        """Rows side by side, then each query's row and column."""
        no_queries_missing(q_BHND.shape[2], k_BHMD.shape[2])
        tokens, width = q_BHND.shape[2], row_width(call.grid, self.segment)
        x_B1NC = self._residual(call.tokens).unsqueeze(1)
        blanked = blank_padding(call.mask.keys, x_B1NC, q_BHND, k_BHMD, v_BHMD)
        x, q, k, v = (cut(each, width) for each in blanked)
        real = cut(real_tokens(call.mask.keys, q_BHND), width, 1).unsqueeze(1)
        keys, values = self._summarise(x, q, k, v, real)
        row, column = (torch.arange(count, device=q.device) for count in q.shape[2:4])
        others, own = row.unsqueeze(1) != row, torch.ones(width, width, dtype=torch.bool, device=q.device)
        if call.mask.causal:
            others, own = row < row.unsqueeze(1), column <= column.unsqueeze(1)
        slots = (
            Slots(k, v, real.unsqueeze(3) & own),
            Slots(keys, values, real.transpose(2, 3).unsqueeze(2) & others.unsqueeze(1), across=True),
        )
        return joint_attention(q, slots, q.shape[-1] ** -0.5).flatten(2, 3)[:, :, :tokens]

    def _residual(self, tokens: Tensor | None) -> Tensor:
        if tokens is None:
            raise BadInput("combiner_axial adds tokens to its summaries: pass tokens=, (batch, tokens, channels)")
        return tokens

    def _summarise(self, x_B1TUC: Tensor, q: Tensor, k: Tensor, v: Tensor, real_B1TU: Tensor) -> tuple[Tensor, Tensor]:
        """K and E of every place, (B, H, T, U, D)."""
        with as_written(q):
            scores = (wide(q) * q.shape[-1] ** -0.5) @ wide(k).mT
            values = masked_softmax(scores, real_B1TU.unsqueeze(3)) @ wide(v)
        found_BTUC = values.permute(0, 2, 3, 1, 4).flatten(3).to(v.dtype)
        return self._keys(found_BTUC, x_B1TUC[:, 0]), values

    def _keys(self, found_BTUC: Tensor, x_BTUC: Tensor) -> Tensor:
        keys_BTUC = self.key_proj(self.norm(self.summary_proj(found_BTUC) + x_BTUC))
        return keys_BTUC.unflatten(3, (self.site.heads, -1)).permute(0, 3, 1, 2, 4)

    def oracle(self, q_BHND: Tensor, k_BHMD: Tensor, v_BHMD: Tensor, call: Call) -> Tensor:
        """Query by query, from lists of places; padding is in none."""
        no_queries_missing(q_BHND.shape[2], k_BHMD.shape[2])
        width, scale = row_width(call.grid, self.segment), q_BHND.shape[3] ** -0.5
        x_BNC = self._residual(call.tokens)
        kept = real_tokens(call.mask.keys, q_BHND).tolist()
        o_BHND = torch.zeros_like(v_BHMD)
        for b, keep in enumerate(kept):
            q, k, v = q_BHND[b], k_BHMD[b], v_BHMD[b]
            real = [n for n in range(len(keep)) if keep[n]]
            key, value = {}, {}
            for n in real:
                own = [m for m in real if m // width == n // width]
                weights_HM = (torch.einsum("hd,hmd->hm", q[:, n], k[:, own]) * scale).softmax(-1)
                value[n] = torch.einsum("hm,hmd->hd", weights_HM, v[:, own])
                normed = self.norm(self.summary_proj(value[n].flatten()) + x_BNC[b, n])
                key[n] = self.key_proj(normed).unflatten(0, (self.site.heads, -1))
            for n in real:
                reach = [m for m in real if m <= n] if call.mask.causal else real
                own = [m for m in reach if m // width == n // width]
                others = [m for m in reach if m % width == n % width and m // width != n // width]
                keys = torch.stack([*(k[:, m] for m in own), *(key[m] for m in others)], 1)
                values = torch.stack([*(v[:, m] for m in own), *(value[m] for m in others)], 1)
                weights_HM = (torch.einsum("hd,hmd->hm", q[:, n], keys) * scale).softmax(-1)
                o_BHND[b, :, n] = torch.einsum("hm,hmd->hd", weights_HM, values)
        return o_BHND

    def count(self, sizes: Sizes) -> Cost:
        """Slots, the attention inside rows, and W_s and W_k; masked and unread ones are multiplied too."""
        tokens, width, size = sizes.queries, row_width(sizes.grid, self.segment), self.site.head_dim
        batch, copies = sizes.batch, sizes.batch * self.site.heads
        full, rest = divmod(tokens, width)
        rows = full + (rest > 0)
        area = Mask(causal=self.site.causal).area
        asked = rest * full * (full + 1) + (width - rest) * full * (full - 1)  # another token of the column, both ways
        if self.site.causal:
            asked //= 2
            read = max(tokens - width, 0)
            inside, seen = read * width, tokens * (tokens + 1) // 2
        else:
            read = (tokens if full > 1 else 2 * rest) if rows > 1 else 0
            inside = (full * width if full > 1 else rest) * width + rest * rest if rows > 1 else 0
            seen = tokens * tokens - (width - rest) * full * rest if rest else tokens * tokens
        direct = full * area(width, width) + area(rest, rest)
        laid = rows * width
        maps = 4 * batch * self.site.dim * self.site.heads * size
        flops = 4 * copies * size * (direct + asked + inside) + maps * read
        executed = 4 * copies * size * laid * (2 * width + rows) + maps * laid
        return Cost(flops, executed, copies * seen)

    def initial_state(self, batch: int, like: Tensor) -> AxialState:
        """No row finished, nothing in the open one."""
        heads, size = self.site.heads, self.site.head_dim
        finished, nothing = (KVCache.empty(batch, heads, size, size, x) for x in (wide(like), like))
        x, q = (Rows(like.new_empty(batch, h, 0, c)) for h, c in ((1, self.site.dim), (heads, size)))
        return AxialState(finished, x, q, nothing)

    def advance(
        self, q: Tensor, k: Tensor, v: Tensor, state: AxialState, keep: Tensor | None, tokens: Tensor | None
    ) -> tuple[Tensor, AxialState]:
        """Row by row."""
        x, q, k, v = blank_padding(keep, self._residual(tokens).unsqueeze(1), q, k, v)
        real = real_tokens(keep, q)

        def fill(new: slice, state: AxialState) -> tuple[Tensor, AxialState]:
            return self._fill(x[:, :, new], q[:, :, new], k[:, :, new], v[:, :, new], real[:, new], state)

        return by_segments(q.shape[2], self.segment, state, fill)

    def _fill(
        self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, real_BU: Tensor, state: AxialState
    ) -> tuple[Tensor, AxialState]:
        """Tokens that the open row has room for."""
        begin = state.q.rows.shape[2]
        state = AxialState(state.finished, state.x.append(x), state.q.append(q), state.row.append(k, v, real_BU))
        end = state.q.rows.shape[2]
        place = torch.arange(end, device=q.device)
        k_row, v_row, real_row = (each.unsqueeze(2) for each in cached(state.row))
        keys, values, live = (cut(each, self.segment)[:, :, :, begin:end] for each in cached(state.finished))
        slots = (
            Slots(k_row, v_row, real_row.unsqueeze(3) & (place <= place[begin:].unsqueeze(1))),
            Slots(keys, values, live.transpose(2, 3).unsqueeze(2), across=True),
        )
        o = joint_attention(q.unsqueeze(2), slots, q.shape[3] ** -0.5).squeeze(2)
        if end < self.segment:
            return o, state
        x, q = (each.unsqueeze(2) for each in (state.x.rows, state.q.rows))
        key, value = self._summarise(x, q, k_row, v_row, real_row)
        finished = state.finished.append(key.squeeze(2), value.squeeze(2), real_row[:, 0, 0])
        return o, self.initial_state(q.shape[0], q)._replace(finished=finished)
