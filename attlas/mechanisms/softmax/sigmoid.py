"""Sigmoid attention: every weight stands for itself, nothing is normalised over the keys.

    o_n = sum_m sigmoid(q_n . k_m / sqrt(D) + bias_nm + b) v_m,    b = -log n

q (B, H, N, D), k (B, G, M, D), v (B, G, M, E); query heads are a multiple of key/value heads. n is the
length that the model is trained on (`length` of the layer; 2048, the published one, where that is not
known) and b a constant, the same at every length and in decoding: it makes the n weights sum to about 1
at first, where without it the output would grow with n. Queries and keys are normalised over the head
size, and no projection has a bias. Since weights are independent of each other, outputs over disjoint sets
of keys add up to the output over their union.

What else the recipe has are settings: ALiBi in place of b (`position=attlas.positions.ALiBi(heads), shift=0`),
rotary positions with it, a norm of the output for long sequences (hybrid norm, `output_norm="rms"`), a norm of
the values over the head size (`value_norm=True`), which cross-attention of the official code always has, and in
vision a scale of 1e-4 on each branch (`attlas.blocks.layer_scale`).

Time O(N M D H), memory O(N D) in tiles; the state is a key/value cache of 2 N D G numbers.

Source: Ramapuram et al., "Theory, Analysis, and Best Practices for Sigmoid Self-Attention", 2024
(arXiv:2409.04431), official code apple/ml-sigmoid-attention.
"""

import math

from torch import Tensor, nn

from attlas.core.errors import BadInput, share
from attlas.core.mask import Mask
from attlas.core.mechanism import CachedAttend, Call, Cost, Site, Sizes
from attlas.core.registry import register
from attlas.core.spec import ALL_PATTERNS, EVERY_MASK, Example, Pattern, Spec
from attlas.ops.sigmoid import sigmoid_attention, tiles

PUBLISHED_LENGTH = 2048

SPEC = Spec(
    name="sigmoid",
    title="Theory, Analysis, and Best Practices for Sigmoid Self-Attention",
    year=2024,
    paper="arXiv:2409.04431",
    equation="o = σ(q kᵀ / √D + bias − log n) v",
    complexity="O(N² D) time, O(N D) state",
    patterns=ALL_PATTERNS,
    masks=EVERY_MASK,
    streams=True,
    grouped=True,
    shell={"qk_norm": "layer", "bias": False, "out_bias": False},
    examples=(
        Example(parameters=4 * 16 * 16 + 2 * (8 + 8)),
        Example(heads=4, kv_heads=2, grid=(9,), parameters=2 * 16 * 16 + 2 * 16 * 8 + 2 * (4 + 4)),
        Example(
            heads=4,
            grid=(2, 3),
            params={"value_norm": True, "shift": -1.0},
            parameters=4 * 16 * 16 + 3 * (4 + 4),
            patterns=frozenset({Pattern.NONCAUSAL_CROSS}),
        ),
    ),
)


@register(SPEC)
class Sigmoid(CachedAttend):
    """Sigmoid attention.

    Args:
        site: where it is installed; its length is n.
        backend: of `sigmoid_attention`.
        shift: b, at every length; -log n by default.
        value_norm: a LayerNorm of the values, over the head size.
        weight_dropout: share of the attention weights dropped in training.
    """

    def __init__(
        self,
        site: Site,
        backend: str = "auto",
        *,
        shift: float | None = None,
        value_norm: bool = False,
        weight_dropout: float = 0.0,
    ) -> None:
        super().__init__(site, backend)
        if shift is not None and not math.isfinite(shift):
            raise BadInput(f"shift is a finite number, -log of the length by default, got {shift}")
        self.shift = -math.log(site.length or PUBLISHED_LENGTH) if shift is None else shift
        self.value_norm = nn.LayerNorm(site.head_dim) if value_norm else nn.Identity()
        self.weight_dropout = share("weight_dropout", weight_dropout)

    def compute(self, q_BHND: Tensor, k_BGMD: Tensor, v_BGME: Tensor, call: Call) -> Tensor:
        """Run the op."""
        dropout = self.weight_dropout if self.training else 0.0
        return sigmoid_attention(
            q_BHND, k_BGMD, self.value_norm(v_BGME), call.mask, shift=self.shift, dropout=dropout, backend=self.backend
        )

    oracle = compute  # the op's own oracle backend

    def count(self, sizes: Sizes) -> Cost:
        """Two products per visible pair; the torch backend's tiles reach to their last query."""
        batch, heads, size = sizes.batch, self.site.heads, self.site.head_dim
        causal = self.site.causal and not sizes.cross
        pairs = Mask(causal=causal).area(sizes.queries, sizes.keys, batch, heads)
        made = sum((stop - start) * reach for start, stop, reach in tiles(sizes.queries, sizes.keys, causal))
        return Cost(4 * pairs * size, 4 * batch * heads * made * size, pairs)
