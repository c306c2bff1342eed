"""Length-scaled softplus attention: the exponential of softmax is exchanged, its l1 norm stays.

    A_nm = φ(s_nm) / Σ_m φ(s_nm),    φ(s) = log(1 + eˢ)
    s_nm = log D · log L_n · cos(q_n, k_m) + bias_nm,    o_n = Σ_m A_nm v_m    over the visible m

q (B, H, N, D), k (B, G, M, D), v (B, G, M, E); query heads are a multiple of key/value heads. L_n is the number
of keys that row n sees, n + 1 in causal use, padding not counted: scores grow with the logarithm of the length,
so that the entropy of a row grows slower than log L_n. The first causal row has log 1 = 0 and attends to itself.
Softplus grows linearly, and numerators and denominators over disjoint keys add up.

Time O(N M D H), memory O(N M H); the state is a key/value cache of 2 N D G numbers.

Source: Gao et al., "Softplus Attention with Re-weighting Boosts Length Extrapolation in Large Language Models",
2025 (arXiv:2501.13428). A reconstruction: the official code was not found, and the cosine and its scale are those
of the paper's last version as others re-implement it. The second stage of the paper is `lssar`.
"""

import math

import torch.nn.functional as F
from torch import Tensor

from attlas.core.errors import BadInput, share
from attlas.core.mechanism import CachedAttend, Call, Cost, Site, Sizes
from attlas.core.registry import register
from attlas.core.spec import ALL_PATTERNS, EVERY_MASK, Example, Spec
from attlas.ops.pairs import dense_mask, pair_cost, weighted_values
from attlas.ops.softplus import softplus_weights

SPEC = Spec(
    name="lssa",
    title="Softplus Attention with Re-weighting Boosts Length Extrapolation in Large Language Models",
    year=2025,
    paper="arXiv:2501.13428",
    equation="o = softplus(log D log L · cos(q, k) + bias) v, rows normalised to 1",
    complexity="O(N² D) time, O(N D) state",
    patterns=ALL_PATTERNS,
    masks=EVERY_MASK,
    streams=True,
    grouped=True,
    examples=(
        Example(parameters=4 * (16 * 16 + 16)),
        Example(heads=4, kv_heads=2, grid=(9,), parameters=2 * (16 * 16 + 16) + 2 * (16 * 8 + 8)),
    ),
    reconstruction=True,
)


@register(SPEC)
class LSSA(CachedAttend):
    """Length-scaled softplus attention.

    Args:
        site: where it is installed.
        backend: `auto`, `torch` or `oracle`.
        scale: of the cosines, beside log L_n; log D by default.
        weight_dropout: share of the attention weights dropped in training.
    """

    def __init__(
        self, site: Site, backend: str = "auto", *, scale: float | None = None, weight_dropout: float = 0.0
    ) -> None:
        super().__init__(site, backend)
        if scale is not None and not 0 < scale < math.inf:
            raise BadInput(f"scale multiplies the cosines and is positive, got {scale}")
        self.scale = math.log(site.head_dim) if scale is None else scale
        self.weight_dropout = share("weight_dropout", weight_dropout)

    def compute(self, q_BHND: Tensor, k_BGMD: Tensor, v_BGME: Tensor, call: Call) -> Tensor:
        """The weights as one matrix, and their product with the values."""
        weights = softplus_weights(q_BHND, k_BGMD, call.mask, self.scale).to(v_BGME.dtype)
        weights = F.dropout(weights, self.weight_dropout, self.training)
        return weighted_values(weights, v_BGME, call.mask)

    def oracle(self, q_BHND: Tensor, k_BGMD: Tensor, v_BGME: Tensor, call: Call) -> Tensor:
        """Row by row over its visible keys, sums of softplus divided."""
        mask, (batch, heads, queries, _), keys = call.mask, q_BHND.shape, k_BGMD.shape[2]
        seen, bias = dense_mask(mask, (batch, heads, queries, keys), q_BHND)
        o_BHNE = v_BGME.new_zeros(batch, heads, queries, v_BGME.shape[3])
        for b, h, n in seen.any(-1).nonzero().tolist():
            g, m = h // (heads // k_BGMD.shape[1]), seen[b, h, n]
            cosines = F.cosine_similarity(k_BGMD[b, g, m], q_BHND[b, h, n], -1, eps=1e-12)
            scores = self.scale * math.log(int(m.sum())) * cosines + bias[b, h, n, m]
            phi = F.softplus(scores, threshold=100)
            weights = F.dropout(phi / phi.sum(), self.weight_dropout, self.training)
            o_BHNE[b, h, n] = weights @ v_BGME[b, g, m]
        return o_BHNE

    def count(self, sizes: Sizes) -> Cost:
        """Two products per visible pair; the torch backend is counted over all pairs."""
        return pair_cost(self.site, sizes)
