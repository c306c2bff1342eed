"""Attention without similarity: the weight of a token depends on that token alone.

    o_n = Σ_{m≤n} softmax_{m≤n}(s_m) v_m,    s_m = SiLU(q_m) · k_m / √D

Queries and keys are both made of the token that is weighed, and nobody asks: every output is a running
average of the values, with the same weights but for their sum. It is kept as the largest score, the sum of
the weights and the weighted sum of the values, which merge associatively in a prefix scan. It has the
projections, and the parameters, of softmax attention. Such layers alone do not learn language; in every
second layer they cost almost nothing.

q, k (B, H, N, D), v (B, H, N, E); time O(N D), memory O(N D); the state is E + 2 numbers per head, in float32
at least.

Source: Xue et al., "Deconstructing Attention: Investigating Design Principles for Effective Language Modeling",
2025 (arXiv:2510.11602); no official code was found. Whether the paper turns queries and keys by rotary positions
here is not known to us; with `position` of the shell they are turned before the SiLU.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from attlas.core.errors import BadInput
from attlas.core.mask import Mask
from attlas.core.mechanism import Attend, Call, Cost, Sizes
from attlas.core.registry import register
from attlas.core.spec import Example, Pattern, Spec
from attlas.ops.precision import wide
from attlas.ops.scan import RunningSoftmax, running_softmax

SPEC = Spec(
    name="deconstruct_non_approximate",
    title="Deconstructing Attention: Investigating Design Principles for Effective Language Modeling",
    year=2025,
    paper="arXiv:2510.11602",
    equation="o_n = softmax(s_{≤n}) v_{≤n},  s = SiLU(q) · k / √D of one token",
    complexity="O(N D) time, O(D) state",
    patterns=frozenset({Pattern.CAUSAL_SELF}),
    grids=(1,),
    streams=True,
    examples=(
        Example(parameters=4 * (16 * 16 + 16)),
        Example(heads=4, grid=(9,), params={"bias": False}, parameters=4 * 16 * 16 + 16),
    ),
    reconstruction=True,
)


@register(SPEC)
class DeconstructNonApproximate(Attend):
    """Running softmax average under scores of the keys alone."""

    def compute(self, q_BHND: Tensor, k_BHND: Tensor, v_BHNE: Tensor, call: Call) -> Tensor:
        """Scores, and their running softmax."""
        return self._attend(q_BHND, k_BHND, v_BHNE, call.mask.keys, None)[0]

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, keep: Tensor | None, state: RunningSoftmax | None
    ) -> tuple[Tensor, RunningSoftmax]:
        o, state = running_softmax(self._scores(q, k), v, keep, state, backend=self.backend)
        return o.to(v.dtype), state

    def _scores(self, q: Tensor, k: Tensor) -> Tensor:
        if q.shape[2] != k.shape[2]:
            raise BadInput(
                f"{self.spec.name} scores a token by its own query and key: it needs as many queries as keys, "
                f"got {q.shape[2]} and {k.shape[2]}; to go on behind a cache use extend"
            )
        return (F.silu(wide(q)) * wide(k)).sum(-1) * q.shape[3] ** -0.5

    def oracle(self, q_BHND: Tensor, k_BHND: Tensor, v_BHNE: Tensor, call: Call) -> Tensor:
        """A masked softmax whose rows of scores are all the same."""
        self._scores(q_BHND, k_BHND)
        score_BHM = torch.einsum("bhmd,bhmd->bhm", q_BHND / (1 + (-q_BHND).exp()), k_BHND) / q_BHND.shape[3] ** 0.5
        seen = call.mask.pairs(q_BHND.shape[2], k_BHND.shape[2], q_BHND.device)
        assert seen is not None
        seeing = seen.any(-1, keepdim=True)
        weights_BHNM = score_BHM.unsqueeze(2).masked_fill(~seen & seeing, -torch.inf).softmax(-1) * seeing
        return weights_BHNM @ v_BHNE

    def count(self, sizes: Sizes) -> Cost:
        """Visible pairs; neither the scores nor the scan multiply matrices."""
        return Cost(0, 0, Mask(causal=True).area(sizes.queries, sizes.keys, sizes.batch, self.site.heads))

    def initial_state(self, batch: int, like: Tensor) -> RunningSoftmax:
        """No token yet."""
        return RunningSoftmax.empty(batch, self.site.heads, self.site.head_dim, like)

    def advance(
        self, q: Tensor, k: Tensor, v: Tensor, state: RunningSoftmax, keep: Tensor | None, tokens: Tensor | None
    ) -> tuple[Tensor, RunningSoftmax]:
        """Merge the segment behind the state."""
        return self._attend(q, k, v, keep, state)
