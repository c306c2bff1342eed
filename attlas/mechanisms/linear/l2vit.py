"""Linear global attention of L2ViT: ReLU features, a denominator that stays large, a learned scale of the output.

    o_n = τ_h relu(q_n) · Σ_m relu(k_m) v_mᵀ / max(relu(q_n) · Σ_m relu(k_m), 100)

The floor of 100 is a lower bound: where the weights of a query sum to less, its output shrinks, and no division by a
number near 0 upsets the training. τ_h is learned per head, starts at 1 / √D and scales the output, not the scores.

q (B, H, N, D), k (B, H, M, D), v (B, H, M, E), τ (H, 1, 1). A causal layer sums over the keys up to the query. Time
O((N + M) D E), memory O(N D); the state is D (E + 1) numbers per head, in float32 at least.

Its weights are spread wide. L2ViT therefore lets a local concentration module follow, a residual branch of its own:
with `attlas.blocks.local_concentration.LocalConcentration` as lcm and x after a 3 x 3 convolutional position encoding,

    x = x + attention(norm1(x));    x = x + lcm(norm2(x), grid);    x = x + mlp(norm3(x))

Source: Zheng, "The Linear Attention Resurrection in Vision Transformer", 2025 (arXiv:2501.16182), official code
ChuanyangZheng/L2ViT. The causal form and cross-attention are ours.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from attlas.core.errors import BadInput
from attlas.core.mask import Mask
from attlas.core.mechanism import Attend, Call, Cost, Site, Sizes
from attlas.core.registry import register
from attlas.core.spec import ALL_PATTERNS, Example, Spec
from attlas.ops.linear import feature_product, product_flops, with_ones
from attlas.ops.precision import wide
from attlas.ops.softmax import blank_padding

SPEC = Spec(
    name="l2vit",
    title="The Linear Attention Resurrection in Vision Transformer",
    year=2025,
    paper="arXiv:2501.16182",
    equation="o = τ φ(q) (φ(k)ᵀ v) / max(φ(q) (φ(k)ᵀ 1), 100),  φ = relu",
    complexity="O(N D²) time, O(D²) state",
    patterns=ALL_PATTERNS,
    streams=True,
    examples=(
        Example(dim=64, parameters=4 * (64 * 64 + 64) + 2),
        Example(dim=96, heads=3, grid=(2, 4), prefix=1, params={"floor": 30.0}, parameters=4 * (96 * 96 + 96) + 3),
    ),
)


class L2ViTState(NamedTuple):
    """Sums over the keys so far (B, H, D, E + 1): of relu(k) v^T, and in the last column of relu(k)."""

    sums: Tensor


@register(SPEC)
class L2ViT(Attend):
    """ReLU linear attention with a floor under its denominator.

    Args:
        site: where it is installed.
        backend: of `feature_product`.
        floor: the smallest denominator.
    """

    def __init__(self, site: Site, backend: str = "auto", *, floor: float = 100.0) -> None:
        super().__init__(site, backend)
        if not floor > 0:
            raise BadInput(f"floor is the smallest denominator, above 0, got {floor}")
        self.floor = floor
        self.temperature = nn.Parameter(torch.full((site.heads, 1, 1), max(site.head_dim, 1) ** -0.5))

    def compute(self, q_BHND: Tensor, k_BHMD: Tensor, v_BHME: Tensor, call: Call) -> Tensor:
        """Multiply keys with values first."""
        return self._attend(q_BHND, k_BHMD, v_BHME, call.mask, None)[0]

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Mask, state: L2ViTState | None
    ) -> tuple[Tensor, L2ViTState]:
        (keys,) = blank_padding(mask.keys, wide(k).relu())
        values = with_ones(v, mask.keys)
        before = None if state is None else state.sums
        o, sums = feature_product(wide(q).relu(), keys, values, before, causal=mask.causal, backend=self.backend)
        o = self.temperature * o[..., :-1] / o[..., -1:].clamp(min=self.floor)
        return o.to(q.dtype), L2ViTState(sums)

    def oracle(self, q_BHND: Tensor, k_BHMD: Tensor, v_BHME: Tensor, call: Call) -> Tensor:
        """Every pair's weight, normalised row by row."""
        weights = torch.einsum("bhnd,bhmd->bhnm", q_BHND * (q_BHND > 0), k_BHMD * (k_BHMD > 0))
        seen = call.mask.pairs(q_BHND.shape[2], k_BHMD.shape[2], weights.device)
        if seen is not None:
            weights = weights * seen
        total = weights.sum(-1, keepdim=True)
        return self.temperature * (weights / total.where(total > self.floor, self.floor)) @ v_BHME

    def count(self, sizes: Sizes) -> Cost:
        """The sums and their products with the queries, with one more column for the denominator."""
        size, heads = self.site.head_dim, self.site.heads
        causal = self.site.causal and not sizes.cross
        needed, made = product_flops(sizes.queries, sizes.keys, size, size + 1, causal)
        pairs = Mask(causal=causal).area(sizes.queries, sizes.keys, sizes.batch, heads)
        return Cost(sizes.batch * heads * needed, sizes.batch * heads * made, pairs)

    def initial_state(self, batch: int, like: Tensor) -> L2ViTState:
        """Empty sums."""
        size = self.site.head_dim
        return L2ViTState(wide(like.new_zeros(batch, self.site.heads, size, size + 1)))

    def advance(
        self, q: Tensor, k: Tensor, v: Tensor, state: L2ViTState, keep: Tensor | None, tokens: Tensor | None
    ) -> tuple[Tensor, L2ViTState]:
        """The causal form, from the sums before the segment."""
        return self._attend(q, k, v, Mask(causal=True, keys=keep), state)
