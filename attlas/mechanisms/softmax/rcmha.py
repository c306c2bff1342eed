"""Relative convolutional multi-head attention: relative scores over convolved queries, keys and values.

    q, k, v <- conv(q), conv(k), conv(v),     conv(z)_t = Σ_{s<3} w_s ⊙ z_{t−2+s} + w
    S_nm = ((q_n + u)·k_m + q_n·R_{n−m} + b_{n−m}) / √D,     o_n = Σ_m softmax_m(S_nm) v_m

The convolutions are Primer's: depth-wise over time, causal, one each for queries, keys and values, with one set of
taps per feature of a head that all heads share; zeros stand before the first position and where there is
padding. The score is Transformer-XL's with learned tables in place of sinusoids: a vector R and a number b per head
for each distance n − m in −P < n − m <= P, and one vector u per head. All three start at 0, so that a fresh layer
scores by content alone. The convolutions stay causal where the attention is not.

q (B, H, N, D), k, v (B, G, M, D), u (H, D), R (2P, H, D), b (2P, H), where row P − (n − m) belongs to the distance
n − m. Queries are the last N of M positions. Time O(N M D H); 2P H (D + 1) + H D + 12 D parameters. The state is a
key/value cache of convolved keys and values, and the last two positions before each convolution. A pair mask is
refused, because it could not stop the convolutions; a bias is added to the scores. In self-attention the call
brings all positions, since the convolution of a first query needs those before it; `extend` knows them.

Source: Sugiharto et al., "RCMHA: Relative Convolutional Multi-Head Attention for Natural Language Modelling", 2023
(arXiv:2308.03429). The composition is a reconstruction, without official code; its two parts are the relative
attention and the Primer attention of labmlai/annotated_deep_learning_paper_implementations.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attlas.core.errors import BadInput, share
from attlas.core.mask import Mask
from attlas.core.mechanism import Attend, Call, Cost, Site, Sizes
from attlas.core.registry import register
from attlas.core.spec import ALL_PATTERNS, Example, Spec, Takes
from attlas.core.state import KVCache
from attlas.ops.softmax import attention_weights, repeat_heads, softmax_attention

KERNEL = 3

PUBLISHED_POSITIONS = 4096

SPEC = Spec(
    name="rcmha",
    title="RCMHA: Relative Convolutional Multi-Head Attention for Natural Language Modelling",
    year=2023,
    paper="arXiv:2308.03429",
    equation="o = softmax(((q + u) kᵀ + q R_{n−m}ᵀ + b_{n−m}) / √D) v,  q, k, v convolved over time",
    complexity="O(N² D) time, O(N D) state",
    patterns=ALL_PATTERNS,
    grids=(1,),
    prefix=False,
    masks=frozenset({Takes.PADDING, Takes.BIAS}),
    streams=True,
    grouped=True,
    shell={"bias": False},
    examples=(
        Example(params={"positions": 64}, parameters=4 * 16 * 16 + 16 + 128 * 2 * (8 + 1) + 2 * 8 + 12 * 8),
        Example(
            heads=4,
            kv_heads=2,
            grid=(9,),
            params={"positions": 64},
            parameters=2 * 16 * 16 + 2 * 16 * 8 + 16 + 128 * 4 * (4 + 1) + 4 * 4 + 12 * 4,
        ),
    ),
    reconstruction=True,
)


class RCMHAState(NamedTuple):
    """Convolved keys and values so far, and the last two queries, keys and values before their convolutions."""

    cache: KVCache
    q: Tensor
    k: Tensor
    v: Tensor


@register(SPEC)
class RCMHA(Attend):
    """Relative convolutional multi-head attention.

    Args:
        site: where it is installed.
        backend: of `softmax_attention`.
        positions: P, the most keys of a call; the length of the site, or the published 4096 where that is not known.
        weight_dropout: share of the attention weights dropped in training.
    """

    def __init__(
        self, site: Site, backend: str = "auto", *, positions: int | None = None, weight_dropout: float = 0.1
    ) -> None:
        super().__init__(site, backend)
        positions = site.length or PUBLISHED_POSITIONS if positions is None else positions
        if positions < 1:
            raise BadInput(f"positions is the most keys of a call, at least 1, got {positions}")
        heads, size = site.heads, site.head_dim
        self.positions = positions
        self.weight_dropout = share("weight_dropout", weight_dropout)
        self.q_conv, self.k_conv, self.v_conv = (nn.Conv1d(size, size, KERNEL, groups=size) for _ in range(3))
        self.query_bias = nn.Parameter(torch.zeros(heads, size))
        self.key_table = nn.Parameter(torch.zeros(2 * positions, heads, size))
        self.bias_table = nn.Parameter(torch.zeros(2 * positions, heads))

    def compute(self, q_BHND: Tensor, k_BGMD: Tensor, v_BGMD: Tensor, call: Call) -> Tensor:
        """Convolve behind zeros, then attend with the relative part of the score as a bias."""
        self._check_call(q_BHND, k_BGMD, call)
        queries, keys = call.mask.queries, call.mask.keys
        q, k, v = (
            _convolve(conv, F.pad(_real(x, keep), (0, 0, KERNEL - 1, 0)))
            for conv, x, keep in (
                (self.q_conv, q_BHND, queries),
                (self.k_conv, k_BGMD, keys),
                (self.v_conv, v_BGMD, keys),
            )
        )
        return self._attend(q, k, v, call.mask)

    def _check_call(self, q: Tensor, k: Tensor, call: Call) -> None:
        queries, keys = q.shape[2], k.shape[2]
        if not call.cross and queries != keys:
            raise BadInput(
                f"rcmha convolves over all positions, got {queries} queries and {keys} keys: pass them all, or extend "
                "a state that knows those before"
            )
        self._check_reach(max(queries, keys))

    def _check_reach(self, tokens: int) -> None:
        if tokens > self.positions:
            raise BadInput(
                f"this rcmha has learned distances for {self.positions} positions and was given {tokens}: build it "
                f"with positions={tokens} or more"
            )

    def _attend(self, q_BHND: Tensor, k_BGMD: Tensor, v_BGMD: Tensor, mask: Mask) -> Tensor:
        queries, keys, device = q_BHND.shape[2], k_BGMD.shape[2], q_BHND.device
        rows = slice(self.positions - keys + 1, self.positions + self._ahead(queries, mask.causal) + 1)
        scores_BHNR = q_BHND @ self.key_table[rows].permute(1, 2, 0) + self.bias_table[rows].T.unsqueeze(1)
        place = torch.arange(keys - queries, keys, device=device).unsqueeze(1)
        # Rows beyond the last one are those of keys behind the query, which a causal mask hides.
        row_NM = (torch.arange(keys, device=device) - place + keys - 1).clamp(max=scores_BHNR.shape[3] - 1)
        relative_BHNM = scores_BHNR.gather(3, row_NM.expand(*q_BHND.shape[:2], -1, -1)) * q_BHND.shape[3] ** -0.5
        return softmax_attention(
            q_BHND + self.query_bias.unsqueeze(1),
            k_BGMD,
            v_BGMD,
            mask & Mask.biased(relative_BHNM),
            dropout=self.weight_dropout if self.training else 0.0,
            backend=self.backend,
        )

    @staticmethod
    def _ahead(queries: int, causal: bool) -> int:
        """How far ahead of a query a key may be."""
        return 0 if causal else queries - 1

    def oracle(self, q_BHND: Tensor, k_BGMD: Tensor, v_BGMD: Tensor, call: Call) -> Tensor:
        """Taps one by one, the relative vectors as an (N, M, H, D) tensor."""
        self._check_call(q_BHND, k_BGMD, call)
        heads, mask = q_BHND.shape[1], call.mask
        q, k, v = (
            _taps(conv, _real(x, keep))
            for conv, x, keep in (
                (self.q_conv, q_BHND, mask.queries),
                (self.k_conv, k_BGMD, mask.keys),
                (self.v_conv, v_BGMD, mask.keys),
            )
        )
        last = k.shape[2] - 1
        distances = [[last - n - m for m in range(last + 1)] for n in reversed(range(q.shape[2]))]
        row_NM = self.positions - torch.tensor(distances, device=q.device)
        relative = torch.einsum("bhnd,nmhd->bhnm", q, self.key_table[row_NM])
        relative = (relative + self.bias_table[row_NM].permute(2, 0, 1)) / q.shape[3] ** 0.5
        weights = attention_weights(q + self.query_bias[:, None], k, mask & Mask.biased(relative))
        return F.dropout(weights, self.weight_dropout, self.training) @ repeat_heads(v, heads)

    def count(self, sizes: Sizes) -> Cost:
        """Three products per visible pair and three taps per convolved feature; vectors for all distances."""
        batch, heads, size = sizes.batch, self.site.heads, self.site.head_dim
        queries, keys = sizes.queries, sizes.keys
        causal = self.site.causal and not sizes.cross
        convolved = 2 * batch * KERNEL * size * (heads * queries + 2 * self.site.kv_heads * keys)
        pairs = Mask(causal=causal).area(queries, keys, batch, heads)
        distances = keys + self._ahead(queries, causal)
        executed = convolved + 2 * batch * heads * queries * size * (2 * keys + distances)
        return Cost(convolved + 6 * pairs * size, executed, pairs)

    def initial_state(self, batch: int, like: Tensor) -> RCMHAState:
        """An empty cache, and zeros before the first position."""
        site, size = self.site, self.site.head_dim
        q, k, v = (
            like.new_zeros(batch, heads, KERNEL - 1, size) for heads in (site.heads, site.kv_heads, site.kv_heads)
        )
        return RCMHAState(KVCache.empty(batch, site.kv_heads, size, size, like), q, k, v)

    def advance(
        self, q: Tensor, k: Tensor, v: Tensor, state: RCMHAState, keep: Tensor | None, tokens: Tensor | None
    ) -> tuple[Tensor, RCMHAState]:
        """Convolve the segment behind the last two positions, attend to the cache and the segment."""
        pasts = [torch.cat([past, _real(x, keep)], 2) for past, x in zip(state[1:], (q, k, v), strict=True)]
        q, k, v = (_convolve(conv, x) for conv, x in zip((self.q_conv, self.k_conv, self.v_conv), pasts, strict=True))
        cache = state.cache.append(k, v, keep)
        self._check_reach(cache.k.rows.shape[2])
        o = self._attend(q, cache.k.rows, cache.v.rows, Mask(causal=True, keys=cache.keys, queries=keep))
        # Copies of the last rows, so that nothing keeps the whole segment alive.
        return o, RCMHAState(cache, *(x[:, :, x.shape[2] - KERNEL + 1 :].clone() for x in pasts))


def _real(x_BHND: Tensor, keep_BN: Tensor | None) -> Tensor:
    """x, 0 where there is padding."""
    return x_BHND if keep_BN is None else x_BHND.where(keep_BN[:, None, :, None], 0)


def _convolve(conv: nn.Conv1d, x_BHND: Tensor) -> Tensor:
    """The convolution without padding over the tokens of each head: two fewer come out."""
    return conv(x_BHND.flatten(0, 1).transpose(1, 2)).transpose(1, 2).unflatten(0, x_BHND.shape[:2])


def _taps(conv: nn.Conv1d, x_BHND: Tensor) -> Tensor:
    """The same behind zeros, tap by tap."""
    padded = F.pad(x_BHND, (0, 0, KERNEL - 1, 0))
    taps = [conv.weight[:, 0, s] * padded[:, :, s : s + x_BHND.shape[2]] for s in range(KERNEL)]
    assert conv.bias is not None
    return sum(taps, conv.bias)
