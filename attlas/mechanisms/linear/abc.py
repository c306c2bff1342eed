"""Attention with bounded-memory control: every token is written to a few slots, and queries read the slots.

    K̃_s = Σ_m φ_ms k_m,  φ_ms = softmax_m(k_m·w_s)        Ṽ_s = Σ_m ψ_ms v_m,  ψ_ms = softmax_m(v_m·u_s)
    o_n = Σ_s softmax_s(q_n·K̃_s / √D) Ṽ_s

The control that writes to slot s is a learned direction, w_s for keys and u_s for values, the same for all heads. In a
causal layer the softmax over m runs up to the query, so that slots are a recurrence with a data-dependent gate:

    K̃_s(t) = g K̃_s(t-1) + (1 - g) k_t,    g = Z_s(t-1) / Z_s(t),    Z_s(t) = Z_s(t-1) + exp(k_t·w_s)

and Ṽ likewise. Within a chunk of C tokens pairs are weighed directly, and what came before counts as one more token
of each slot, with log Z as its score. Causal cross-attention reads slots of the whole memory.

q (B, H, N, D), k (B, H, M, D), v (B, H, M, E), w (D, S), u (E, S). Padding is written nowhere; who sees nothing gets 0.

Time O((N + M) S D), in a causal layer O(N ((S + C) D + C S)): each pair of a chunk has a share in every slot, and
training keeps them all, O(N C S) numbers per head with C = 32. A product of two exponentials instead of a share would
overflow where the scores of a chunk lie far apart. The state is S (D + E + 2) numbers per head, in float32 at least.

Source: Peng et al., "ABC: Attention with Bounded-Memory Control", 2022 (arXiv:2110.02488), where one control made of
the token's input serves keys and values. Controls made of keys and of values are those of Shark-NLP/CAB, by authors of
both; its causal form reads only the newest token of every slot, here it is the sum of the paper.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attlas.core.errors import BackendUnavailable, BadInput
from attlas.core.mask import Mask
from attlas.core.mechanism import Attend, Call, Cost, Site, Sizes
from attlas.core.registry import register
from attlas.core.spec import ALL_PATTERNS, Example, Spec
from attlas.ops.precision import as_written, wide
from attlas.ops.scan import NEVER
from attlas.ops.softmax import blank_padding

CHUNK = 32

SPEC = Spec(
    name="abc",
    title="ABC: Attention with Bounded-Memory Control",
    year=2022,
    paper="arXiv:2110.02488",
    equation="o = softmax(q K̃ᵀ / √D) Ṽ,  K̃ = softmax(k w)ᵀ k,  Ṽ = softmax(v u)ᵀ v",
    complexity="O(N S D) time, O(S D) state",
    patterns=ALL_PATTERNS,
    streams=True,
    examples=(
        Example(parameters=4 * (16 * 16 + 16) + 2 * 8 * 16),
        Example(heads=4, grid=(2, 4), prefix=1, params={"slots": 3}, parameters=4 * (16 * 16 + 16) + 2 * 4 * 3),
    ),
)


class Slots(NamedTuple):
    """What was written so far: the means (B, H, S, D) and the logarithms of their weights' sums (B, H, S)."""

    means: Tensor
    logs: Tensor


class ABCState(NamedTuple):
    """Slots of keys and of values."""

    keys: Slots
    values: Slots


def _written(x_BHMD: Tensor, scores_BHMS: Tensor) -> Slots:
    """Slots that hold these tokens alone."""
    return Slots(scores_BHMS.mT.softmax(-1) @ x_BHMD, scores_BHMS.logsumexp(2))


def _merged(first: Slots, second: Slots) -> Slots:
    """Slots that hold what both hold."""
    logs = torch.logaddexp(first.logs, second.logs)
    before, behind = (first.logs - logs).exp().unsqueeze(-1), (second.logs - logs).exp().unsqueeze(-1)
    return Slots(first.means * before + second.means * behind, logs)


