"""Linear attention: the exponential of softmax becomes a product of features, and sums change places.

    o_n = phi(q_n) . S / phi(q_n) . z,    S = sum_m phi(k_m) v_m^T,  z = sum_m phi(k_m),  phi(x) = elu(x) + 1

q (B, H, N, D), k (B, H, M, D), v (B, H, M, E). A causal layer sums over the keys up to the query, in chunks
of which each sees the sums before it. There is no 1 / sqrt(D). A query that sees nothing gives 0.

Time O((N + M) D E), memory O(N D); the state is S and z, D (E + 1) numbers per head, in float32 at least.

Source: Katharopoulos et al., "Transformers are RNNs: Fast Autoregressive Transformers with Linear Attention",
2020 (arXiv:2006.16236), official code idiap/fast-transformers.
"""

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

from attlas.core.mask import Mask
from attlas.core.mechanism import Attend, Call, Cost, Sizes
from attlas.core.registry import register
from attlas.core.spec import ALL_PATTERNS, Example, Spec
from attlas.ops.elu import elu_plus_one
from attlas.ops.linear import product_flops, weighted_average
from attlas.ops.precision import wide
from attlas.ops.softmax import blank_padding

SPEC = Spec(
    name="linear",
    title="Transformers are RNNs: Fast Autoregressive Transformers with Linear Attention",
    year=2020,
    paper="arXiv:2006.16236",
    equation="o = φ(q) (φ(k)ᵀ v) / φ(q) (φ(k)ᵀ 1),  φ = elu + 1",
    complexity="O(N D²) time, O(D²) state",
    patterns=ALL_PATTERNS,
    streams=True,
    examples=(
        Example(parameters=4 * (16 * 16 + 16)),
        Example(heads=4, grid=(2, 4), prefix=1, parameters=4 * (16 * 16 + 16)),
    ),
)


class LinearState(NamedTuple):
    """Sums over the keys so far (B, H, D, E + 1): of phi(k) v^T, and in the last column of phi(k)."""

    sums: Tensor


@register(SPEC)
class Linear(Attend):
    """Linear attention with the feature map elu + 1."""

    def compute(self, q_BHND: Tensor, k_BHMD: Tensor, v_BHME: Tensor, call: Call) -> Tensor:
        """Multiply keys with values first."""
        return self._attend(q_BHND, k_BHMD, v_BHME, call.mask, None)[0]

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Mask, state: LinearState | None
    ) -> tuple[Tensor, LinearState]:
        keys, values = blank_padding(mask.keys, elu_plus_one(k), wide(v))
        before = None if state is None else state.sums
        o, sums = weighted_average(elu_plus_one(q), keys, values, before, causal=mask.causal, backend=self.backend)
        return o.to(q.dtype), LinearState(sums)

    def oracle(self, q_BHND: Tensor, k_BHMD: Tensor, v_BHME: Tensor, call: Call) -> Tensor:
        """Every pair's weight, normalised over the visible keys."""
        weights = (F.elu(q_BHND) + 1) @ (F.elu(k_BHMD) + 1).transpose(-1, -2)
        seen = call.mask.pairs(q_BHND.shape[2], k_BHMD.shape[2], weights.device)
        if seen is not None:
            weights = weights * seen
        return weights @ v_BHME / weights.sum(-1, keepdim=True).clamp(min=1e-30)

    def count(self, sizes: Sizes) -> Cost:
        """The sums and their products with the queries, with one more column for the denominator."""
        size = self.site.head_dim
        causal = self.site.causal and not sizes.cross
        copies = sizes.batch * self.site.heads
        needed, made = product_flops(sizes.queries, sizes.keys, size, size + 1, causal)
        pairs = Mask(causal=causal).area(sizes.queries, sizes.keys, sizes.batch, self.site.heads)
        return Cost(copies * needed, copies * made, pairs)

    def initial_state(self, batch: int, like: Tensor) -> LinearState:
        """Empty sums."""
        size = self.site.head_dim
        return LinearState(wide(like.new_zeros(batch, self.site.heads, size, size + 1)))

    def advance(
        self, q: Tensor, k: Tensor, v: Tensor, state: LinearState, keep: Tensor | None, tokens: Tensor | None
    ) -> tuple[Tensor, LinearState]:
        """The causal form, from the sums before the segment."""
        return self._attend(q, k, v, Mask(causal=True, keys=keep), state)
