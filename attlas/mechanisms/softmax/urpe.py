"""Universal relative positions: a Toeplitz matrix multiplies the weights behind the softmax.

    A_nm = softmax_m(q_n·k_m / √D + b_{m-n} + bias_nm) · c_{m-n},    o_n = Σ_m A_nm v_m

q (B, H, N, D), k (B, G, M, D), v (B, G, M, E); query heads are a multiple of key/value heads. b and c are learned,
one number per head and bucket of offsets, c of any sign; rows are not normalised again. Rows that sum to 1 map
equal tokens to equal outputs at all positions, whatever is added inside the softmax, at any depth: without c
relative positions cannot tell where a token stands. With it attention is a universal approximator.

Queries are the last N of M positions, in cross-attention too, so that offsets stay those of absolute positions
behind a cache. An offset r falls into the bucket of n = |r|,

    n < S/4:  n,    else  min(S/4 + ⌊S/4 · log(4n / S) / log(4R / S)⌋, S/2 - 1)

of its sign; S = `buckets` is 64, R = `reach` 128. S + 1 numbers per head are kept, as officially, of which two
next to the middle are never read. Officially one pair of tables serves all layers: build the others with
`tables=first.attend.tables`. Here b starts at 0 and c at 1, plain softmax attention; officially both at N(0, 1).

Time O(N M D H), memory O(N M H); the state is a key/value cache of 2 N D G numbers.

Source: Luo et al., "Your Transformer May Not be as Powerful as You Expect", 2022 (arXiv:2205.13401), official code
lsj2408/URPE.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attlas.core.errors import BadInput, share
from attlas.core.mask import Mask
from attlas.core.mechanism import CachedAttend, Call, Cost, Site, Sizes
from attlas.core.registry import register
from attlas.core.spec import ALL_PATTERNS, EVERY_MASK, Example, Spec
from attlas.ops.pairs import dense_mask, pair_cost, weighted_values
from attlas.ops.softmax import attention_weights

SPEC = Spec(
    name="urpe",
    title="Your Transformer May Not be as Powerful as You Expect",
    year=2022,
    paper="arXiv:2205.13401",
    equation="o = (softmax(q kᵀ / √D + B) ∘ C) v,  B and C Toeplitz",
    complexity="O(N² D) time, O(N D) state",
    patterns=ALL_PATTERNS,
    grids=(1,),
    prefix=False,
    masks=EVERY_MASK,
    streams=True,
    grouped=True,
    examples=(
        Example(parameters=4 * (16 * 16 + 16) + 2 * 2 * 65),
        Example(
            heads=4,
            kv_heads=2,
            grid=(9,),
            params={"buckets": 8, "reach": 6},
            parameters=2 * (16 * 16 + 16) + 2 * (16 * 8 + 8) + 2 * 4 * 9,
        ),
    ),
)


class Tables(nn.Module):
    """b and c of every bucket and head, for one layer or several.

    Args:
        heads: H.
        buckets: S, a multiple of 4.
        reach: R, the distance from which on all offsets share a bucket.
    """

    def __init__(self, heads: int, buckets: int = 64, reach: int = 128) -> None:
        super().__init__()
        if buckets < 4 or buckets % 4:
            raise BadInput(f"buckets is a multiple of 4, half of it for each sign, got {buckets}")
        if reach <= buckets // 4:
            raise BadInput(f"reach is beyond the {buckets // 4} distances that have their own bucket, got {reach}")
        self.heads, self.buckets, self.reach = heads, buckets, reach
        self.bias = nn.Parameter(torch.zeros(heads, buckets + 1))
        self.factor = nn.Parameter(torch.ones(heads, buckets + 1))

    def bucket(self, offset: Tensor) -> Tensor:
        """The column of the tables that each offset m - n reads."""
        exact, half = self.buckets // 4, self.buckets // 2
        distance = offset.abs()
        # Float64: float32 could put a distance at the edge of a bucket into its neighbour.
        growth = (distance.clamp(min=exact).double() / exact).log() / math.log(self.reach / exact)
        far = (exact + (growth * exact).long()).clamp(max=half - 1)
        level = torch.where(distance < exact, distance, far)
        return torch.where(offset < 0, half - 1 - level, half + 1 + level)

    def forward(self, queries: int, keys: int) -> tuple[Tensor, Tensor]:
        """The matrices B and C, (H, N, M)."""
        query_N = torch.arange(keys - queries, keys, device=self.bias.device)
        bucket_NM = self.bucket(torch.arange(keys, device=self.bias.device) - query_N[:, None])
        return self.bias[:, bucket_NM], self.factor[:, bucket_NM]


@register(SPEC)
class URPE(CachedAttend):
    """Attention with universal relative positions.

    Args:
        site: where it is installed.
        backend: `auto`, `torch` or `oracle`.
        buckets: S, a multiple of 4; S / 2 - 1 distances of each sign are told apart, and 0.
        reach: R, the distance from which on all offsets share a bucket.
        tables: another layer's, to share them; `buckets` and `reach` are then theirs.
        weight_dropout: share of the weights dropped in training, behind the factors.
    """

    def __init__(
        self,
        site: Site,
        backend: str = "auto",
        *,
        buckets: int = 64,
        reach: int = 128,
        tables: Tables | None = None,
        weight_dropout: float = 0.0,
    ) -> None:
        super().__init__(site, backend)
        if tables is not None and tables.heads != site.heads:
            raise BadInput(f"the tables are for {tables.heads} heads, the layer has {site.heads}")
        self.tables = Tables(site.heads, buckets, reach) if tables is None else tables
        self.weight_dropout = share("weight_dropout", weight_dropout)

    def compute(self, q_BHND: Tensor, k_BGMD: Tensor, v_BGME: Tensor, call: Call) -> Tensor:
        """The weights as one matrix, times C, and their product with the values."""
        bias_HNM, factor_HNM = self.tables(q_BHND.shape[2], k_BGMD.shape[2])
        mask = call.mask & Mask(bias=bias_HNM.unsqueeze(0))
        weights = (attention_weights(q_BHND, k_BGMD, mask) * factor_HNM).to(v_BGME.dtype)
        weights = F.dropout(weights, self.weight_dropout, self.training)
        return weighted_values(weights, v_BGME, call.mask)

    def oracle(self, q_BHND: Tensor, k_BGMD: Tensor, v_BGME: Tensor, call: Call) -> Tensor:
        """Row by row over its visible keys, every offset's bucket worked out alone."""
        mask, (batch, heads, queries, size), keys = call.mask, q_BHND.shape, k_BGMD.shape[2]
        seen, bias = dense_mask(mask, (batch, heads, queries, keys), q_BHND)
        o_BHNE = v_BGME.new_zeros(batch, heads, queries, v_BGME.shape[3])
        for b, h, n in seen.any(-1).nonzero().tolist():
            g, m = h // (heads // k_BGMD.shape[1]), seen[b, h, n]
            column = [self._column(int(key) - (n + keys - queries)) for key in m.nonzero()]
            scores = k_BGMD[b, g, m] @ q_BHND[b, h, n] / math.sqrt(size)
            scores = scores + self.tables.bias[h, column] + bias[b, h, n, m]
            odds = (scores - scores.max()).exp()
            weights = odds / odds.sum() * self.tables.factor[h, column]
            o_BHNE[b, h, n] = F.dropout(weights, self.weight_dropout, self.training) @ v_BGME[b, g, m]
        return o_BHNE

    def _column(self, offset: int) -> int:
        """The official numbering: a signed level, moved up by 2 from 0 on, counted from the lowest."""
        quarter, half = self.tables.buckets // 4, self.tables.buckets // 2
        level = abs(offset)
        if level >= quarter:
            growth = math.log(level / quarter) / math.log(self.tables.reach / quarter)
            level = min(quarter + int(growth * quarter), half - 1)
        signed = -level if offset < 0 else level + 2
        return signed + half - 1

    def count(self, sizes: Sizes) -> Cost:
        """Two products per visible pair; the torch backend is counted over all pairs."""
        return pair_cost(self.site, sizes)