def _chunked(x_BHND: Tensor, scores_BHNS: Tensor, state: Slots) -> tuple[Slots, Tensor, Slots]:
    """The slots before each of n chunks, (B, H, n, ...); the share of each token; the slots behind them all.

    A share is (B, H, n, C, 1 + C, S): at each query, of what came before its chunk and of each token in it.
    """
    chunk = min(CHUNK, x_BHND.shape[2])
    back = -x_BHND.shape[2] % chunk
    x = F.pad(x_BHND, (0, 0, 0, back)).unflatten(2, (-1, chunk))
    scores = F.pad(scores_BHNS, (0, 0, 0, back), value=NEVER).unflatten(2, (-1, chunk))
    gained = Slots(scores.mT.softmax(-1) @ x, scores.logsumexp(3))
    before = []
    for means, logs in zip(gained.means.unbind(2), gained.logs.unbind(2), strict=True):
        before.append(state)
        state = _merged(state, Slots(means, logs))
    first = Slots(*(torch.stack(parts, 2) for parts in zip(*before, strict=True)))
    pairs = scores.unsqueeze(3).expand(-1, -1, -1, chunk, -1, -1)
    ahead = torch.ones(chunk, chunk, dtype=torch.bool, device=x.device).triu(1).unsqueeze(-1)
    carried = first.logs[:, :, :, None, None].expand(-1, -1, -1, chunk, -1, -1)
    shares = torch.cat([carried, pairs.masked_fill(ahead, -torch.inf)], 4).softmax(4)
    return first, shares, state


