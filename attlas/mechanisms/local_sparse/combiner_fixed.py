"""Combiner-Fixed: own segment key by key, every other segment as one key, in one softmax.

    p(j | i) = p̃(j | i)                 for j in the segment of i (up to i where causal)
               p̃(Ω_r | i) p(j | Ω_r)    for j in another segment r (an earlier one where causal)

p̃ is one softmax over q_i . k_j / √D and q_i . K_r / √D; p(j | Ω_r) = softmax_j(Q_r . k_j / √D) over the segment r. K_r
and Q_r pool its keys and queries, so its value E_r = Σ_j p(j | Ω_r) v_j is made once for all queries that ask. Every
query gives every key that it may see a positive weight, and all of them sum to 1, though no N x N matrix is made. A
segment has one logit however many tokens it holds: with equal keys a segment weighs as much as one of them.

What is pooled are the keys and queries themselves, or relu of them, or relu of a learned map of the head's features
(`deepset`). One segment is softmax attention, and segments of one token are as well.

q, k, v (B, H, N, D). Tokens of a grid are taken in raster order, prefix tokens first. The last segment may be shorter.
Padding is no member of a segment; a segment of padding alone is seen by nobody.

Time O(N (S + N / S) D), with segments of S = √N O(N √N D). The causal state is K_r and E_r of the finished segments
and the open segment itself.

Source: Ren et al., "Combiner: Full Attention Transformer with Sparse Computation Cost", 2021 (arXiv:2107.05768),
official code google-research/google-research, combiner. Pooled by maximum in its JAX layers, by a choice in its
TensorFlow ones. Its noncausal code lets a query see its own segment a second time, as a region; here regions are the
other segments, as in the paper's definition.
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
    POOLS,
    Regions,
    Slots,
    by_segments,
    combined_weights,
    cut,
    joint_attention,
    no_queries_missing,
    pool,
    real_tokens,
    segment_length,
    valued,
)
from attlas.ops.pairs import weighted_values
from attlas.ops.precision import as_written, wide
from attlas.ops.softmax import blank_padding, softmax_attention

ACTIVATIONS = (None, "relu", "deepset")
PROJECTIONS = 4 * 16 * 16

SPEC = Spec(
    name="combiner_fixed",
    title="Combiner: Full Attention Transformer with Sparse Computation Cost",
    year=2021,
    paper="arXiv:2107.05768",
    equation="o_i = Σ_(j in own segment) p̃(j | i) v_j + Σ_(r other) p̃(Ω_r | i) Σ_j p(j | Ω_r) v_j",
    complexity="O(N √N D) time, O(√N D) state",
    patterns=frozenset({Pattern.NONCAUSAL_SELF, Pattern.CAUSAL_SELF}),
    streams=True,
    shell={"bias": False, "out_bias": False},
    examples=(
        Example(grid=(7,), params={"segment": 2}, parameters=PROJECTIONS),
        Example(
            grid=(8,),
            params={"segment": 3, "pool": "mean", "activation": "deepset"},
            parameters=PROJECTIONS + 2 * 8 * 8,
        ),
        Example(grid=(2, 5), prefix=1, params={"pool": "sum", "activation": "relu"}, parameters=PROJECTIONS),
    ),
)


class FixedState(NamedTuple):
    """K and E of the finished segments, and queries (B, H, n, D), keys and values of the open one."""

    finished: KVCache
    open: KVCache
    q: Rows


@register(SPEC)
class CombinerFixed(Attend):
    """Combiner with segments of one length.

    Args:
        site: where it is installed; its length gives the segments theirs.
        backend: of the softmax attention of a stream.
        segment: tokens of a segment; the root of the site's length by default, rounded up.
        pool: "max", "mean" or "sum" over a segment's keys and queries.
        activation: None, "relu" or "deepset" before the pool.
    """

    def __init__(
        self,
        site: Site,
        backend: str = "auto",
        *,
        segment: int | None = None,
        pool: str = "max",
        activation: str | None = None,
    ) -> None:
        super().__init__(site, backend)
        if pool not in POOLS:
            raise BadInput(f"pool is one of {', '.join(map(repr, POOLS))}, got {pool!r}")
        if activation not in ACTIVATIONS:
            raise BadInput(f"activation is one of {', '.join(map(repr, ACTIVATIONS))}, got {activation!r}")
        self.segment = segment_length(site, segment)
        self.pool, self.activation = pool, activation
        size = site.head_dim
        self.query_map = nn.Linear(size, size, bias=False) if activation == "deepset" else None
        self.key_map = nn.Linear(size, size, bias=False) if activation == "deepset" else None

    def _pooled(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """What of queries and keys is pooled."""
        if self.query_map is not None and self.key_map is not None:
            q, k = self.query_map(q), self.key_map(k)
        return (q, k) if self.activation is None else (q.relu(), k.relu())

    def _summarise(self, q_SD: Tensor, k_SD: Tensor, v_SD: Tensor, real_S: Tensor) -> Regions:
        query_D, key_D = (pool(x, real_S, self.pool) for x in self._pooled(q_SD, k_SD))
        return valued(query_D, key_D, k_SD, v_SD, real_S, q_SD.shape[-1] ** -0.5)

    def compute(self, q_BHND: Tensor, k_BHMD: Tensor, v_BHMD: Tensor, call: Call) -> Tensor:
        """Segments side by side; each sees itself and the summaries of the others."""
        no_queries_missing(q_BHND.shape[2], k_BHMD.shape[2])
        tokens, size = q_BHND.shape[2:]
        length = min(self.segment, tokens)
        real_B1TS = cut(real_tokens(call.mask.keys, q_BHND), length, 1).unsqueeze(1)
        q, k, v = (cut(x, length) for x in blank_padding(call.mask.keys, q_BHND, k_BHMD, v_BHMD))
        regions = self._summarise(q, k, v, real_B1TS)
        place, number = (torch.arange(count, device=q.device) for count in (length, q.shape[2]))
        inside, others = real_B1TS.unsqueeze(-2), number.unsqueeze(1) != number
        if call.mask.causal:
            inside, others = inside & (place <= place.unsqueeze(1)), number < number.unsqueeze(1)
        away = others.unsqueeze(1) & regions.live[:, :, None, None]
        slots = (Slots(k, v, inside), Slots(regions.keys.unsqueeze(2), regions.values.unsqueeze(2), away))
        return joint_attention(q, slots, size**-0.5).flatten(2, 3)[:, :, :tokens]

    def oracle(self, q_BHND: Tensor, k_BHMD: Tensor, v_BHMD: Tensor, call: Call) -> Tensor:
        """The factorisation as an N x N matrix, times the values."""
        no_queries_missing(q_BHND.shape[2], k_BHMD.shape[2])
        tokens, length = q_BHND.shape[2], self.segment
        segments = [range(start, min(start + length, tokens)) for start in range(0, tokens, length)]

        def sees(n: int) -> tuple[list[int], list[range]]:
            own = segments[n // length]
            if call.mask.causal:
                return [j for j in own if j <= n], segments[: n // length]
            return list(own), [segment for segment in segments if segment is not own]

        q, k, v = blank_padding(call.mask.keys, q_BHND, k_BHMD, v_BHMD)
        scale = q.shape[3] ** -0.5
        return weighted_values(
            combined_weights(q, k, call.mask.keys, sees, scale, self.pool, self._pooled), v, call.mask
        )

    def count(self, sizes: Sizes) -> Cost:
        """Direct keys, summaries asked, and summaries made; masked ones are multiplied too."""
        tokens, size, copies = sizes.queries, self.site.head_dim, sizes.batch * self.site.heads
        length = min(self.segment, tokens)
        full, rest = divmod(tokens, length)
        segments = full + (rest > 0)
        maps = 4 * size * size if self.query_map is not None else 0
        if self.site.causal:
            direct = full * length * (length + 1) // 2 + rest * (rest + 1) // 2
            asked = length * full * (full - 1) // 2 + rest * full
            made = (segments - 1) * length
        else:
            direct = full * length * length + rest * rest
            asked, made = tokens * (segments - 1), tokens if segments > 1 else 0
        laid = segments * length
        flops = 4 * size * (direct + asked + made) + maps * made
        executed = 4 * size * laid * (length + segments + 1) + maps * laid
        pairs = Mask(causal=self.site.causal).area(tokens, tokens, sizes.batch, self.site.heads)
        return Cost(copies * flops, copies * executed, pairs)

    def initial_state(self, batch: int, like: Tensor) -> FixedState:
        """No segment finished, nothing in the open one."""
        heads, size = self.site.heads, self.site.head_dim
        finished, nothing = (KVCache.empty(batch, heads, size, size, x) for x in (wide(like), like))
        return FixedState(finished, nothing, Rows(like.new_empty(batch, heads, 0, size)))

    def advance(
        self, q: Tensor, k: Tensor, v: Tensor, state: FixedState, keep: Tensor | None, tokens: Tensor | None
    ) -> tuple[Tensor, FixedState]:
        """Segment by segment: a finished one is a key in front of those of the open one."""
        q, k, v = blank_padding(keep, q, k, v)

        def fill(new: slice, state: FixedState) -> tuple[Tensor, FixedState]:
            kept = None if keep is None else keep[:, new]
            return self._fill(q[:, :, new], k[:, :, new], v[:, :, new], state, kept)

        return by_segments(q.shape[2], self.segment, state, fill)

    def _fill(
        self, q: Tensor, k: Tensor, v: Tensor, state: FixedState, keep: Tensor | None
    ) -> tuple[Tensor, FixedState]:
        """Tokens that the open segment has room for."""
        state = FixedState(state.finished, state.open.append(k, v, keep), state.q.append(q))
        finished, opened, rows = state
        real_BR, real_BS = (real_tokens(cache.keys, cache.k.rows) for cache in (finished, opened))
        keys = torch.cat([finished.k.rows, wide(opened.k.rows)], 2)
        values = torch.cat([finished.v.rows, wide(opened.v.rows)], 2)
        mask = Mask(causal=True, keys=torch.cat([real_BR, real_BS], 1), queries=keep)
        with as_written(q):
            o = softmax_attention(wide(q), keys, values, mask, backend=self.backend).to(q.dtype)
        if rows.rows.shape[2] < self.segment:
            return o, state
        key, value, live = self._summarise(rows.rows, opened.k.rows, opened.v.rows, real_BS.unsqueeze(1))
        finished = finished.append(key.unsqueeze(2), value.unsqueeze(2), live)
        return o, self.initial_state(q.shape[0], k)._replace(finished=finished)
