"""Combiner-Logsparse: the past in blocks of 1, 2, 4, 8, ... tokens, one for each binary digit of the position.

    p(j | i) = p̃(i | i)                 for j = i
               p̃(Ω_l | i) p(j | Ω_l)    for j in Ω_l, where digit l of i is 1

with Ω_l the aligned block of 2^l tokens in front of that in which i stands: together they are 0 ... i - 1, each once.
p̃ is one softmax over q_i . k_i / √D and q_i . K_l / √D; p(j | Ω_l) = softmax_j(Q_l . k_j / √D). K_l and Q_l are the
largest key and the largest query of the block, feature by feature, and E_l = Σ_j p(j | Ω_l) v_j is made once for the
2^l queries that ask. Every query gives every key up to itself a positive weight and all of them sum to 1.

q, k, v (B, H, N, D), any N. Tokens of a grid are taken in raster order, prefix tokens first. Padding is no member of a
block, but has its place; a block of padding alone is seen by nobody.

Time O(N log N D). The state holds a summary for each digit of the position that is 1, and all queries, keys and values:
the digits' blocks will be members of larger ones, whose distributions are not made of theirs. A segment is taken in
aligned blocks, so that of one token costs O(log N D), and where blocks close O(N D) at most, O(log N D) on average.

Source: Ren et al., "Combiner: Full Attention Transformer with Sparse Computation Cost", 2021 (arXiv:2107.05768),
official code google-research/google-research, combiner (JAX), which is causal only.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from attlas.core.mask import Mask
from attlas.core.mechanism import Attend, Call, Cost, Sizes
from attlas.core.registry import register
from attlas.core.spec import Example, Pattern, Spec
from attlas.core.state import KVCache, Rows
from attlas.ops.combiner import (
    Regions,
    combined_weights,
    cut,
    masked_softmax,
    no_queries_missing,
    real_tokens,
    summarise,
)
from attlas.ops.pairs import weighted_values
from attlas.ops.precision import as_written, wide
from attlas.ops.softmax import blank_padding

PROJECTIONS = 4 * 16 * 16

SPEC = Spec(
    name="combiner_logsparse",
    title="Combiner: Full Attention Transformer with Sparse Computation Cost",
    year=2021,
    paper="arXiv:2107.05768",
    equation="o_i = p̃(i | i) v_i + Σ_(l: digit l of i is 1) p̃(Ω_l | i) Σ_(j in Ω_l) p(j | Ω_l) v_j",
    complexity="O(N log N D) time, O(N D) state",
    patterns=frozenset({Pattern.CAUSAL_SELF}),
    streams=True,
    shell={"bias": False, "out_bias": False},
    examples=(
        Example(grid=(7,), parameters=PROJECTIONS),
        Example(grid=(8,), heads=4, parameters=PROJECTIONS),
        Example(grid=(2, 5), prefix=1, parameters=PROJECTIONS),
    ),
)


class LogsparseState(NamedTuple):
    """All queries, keys and values, and the blocks of the digits that are 1, the largest first, one slot each."""

    q: Rows
    tokens: KVCache
    blocks: tuple[Regions, ...]


@register(SPEC)
class CombinerLogsparse(Attend):
    """Combiner with blocks of powers of two.

    Args:
        site: where it is installed.
        backend: `auto`, `torch` or `oracle`.
    """

    def compute(self, q_BHND: Tensor, k_BHMD: Tensor, v_BHMD: Tensor, call: Call) -> Tensor:
        """Level by level."""
        no_queries_missing(q_BHND.shape[2], k_BHMD.shape[2])
        real_BN = real_tokens(call.mask.keys, q_BHND)
        q, k, v = blank_padding(call.mask.keys, q_BHND, k_BHMD, v_BHMD)
        with as_written(q):
            return self._attend(q, k, v, real_BN, ())

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, real_BN: Tensor, before: tuple[Regions, ...]) -> Tensor:
        """Tokens that begin where their blocks do, behind blocks that all of them see."""
        batch, tokens, dtype = q.shape[0], q.shape[2], q.dtype
        q, k, v = wide(q) * q.shape[3] ** -0.5, wide(k), wide(v)
        scores, values = [q.unsqueeze(-2) @ k.unsqueeze(-1)], []
        seen = [real_BN[:, None, :, None, None]]
        for level in range((tokens - 1).bit_length()):
            length = 2**level
            # Blocks in pairs: the second asks the first.
            (q1, q2), (k1, _), (v1, _) = (_pairs(x, length, 2) for x in (q, k, v))
            real_B1PS, _ = _pairs(real_BN.unsqueeze(1), length, 2)
            region = summarise(q1, k1, v1, real_B1PS, 1.0)
            score_BHPS1 = q2 @ region.keys.unsqueeze(-1)
            scores.append(_second(score_BHPS1, tokens).unsqueeze(-1))
            seen.append(_second(region.live[..., None, None].expand(-1, -1, -1, length, 1), tokens).unsqueeze(-1))
            values.append(region.values)
        shared = torch.cat([region.keys for region in before], 2) if before else None
        if shared is not None:
            scores.append((q @ shared.mT).unsqueeze(-2))
            seen.append(torch.cat([region.live for region in before], 2)[:, :, None, None])
        seen = [each.expand(batch, 1, tokens, 1, -1) for each in seen]
        weights_BHNM = masked_softmax(torch.cat(scores, -1), torch.cat(seen, -1)).squeeze(-2)
        o = weights_BHNM[..., :1] * v
        for level, value_BHPD in enumerate(values):
            _, w2 = _pairs(weights_BHNM[..., level + 1 : level + 2], 2**level, 2)
            o = o + _second(w2 @ value_BHPD.unsqueeze(-2), tokens)
        if shared is not None:
            o = o + weights_BHNM[..., len(values) + 1 :] @ torch.cat([region.values for region in before], 2)
        return o.to(dtype)

    def oracle(self, q_BHND: Tensor, k_BHMD: Tensor, v_BHMD: Tensor, call: Call) -> Tensor:
        """The factorisation as an N x N matrix, times the values."""
        no_queries_missing(q_BHND.shape[2], k_BHMD.shape[2])

        def sees(i: int) -> tuple[list[int], list[range]]:
            blocks, end = [], i
            while end:  # the last digit that is 1 says how long the nearest block is
                length = end & -end
                blocks.append(range(end - length, end))
                end -= length
            return [i], blocks

        q, k, v = blank_padding(call.mask.keys, q_BHND, k_BHMD, v_BHMD)
        return weighted_values(combined_weights(q, k, call.mask.keys, sees, q.shape[3] ** -0.5), v, call.mask)

    def count(self, sizes: Sizes) -> Cost:
        """A slot for each digit that is 1, and each block that is asked; incomplete ones are multiplied in full."""
        tokens, size, copies = sizes.queries, self.site.head_dim, sizes.batch * self.site.heads
        useful, laid = 2 * tokens, 2 * tokens  # its own score; its value is not a matrix product
        for level in range((tokens - 1).bit_length()):
            length = 2**level
            full, rest = divmod(tokens, 2 * length)
            asking = full * length + max(rest - length, 0)
            made = (full + (rest > length)) * length
            useful += 4 * asking + 4 * made
            laid += 8 * -(-tokens // (2 * length)) * length
        pairs = Mask(causal=True).area(tokens, tokens, sizes.batch, self.site.heads)
        return Cost(copies * size * useful, copies * size * laid, pairs)

    def initial_state(self, batch: int, like: Tensor) -> LogsparseState:
        """No token, no digit."""
        heads, size = self.site.heads, self.site.head_dim
        return LogsparseState(
            Rows(like.new_empty(batch, heads, 0, size)), KVCache.empty(batch, heads, size, size, like), ()
        )

    def advance(
        self, q: Tensor, k: Tensor, v: Tensor, state: LogsparseState, keep: Tensor | None, tokens: Tensor | None
    ) -> tuple[Tensor, LogsparseState]:
        """The segment in the fewest aligned blocks of powers of two."""
        rows, cache, blocks = state
        place = rows.rows.shape[2]
        q, k, v = blank_padding(keep, q, k, v)
        rows, cache = rows.append(q), cache.append(k, v, keep)
        q, k, v = rows.rows, cache.k.rows, cache.v.rows
        real = real_tokens(cache.keys, q)
        end, parts = q.shape[2], []
        while place < end:
            length = 1 << ((end - place).bit_length() - 1)
            if place:
                length = min(length, place & -place)
            new = slice(place, place + length)
            with as_written(q):
                parts.append(self._attend(q[:, :, new], k[:, :, new], v[:, :, new], real[:, new], blocks))
            place += length
            # As in counting: the digits that turn from 1 to 0 give their blocks to the one that turns to 1.
            closed = slice(place - (place & -place), place)
            q_ended, k_ended, v_ended = (x[:, :, closed].unsqueeze(2) for x in (q, k, v))
            region = summarise(q_ended, k_ended, v_ended, real[:, None, None, closed], q.shape[3] ** -0.5)
            blocks = (*blocks[: place.bit_count() - 1], region)
        return torch.cat(parts, 2), LogsparseState(rows, cache, blocks)


def _pairs(x: Tensor, length: int, dim: int) -> tuple[Tensor, ...]:
    """First and second blocks of each pair of blocks of `length`, (..., P, length, ...)."""
    return cut(x, 2 * length, dim).unflatten(dim + 1, (2, length)).unbind(dim + 1)


def _second(x_BHPSD: Tensor, tokens: int) -> Tensor:
    """What the second blocks of the pairs hold, as tokens (B, H, N, D); the first hold 0 or False."""
    return F.pad(x_BHPSD, (0, 0, x_BHPSD.shape[3], 0)).flatten(2, 3)[:, :, :tokens]
