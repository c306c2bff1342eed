"""Aaren: softmax attention as a recurrent network, its query learned instead of made from a token.

    s_t = q . k_t / sqrt(D),    o_t = sum_{j<=t} softmax_{j<=t}(s_j) v_j,    q = W_q (learned vector)

The score of a token does not depend on who asks, so that every output is a running average with the same
weights, and the average up to t is kept in three numbers: the largest score m, the sum u of exp(s_j - m)
and the sum w of exp(s_j - m) v_j. Such triples merge associatively,

    (m1, u1, w1) + (m2, u2, w2) = (m, u1 e^(m1 - m) + u2 e^(m2 - m), w1 e^(m1 - m) + w2 e^(m2 - m)),
    m = max(m1, m2),

and a prefix scan gives all outputs in 2 log2 N steps. A layer has one query vector, of size dim, split into
heads behind its projection; keys, values and output have projections as in softmax attention. What depends
on the content of the asking token, such as looking up what followed an earlier one, it cannot do.

x (B, N, C); time O(N C) beside the projections, memory O(N C); the state is (m, u, w), D + 2 numbers per head.

Source: Feng et al., "Attention as an RNN", 2024 (arXiv:2405.13956).
"""

import torch
from torch import Tensor, nn

from attlas.core.errors import BadInput
from attlas.core.mask import Mask
from attlas.core.mechanism import Call, Cost, Mixer, Site, Sizes
from attlas.core.registry import register
from attlas.core.spec import Example, Pattern, Spec
from attlas.ops.scan import RunningSoftmax, running_softmax

SPEC = Spec(
    name="aaren",
    title="Attention as an RNN",
    year=2024,
    paper="arXiv:2405.13956",
    equation="o_t = softmax(q · k_{≤t} / √D) v_{≤t},  q learned",
    complexity="O(N D) time, O(D) state",
    patterns=frozenset({Pattern.CAUSAL_SELF}),
    grids=(1,),
    streams=True,
    examples=(
        Example(parameters=4 * (16 * 16 + 16) + 16),
        Example(heads=4, grid=(8,), params={"bias": False}, parameters=4 * 16 * 16 + 16),
    ),
    reconstruction=True,
)


@register(SPEC)
class Aaren(Mixer):
    """Running softmax average under a learned query.

    Args:
        site: where it is installed; heads divide dim.
        backend: of `running_softmax`.
        bias: of the four projections.
    """

    def __init__(self, site: Site, backend: str = "auto", *, bias: bool = True) -> None:
        super().__init__(site, backend)
        if site.dim % site.heads:
            raise BadInput(f"heads must divide dim: {site.dim} channels do not split into {site.heads} heads")
        self.query = nn.Parameter(torch.randn(1, site.dim))  # on the scale of a normalised token
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(site.dim, site.dim, bias) for _ in range(4))

    def compute(self, x_BNC: Tensor, context_BMC: Tensor | None, call: Call) -> Tensor:
        """Scores of the tokens, and their running softmax."""
        return self._mix(x_BNC, call.mask.keys, None)[0]

    oracle = compute  # the op's own oracle backend

    def _mix(self, x_BNC: Tensor, keep: Tensor | None, state: RunningSoftmax | None) -> tuple[Tensor, RunningSoftmax]:
        split = (self.site.heads, self.site.dim // self.site.heads)
        q_HD1 = self.q_proj(self.query).view(*split, 1) * split[1] ** -0.5
        k_BHND = self.k_proj(x_BNC).unflatten(-1, split).transpose(1, 2)
        v_BHND = self.v_proj(x_BNC).unflatten(-1, split).transpose(1, 2)
        scores_BHN = (k_BHND @ q_HD1).squeeze(-1)
        o, state = running_softmax(scores_BHN, v_BHND, keep, state, backend=self.backend)
        return self.out_proj(o.transpose(1, 2).flatten(2).to(v_BHND.dtype)), state

    def count(self, sizes: Sizes) -> Cost:
        """The projections, the query's once, and the scores; the scan multiplies no matrices."""
        dim, tokens = self.site.dim, sizes.batch * sizes.queries
        flops = 2 * dim * dim * (3 * tokens + 1) + 2 * tokens * dim
        return Cost(flops, flops, Mask(causal=True).area(sizes.queries, sizes.keys, sizes.batch, self.site.heads))

    def start(self, batch: int, like: Tensor) -> RunningSoftmax:
        """No token yet."""
        return RunningSoftmax.empty(batch, self.site.heads, self.site.dim // self.site.heads, like)

    def advance(self, x_BNC: Tensor, state: RunningSoftmax, keep: Tensor | None) -> tuple[Tensor, RunningSoftmax]:
        """Merge the segment behind the state."""
        return self._mix(x_BNC, keep, state)
