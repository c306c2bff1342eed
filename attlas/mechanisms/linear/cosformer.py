"""cosFormer: linear attention with ReLU features and weights that fall with distance as a cosine.

    o_n = Σ_m w_nm v_m / Σ_m w_nm,    w_nm = relu(q_n) · relu(k_m) cos(π/2 (n − m) / M)

The cosine of a difference is a sum of two products, so relu(q_n) (cos π n / 2M, sin π n / 2M) and the same of keys
are features of twice the size, and linear attention gives the sums exactly. M is the largest length: no distance
reaches it, where the cosine is zero, and no weight is negative.

q (B, H, N, D), k (B, H, M, D), v (B, H, M, E). In self-attention the queries are the last of the positions; in
cross-attention both sequences count from their first token, as officially. There is no 1 / sqrt(D). Sums of
weights below `eps` count as `eps`; a query that sees nothing gives 0. A grid is read row by row.

Time O((N + M) D E), memory O(N D); the state is 2 D (E + 1) numbers per head, in float32 at least, and the position.

Source: Qin et al., "cosFormer: Rethinking Softmax in Attention", 2022 (arXiv:2202.08791), official code
OpenNLPLab/cosFormer, which takes the longer of the two sequences for M. So does a noncausal layer here, where that is
more than the length that the layer is built for; a causal layer has to know its length, or its outputs would depend
on how many tokens follow.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from attlas.core.errors import BadInput
from attlas.core.mask import Mask
from attlas.core.mechanism import Attend, Call, Cost, Site, Sizes
from attlas.core.registry import register
from attlas.core.spec import ALL_PATTERNS, Example, Spec
from attlas.ops.linear import feature_product, product_flops
from attlas.ops.precision import wide
from attlas.ops.softmax import blank_padding

SPEC = Spec(
    name="cosformer",
    title="cosFormer: Rethinking Softmax in Attention",
    year=2022,
    paper="arXiv:2202.08791",
    equation="o = φ(q) (φ(k)ᵀ v) / φ(q) (φ(k)ᵀ 1),  φ(x_n) = relu(x_n) ⊗ (cos, sin)(π n / 2M)",
    complexity="O(N D²) time, O(D²) state",
    patterns=ALL_PATTERNS,
    streams=True,
    examples=(
        # Small heads would have pairs without a common positive feature, which gradients do not see.
        Example(dim=64, parameters=4 * (64 * 64 + 64)),
        Example(dim=96, heads=3, grid=(2, 4), prefix=1, parameters=4 * (96 * 96 + 96)),
    ),
)


class CosformerState(NamedTuple):
    """Sums over the keys so far (B, H, 2 D, E + 1), that of the features in the last column, and their number."""

    sums: Tensor
    tokens: int


@register(SPEC)
class Cosformer(Attend):
    """Linear attention with ReLU features and cosine reweighting.

    Args:
        site: where it is installed; its length is M, or the longer of both sequences of a noncausal or cross call.
        backend: of `feature_product`.
        eps: the least sum of weights.
    """

    def __init__(self, site: Site, backend: str = "auto", *, eps: float = 1e-6) -> None:
        super().__init__(site, backend)
        if site.causal and site.length is None:
            raise BadInput("causal cosformer needs to know how long a sequence gets: pass length=, the most tokens")
        if not eps > 0:
            raise BadInput(f"eps is the least sum of weights, above 0, got {eps}")
        self.eps = eps

    def compute(self, q_BHND: Tensor, k_BHMD: Tensor, v_BHME: Tensor, call: Call) -> Tensor:
        """Multiply keys with values first."""
        first, length = self._places(q_BHND.shape[2], k_BHMD.shape[2], call.cross)
        q = _features(q_BHND, first, length)
        k, v = blank_padding(call.mask.keys, k_BHMD, v_BHME)
        k = _features(k, 0, length)
        o, _ = feature_product(q, k, _with_ones(v, call.mask.keys), causal=call.mask.causal, backend=self.backend)
        return self._ratio(o).to(q_BHND.dtype)

    def _places(self, queries: int, keys: int, cross: bool) -> tuple[int, int]:
        """The position of the first query, and M."""
        length = self.site.length or 0
        reached = queries if cross else max(queries, keys)
        if self.site.causal and reached > length:
            raise BadInput(
                f"causal cosformer is built for {length} tokens, the sequence reaches {reached}; "
                f"build it with length={reached} or more"
            )
        return 0 if cross else keys - queries, max(length, queries, keys, 1)

    def _ratio(self, o_BHNE1: Tensor) -> Tensor:
        return o_BHNE1[..., :-1] / o_BHNE1[..., -1:].clamp(min=self.eps)

    def oracle(self, q_BHND: Tensor, k_BHMD: Tensor, v_BHME: Tensor, call: Call) -> Tensor:
        """Every pair's weight with the cosine of its distance, normalised over the visible keys."""
        queries, keys = q_BHND.shape[2], k_BHMD.shape[2]
        first, length = self._places(queries, keys, call.cross)
        nearness_NM = q_BHND.new_tensor(
            [[math.cos(math.pi / 2 * (first + n - m) / length) for m in range(keys)] for n in range(queries)]
        )
        weights = torch.einsum("bhnd,bhmd->bhnm", q_BHND.clamp(min=0), k_BHMD.clamp(min=0)) * nearness_NM
        seen = call.mask.pairs(queries, keys, weights.device)
        if seen is not None:
            weights = weights * seen
        return weights @ v_BHME / weights.sum(-1, keepdim=True).clamp(min=self.eps)

    def count(self, sizes: Sizes) -> Cost:
        """The sums and their products with the queries, for features of twice the size and one more column."""
        size = self.site.head_dim
        causal = self.site.causal and not sizes.cross
        copies = sizes.batch * self.site.heads
        needed, made = product_flops(sizes.queries, sizes.keys, 2 * size, size + 1, causal)
        pairs = Mask(causal=causal).area(sizes.queries, sizes.keys, sizes.batch, self.site.heads)
        return Cost(copies * needed, copies * made, pairs)

    def initial_state(self, batch: int, like: Tensor) -> CosformerState:
        """Empty sums."""
        size = self.site.head_dim
        return CosformerState(wide(like.new_zeros(batch, self.site.heads, 2 * size, size + 1)), 0)

    def advance(
        self, q: Tensor, k: Tensor, v: Tensor, state: CosformerState, keep: Tensor | None, tokens: Tensor | None
    ) -> tuple[Tensor, CosformerState]:
        """The causal form, from the sums before the segment and at its position."""
        reached = state.tokens + k.shape[2]
        _, length = self._places(q.shape[2], reached, False)
        k, v = blank_padding(keep, k, v)
        features = (_features(x, state.tokens, length) for x in (q, k))
        o, sums = feature_product(*features, _with_ones(v, keep), state.sums, causal=True, backend=self.backend)
        return self._ratio(o).to(q.dtype), CosformerState(sums, reached)


def _features(x_BHND: Tensor, first: int, length: int) -> Tensor:
    """relu(x) times the cosine and times the sine of its place, (B, H, N, 2 D)."""
    x = F.relu(wide(x_BHND))
    place_N1 = torch.arange(first, first + x.shape[2], device=x.device, dtype=x.dtype).unsqueeze(-1)
    angle_N1 = place_N1 * (math.pi / 2 / length)
    return torch.cat([x * angle_N1.cos(), x * angle_N1.sin()], -1)


def _with_ones(v_BHME: Tensor, keep_BM: Tensor | None) -> Tensor:
    """The values with a 1 behind each real one: its sums are the denominators."""
    v = F.pad(wide(v_BHME), (0, 1), value=1.0)
    return v if keep_BM is None else v.where(keep_BM[:, None, :, None], 0)
