"""Hebbian conditioning: every trial adds its outcome times its stimulus, and a test reads out what that sums to.

    M = sum_m v_m k_m^T,    o_n = M q_n = sum_m (q_n . k_m) v_m

A key is the conditional stimulus of a trial, its value the outcome, a query the test stimulus: linear attention without
a feature map, scale or normaliser. A causal layer reads after each trial: M_t = M_{t-1} + v_t k_t^T, o_t = M_t q_t.
Nothing is ever unlearned: an outcome of 0 changes nothing, and a stimulus learns the same whether or not its outcome
was foreseen. Of m trials with random keys of length 1, the read-out of one holds the m - 1 others as noise of power
(m - 1) / D; `attlas.analysis.conditioning` measures how many can be told apart.

q (B, H, N, D), k (B, H, M, D), v (B, H, M, E); weights may be negative. Because sums grow with the number of trials,
the shell divides the output by its root mean square over all channels. A query that sees nothing gives 0.

Time O((N + M) D E), memory O(N D); the state is M, D E numbers per head, in float32 at least.

Source: "Understanding Transformers through the Lens of Pavlovian Conditioning", 2025 (arXiv:2508.08289), which has no
official code. The normalisation in the shell is ours.
"""

from typing import NamedTuple

from torch import Tensor

from attlas.core.mask import Mask
from attlas.core.mechanism import Attend, Call, Cost, Sizes
from attlas.core.registry import register
from attlas.core.spec import ALL_PATTERNS, Example, Spec
from attlas.ops.linear import feature_product, product_flops
from attlas.ops.precision import wide

SPEC = Spec(
    name="pavlovian_hebb",
    title="Understanding Transformers through the Lens of Pavlovian Conditioning",
    year=2025,
    paper="arXiv:2508.08289",
    equation="o = M q,  M = Σ v kᵀ",
    complexity="O(N D²) time, O(D²) state",
    patterns=ALL_PATTERNS,
    streams=True,
    shell={"output_norm": "simple_rms"},
    reconstruction=True,
    examples=(
        Example(parameters=4 * (16 * 16 + 16)),
        Example(heads=4, grid=(2, 4), prefix=1, parameters=4 * (16 * 16 + 16)),
    ),
)


class HebbState(NamedTuple):
    """The transposed M (B, H, D, E): the sum of k v^T over the trials so far."""

    sums: Tensor


@register(SPEC)
class PavlovianHebb(Attend):
    """An associative memory that adds."""

    def compute(self, q_BHND: Tensor, k_BHMD: Tensor, v_BHME: Tensor, call: Call) -> Tensor:
        """Multiply keys with values first."""
        return self._attend(q_BHND, k_BHMD, v_BHME, call.mask, None)[0]

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask, state: Tensor | None) -> tuple[Tensor, Tensor]:
        keys, values = wide(k), wide(v)
        if mask.keys is not None:
            real = mask.keys[:, None, :, None]
            keys, values = keys.where(real, 0), values.where(real, 0)
        o, sums = feature_product(wide(q), keys, values, state, causal=mask.causal, backend=self.backend)
        return o.to(q.dtype), sums

    def oracle(self, q_BHND: Tensor, k_BHMD: Tensor, v_BHME: Tensor, call: Call) -> Tensor:
        """Every test with every trial that it may see."""
        weights = q_BHND @ k_BHMD.transpose(-1, -2)
        seen = call.mask.pairs(q_BHND.shape[2], k_BHMD.shape[2], weights.device)
        return (weights if seen is None else weights.where(seen, 0)) @ v_BHME

    def count(self, sizes: Sizes) -> Cost:
        """Each trial into the memory, each test out of it."""
        size = self.site.head_dim
        causal = self.site.causal and not sizes.cross
        copies = sizes.batch * self.site.heads
        needed, made = product_flops(sizes.queries, sizes.keys, size, size, causal)
        pairs = Mask(causal=causal).area(sizes.queries, sizes.keys, sizes.batch, self.site.heads)
        return Cost(copies * needed, copies * made, pairs)

    def initial_state(self, batch: int, like: Tensor) -> HebbState:
        """Nothing learned."""
        size = self.site.head_dim
        return HebbState(wide(like.new_zeros(batch, self.site.heads, size, size)))

    def advance(
        self, q: Tensor, k: Tensor, v: Tensor, state: HebbState, keep: Tensor | None, tokens: Tensor | None
    ) -> tuple[Tensor, HebbState]:
        """The causal form, from what was learned before the segment."""
        o, sums = self._attend(q, k, v, Mask(causal=True, keys=keep), state.sums)
        return o, HebbState(sums)
