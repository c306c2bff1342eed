"""Spark attention: some features of every head predict which keys matter, the others weigh those.

    q_n = [q¹_n; q²_n],  k_m = [k¹_m; k²_m]                       the first r features, and the rest
    a_nm = q¹_n · k¹_m / √r + bias_nm                             the predictor
    kept_n = {m visible : a_nm > mean_m(a_nm) + std_m(a_nm) Q(1 - K / M_n)}
    o_n = Σ_{m in kept_n} softmax_{m in kept_n}(a_nm) softplus(q²_n · k²_m / √(D - r)) v_m

M_n is how many keys query n sees, and Q the quantile function of the standard normal, so that of normally
distributed scores about K stay: statistical top-k, which sorts nothing. A query that sees K keys or fewer keeps
them all, and every query keeps its best. Statistics and softmax are in float32 or better.

q (B, H, N, D), k (B, G, M, D), v (B, G, M, E). The mathematics needs r features of every visible pair and the
rest of about K pairs per query: O(N M r + N K D), which is `Cost.flops`; how many stay exactly is up to the data,
and `Cost.pairs` is 0 for it. The backend here computes all pairs and masks, which is `Cost.executed`. The state
is a key/value cache, with the statistics taken anew over what is visible. Rotary positions must turn
the two parts separately: `position=attlas.positions.PartRotary(r, D - r)`.

Source: You et al., "Spark Transformer: Reactivating Sparsity in FFN and Attention", 2025 (arXiv:2506.06644),
without official code. K = 256 and r = D / 2 are those of the Gemma-2 2B model (D = 256). The scales of the two
products and how softmax and softplus meet are a reconstruction; so is that the best key always stays, without
which a row of scores with light tails would keep nothing. Its feed-forward twin is `attlas.blocks.spark_ffn`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from attlas.core.errors import BadInput
from attlas.core.mask import Mask
from attlas.core.mechanism import CachedAttend, Call, Cost, Site, Sizes
from attlas.core.registry import register
from attlas.core.spec import ALL_PATTERNS, EVERY_MASK, Example, Spec
from attlas.ops.pairs import dense_mask
from attlas.ops.precision import wide
from attlas.ops.softmax import repeat_heads
from attlas.ops.topk import statistical_topk

SPEC = Spec(
    name="spark",
    title="Spark Transformer: Reactivating Sparsity in FFN and Attention",
    year=2025,
    paper="arXiv:2506.06644",
    equation="o = (softmax(top-K(q₁ k₁ᵀ / √r)) ⊙ softplus(q₂ k₂ᵀ / √(D − r))) v",
    complexity="O(N² r + N K D) time, O(N D) state",
    patterns=ALL_PATTERNS,
    masks=EVERY_MASK,
    streams=True,
    grouped=True,
    shell={"bias": False, "out_bias": False},
    examples=(
        Example(parameters=4 * 16 * 16),
        Example(
            heads=4,
            kv_heads=2,
            grid=(9,),
            params={"active": 3, "predictor": 1},
            parameters=2 * 16 * 16 + 2 * 16 * 8,
        ),
    ),
    reconstruction=True,
)


@register(SPEC)
class Spark(CachedAttend):
    """Attention to the keys that a part of the features predicts.

    Args:
        site: where it is installed; a head has two features or more.
        backend: `auto`, `torch` or `oracle`.
        active: K, about how many keys a query keeps.
        predictor: r, how many features of a head predict; half of them by default.
    """

    def __init__(self, site: Site, backend: str = "auto", *, active: int = 256, predictor: int | None = None) -> None:
        super().__init__(site, backend)
        predictor = site.head_dim // 2 if predictor is None else predictor
        if active < 1:
            raise BadInput(f"active counts the keys that a query keeps and is at least 1, got {active}")
        if not 0 < predictor < site.head_dim:
            raise BadInput(
                f"predictor is 1 to {site.head_dim - 1}, less than the head size of {site.head_dim}, got {predictor}"
            )
        self.active, self.predictor = active, predictor

    def compute(self, q_BHND: Tensor, k_BGMD: Tensor, v_BGME: Tensor, call: Call) -> Tensor:
        """All pairs, masked."""
        heads, queries, keys = q_BHND.shape[1], q_BHND.shape[2], k_BGMD.shape[2]
        mask = call.mask
        if mask.keys is not None:
            k_BGMD, v_BGME = (x.where(mask.keys[:, None, :, None], 0) for x in (k_BGMD, v_BGME))
        k_BHMD, v_BHME = repeat_heads(k_BGMD, heads), repeat_heads(v_BGME, heads)
        parts = (self.predictor, self.site.head_dim - self.predictor)
        products = (
            wide(q @ k.mT) * size**-0.5
            for q, k, size in zip(q_BHND.split(parts, -1), k_BHMD.split(parts, -1), parts, strict=True)
        )
        predicted, rest = products
        if mask.bias is not None:
            predicted = predicted + mask.bias
        seen = mask.pairs(queries, keys, q_BHND.device)
        if seen is None:
            seen = torch.ones_like(predicted[:1, :1], dtype=torch.bool)
        kept = statistical_topk(predicted, self.active, seen)[1]
        best = predicted.masked_fill(~seen, -torch.inf).amax(-1, keepdim=True)
        kept = (kept | (predicted == best)) & seen
        none = ~seen.any(-1, keepdim=True)
        weights = predicted.masked_fill(~(kept | none), -torch.inf).softmax(-1) * F.softplus(rest)
        return weights.where(kept, 0).to(v_BHME.dtype) @ v_BHME

    def oracle(self, q_BHND: Tensor, k_BGMD: Tensor, v_BGME: Tensor, call: Call) -> Tensor:
        """Query by query over the keys that it keeps."""
        batch, heads, queries, size = q_BHND.shape
        groups, keys = k_BGMD.shape[1:3]
        r, mask = self.predictor, call.mask
        seen, bias = dense_mask(mask, (batch, heads, queries, keys), q_BHND)
        normal = torch.distributions.Normal(0.0, 1.0)
        o_BHNE = v_BGME.new_zeros(batch, heads, queries, v_BGME.shape[3])
        for b, h, n in torch.cartesian_prod(*map(torch.arange, (batch, heads, queries))).tolist():
            g, m = h // (heads // groups), seen[b, h, n].nonzero().flatten()
            a = k_BGMD[b, g, m, :r] @ q_BHND[b, h, n, :r] / r**0.5 + bias[b, h, n, m]
            if len(m) > self.active:
                quantile = float(normal.icdf(torch.tensor(1 - self.active / len(m), dtype=torch.float64)))
                kept = (a > a.mean() + a.std(correction=0) * quantile) | (a == a.max())
                a, m = a[kept], m[kept]
            rest = k_BGMD[b, g, m, r:] @ q_BHND[b, h, n, r:] / (size - r) ** 0.5
            o_BHNE[b, h, n] = (a.softmax(0) * F.softplus(rest)) @ v_BGME[b, g, m]
        return o_BHNE

    def count(self, sizes: Sizes) -> Cost:
        """The predictor for visible pairs, the rest for the pairs that are meant to stay."""
        batch, heads, size, r = sizes.batch, self.site.heads, self.site.head_dim, self.predictor
        mask = Mask(causal=self.site.causal and not sizes.cross)
        seen = mask.area(sizes.queries, sizes.keys, batch, heads)
        dropped = 0
        if sizes.keys > self.active:  # a query that sees more keys than stay drops the others
            more = sizes.keys - self.active
            dropped = mask.area(min(sizes.queries, more), more, batch, heads) if mask.causal else 0
            dropped = dropped if mask.causal else batch * heads * sizes.queries * more
        flops = 2 * seen * r + 2 * (seen - dropped) * (2 * size - r)
        return Cost(flops, 4 * batch * heads * sizes.queries * sizes.keys * size)
