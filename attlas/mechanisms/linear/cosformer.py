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
more than the length that the layer is built for, each sequence of a batch from its first to its last real token; a
causal layer has to know its length, or its outputs would depend on how many tokens follow.
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
from attlas.ops.linear import feature_product, product_flops, with_ones
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
        site: where it is installed; its length is M, or the longer of both sequences of a noncausal or cross call,
            padding at the ends left out.
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
        first, length = self._places(q_BHND, k_BHMD, call)
        (q,) = blank_padding(call.mask.queries, q_BHND)  # may lie farther than M, where weights are negative
        q = _features(q, first, length)
        (k,) = blank_padding(call.mask.keys, k_BHMD)
        k, v = _features(k, 0, length), with_ones(v_BHME, call.mask.keys)
        o, _ = feature_product(q, k, v, causal=call.mask.causal, backend=self.backend)
        return self._ratio(o).to(q_BHND.dtype)

    def _places(self, q: Tensor, k: Tensor, call: Call) -> tuple[int, int | Tensor]:
        """The position of the first query, and M, which padding makes one for each sequence, (B, 1, 1, 1)."""
        queries, keys, mask = q.shape[2], k.shape[2], call.mask
        length = self._length(queries if call.cross else max(queries, keys))
        first = 0 if call.cross else keys - queries
        if mask.causal or (mask.queries is None and mask.keys is None):
            return first, max(length, queries, keys)
        (q_begin, q_end), (k_begin, k_end) = _ends(q, mask.queries), _ends(k, mask.keys)
        reach = torch.maximum(q_end + first, k_end) - torch.minimum(q_begin + first, k_begin)
        return first, reach.clamp(min=length)[:, None, None, None]

    def _length(self, reached: int) -> int:
        """The length that the layer is built for."""
        length = self.site.length or 0
        if self.site.causal and reached > length:
            raise BadInput(
                f"causal cosformer is built for {length} tokens, the sequence reaches {reached}; "
                f"build it with length={reached} or more"
            )
        return max(length, 1)

    def _ratio(self, o_BHNE1: Tensor) -> Tensor:
        return o_BHNE1[..., :-1] / o_BHNE1[..., -1:].clamp(min=self.eps)

    def oracle(self, q_BHND: Tensor, k_BHMD: Tensor, v_BHME: Tensor, call: Call) -> Tensor:
        """Every pair's weight with the cosine of its distance, normalised over the visible keys."""
        queries, keys = q_BHND.shape[2], k_BHMD.shape[2]
        first, length = self._places(q_BHND, k_BHMD, call)
        distance_NM = q_BHND.new_tensor([[first + n - m for m in range(keys)] for n in range(queries)])
        (q,) = blank_padding(call.mask.queries, q_BHND)
        weights = torch.einsum("bhnd,bhmd->bhnm", q.clamp(min=0), k_BHMD.clamp(min=0))
        weights = weights * (math.pi / 2 * distance_NM / length).cos()
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
        length = self._length(reached)
        (k,) = blank_padding(keep, k)
        features = (_features(x, state.tokens, length) for x in (q, k))
        o, sums = feature_product(*features, with_ones(v, keep), state.sums, causal=True, backend=self.backend)
        return self._ratio(o).to(q.dtype), CosformerState(sums, reached)


def _ends(x_BHND: Tensor, keep_BN: Tensor | None) -> tuple[Tensor, Tensor]:
    """The position of the first real token and that behind the last, (B,); (1,) where all are real."""
    keep = x_BHND.new_ones(1, x_BHND.shape[2], dtype=torch.bool) if keep_BN is None else keep_BN
    return (keep.cumsum(1) == 0).sum(1), keep.shape[1] - (keep.flip(1).cumsum(1) == 0).sum(1)


def _features(x_BHND: Tensor, first: int, length: int | Tensor) -> Tensor:
    """relu(x) times the cosine and times the sine of its place, (B, H, N, 2 D)."""
    x = F.relu(wide(x_BHND))
    place_N1 = torch.arange(first, first + x.shape[2], device=x.device, dtype=x.dtype).unsqueeze(-1)
    angle = place_N1 * (math.pi / 2) / length
    return torch.cat([x * angle.cos(), x * angle.sin()], -1)