@register(SPEC)
class ABC(Attend):
    """Attention to slots that tokens are written to.

    Args:
        site: where it is installed.
        backend: `auto`, `torch` or `oracle`.
        slots: S, rows of the memory.
    """

    def __init__(self, site: Site, backend: str = "auto", *, slots: int = 16) -> None:
        super().__init__(site, backend)
        if backend not in ("auto", "torch", "oracle"):
            raise BackendUnavailable(f"abc runs on auto, torch or oracle, not on backend {backend!r}")
        if slots < 1:
            raise BadInput(f"slots must be at least 1, got {slots}")
        self.slots = slots
        self.keys, self.values = (nn.Parameter(torch.empty(site.head_dim, slots)) for _ in range(2))
        for weight in self.parameters():
            nn.init.xavier_uniform_(weight, gain=2**-0.5)

    def compute(self, q_BHND: Tensor, k_BHMD: Tensor, v_BHME: Tensor, call: Call) -> Tensor:
        """Write all tokens and read, or those before the queries and then chunk by chunk."""
        queries, keys = q_BHND.shape[2], k_BHMD.shape[2]
        causal = call.mask.causal
        if causal and queries > keys:
            raise BadInput(f"queries are the last of the keys' positions, got {queries} queries and {keys} keys")
        with as_written(q_BHND):  # a rounded control is another distribution
            k, v, k_scores, v_scores = self._controlled(k_BHMD, v_BHME, call.mask.keys)
            before = keys - queries if causal else keys
            state = self._empty(q_BHND, v.shape[3])
            if before:
                state = ABCState(
                    _written(k[:, :, :before], k_scores[:, :, :before]),
                    _written(v[:, :, :before], v_scores[:, :, :before]),
                )
            if not causal:
                q = wide(q_BHND) * q_BHND.shape[3] ** -0.5
                return ((q @ state.keys.means.mT).softmax(-1) @ state.values.means).to(q_BHND.dtype)
            k, v, k_scores, v_scores = (t[:, :, before:] for t in (k, v, k_scores, v_scores))
            return self._causal(q_BHND, k, v, k_scores, v_scores, state)[0]

    def _controlled(self, k: Tensor, v: Tensor, keep: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Keys, values and their scores in every slot; padding is 0 with the score `NEVER`."""
        if v.shape[3] != self.values.shape[0]:
            raise BadInput(f"the control was built for values of {self.values.shape[0]} features, got {v.shape[3]}")
        k, v = blank_padding(keep, wide(k), wide(v))
        k_scores, v_scores = k @ wide(self.keys), v @ wide(self.values)
        if keep is not None:
            real = keep[:, None, :, None]
            k_scores, v_scores = k_scores.where(real, NEVER), v_scores.where(real, NEVER)
        return k, v, k_scores, v_scores

    def _causal(
        self, q_BHND: Tensor, k: Tensor, v: Tensor, k_scores: Tensor, v_scores: Tensor, state: ABCState
    ) -> tuple[Tensor, ABCState]:
        tokens = q_BHND.shape[2]
        k_first, k_shares, k_last = _chunked(k, k_scores, state.keys)
        v_first, v_shares, v_last = _chunked(v, v_scores, state.values)
        chunk = k_shares.shape[3]

        def cut(x: Tensor) -> Tensor:
            return F.pad(x, (0, 0, 0, -tokens % chunk)).unflatten(2, (-1, chunk))

        q, k, v = cut(wide(q_BHND) * q_BHND.shape[3] ** -0.5), cut(k), cut(v)
        of_state, of_chunk = q @ k_first.means.mT, q @ k.mT
        reading = (k_shares[..., 0, :] * of_state + (k_shares[..., 1:, :] * of_chunk.unsqueeze(-1)).sum(-2)).softmax(-1)
        o = (reading * v_shares[..., 0, :]) @ v_first.means + (v_shares[..., 1:, :] * reading.unsqueeze(-2)).sum(-1) @ v
        return o.flatten(2, 3)[:, :, :tokens].to(q_BHND.dtype), ABCState(k_last, v_last)

    def oracle(self, q_BHND: Tensor, k_BHMD: Tensor, v_BHME: Tensor, call: Call) -> Tensor:
        """Query by query: a memory of what it sees, slot by slot."""
        batch, heads, queries, size = q_BHND.shape
        keys = k_BHMD.shape[2]
        seen_BHNM = torch.ones(batch, 1, queries, keys, dtype=torch.bool, device=q_BHND.device)
        pairs = call.mask.pairs(queries, keys, q_BHND.device)
        if pairs is not None:
            seen_BHNM = seen_BHNM & pairs
        o_BHNE = v_BHME.new_zeros(batch, heads, queries, v_BHME.shape[3])
        for b in range(batch):
            for n in range(queries):
                seen_M = seen_BHNM[b, 0, n]
                if not seen_M.any():
                    continue
                k_HMD, v_HME = k_BHMD[b][:, seen_M], v_BHME[b][:, seen_M]
                scores, values = [], []
                for w_D, u_E in zip(self.keys.T, self.values.T, strict=True):
                    key_HD = torch.einsum("hm,hmd->hd", (k_HMD @ w_D).softmax(-1), k_HMD)
                    scores.append((q_BHND[b, :, n] * key_HD).sum(-1) * size**-0.5)
                    values.append(torch.einsum("hm,hme->he", (v_HME @ u_E).softmax(-1), v_HME))
                weights_HS = torch.stack(scores, -1).softmax(-1)
                o_BHNE[b, :, n] = torch.einsum("hs,hse->he", weights_HS, torch.stack(values, 1))
        return o_BHNE

    def count(self, sizes: Sizes) -> Cost:
        """Scores, writing and reading; a causal layer reads chunks besides, pair by pair."""
        size, slots, queries, keys = self.site.head_dim, self.slots, sizes.queries, sizes.keys
        causal = self.site.causal and not sizes.cross
        copies = sizes.batch * self.site.heads
        pairs = Mask(causal=causal).area(queries, keys, sizes.batch, self.site.heads)
        needed = 4 * copies * size * slots * (2 * keys + queries)
        if not causal:
            return Cost(needed, needed, pairs)
        chunk = min(CHUNK, queries)
        padded = -(-queries // chunk) * chunk
        before = max(keys - queries, 0)
        made = 4 * copies * size * (slots * (keys + before + 2 * padded) + chunk * padded)
        return Cost(needed, made, pairs)

    def _empty(self, like: Tensor, value: int) -> ABCState:
        batch, heads = like.shape[:2]
        logs = wide(like.new_zeros(batch, heads, self.slots)) + NEVER
        return ABCState(
            *(Slots(logs.new_zeros(batch, heads, self.slots, size), logs) for size in (like.shape[3], value))
        )

    def initial_state(self, batch: int, like: Tensor) -> ABCState:
        """Empty slots."""
        size = self.site.head_dim
        return self._empty(like.new_empty(batch, self.site.heads, 0, size), size)

    def advance(
        self, q: Tensor, k: Tensor, v: Tensor, state: ABCState, keep: Tensor | None, tokens: Tensor | None
    ) -> tuple[Tensor, ABCState]:
        """The causal form, from the slots before the segment."""
        with as_written(q):
            return self._causal(q, *self._controlled(k, v, keep), state)
