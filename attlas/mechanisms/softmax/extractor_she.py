"""The super high-performance extractor: a matrix for each lag, gated by the token that asks.

    y_n = W_o (e_n ⊙ (W_a x_n + b_a)) + b_o,    e_n = Σ_{i≤n} W_i x_{n−i} + b

What was is weighed by how long ago it was, not by what it is: the sum over the past has a matrix of its own for
each lag, and so needs no positions. What the asking token wants of it is decided by a product channel by channel
with a projection of that token. There are no scores and no softmax, and the parameters grow with the context:
L C² for a context of L tokens, beyond which the layer cannot go.

x (B, N, C); time O(N² C²), memory O(N C); the state are the last L - 1 tokens. Padding is 0 in the sum.

Source: Chen, "Attention Is Not All You Need Anymore", 2023 (arXiv:2308.07661). A reconstruction: of the paper we
know the abstract, which names this extractor; formula, biases and initialisation are ours.
"""

import torch
from torch import Tensor, nn

from attlas.core.mechanism import Site
from attlas.core.registry import register
from attlas.core.spec import Example, Pattern, Spec
from attlas.ops.lags import LaggedMixer

SPEC = Spec(
    name="extractor_she",
    title="Attention Is Not All You Need Anymore",
    year=2023,
    paper="arXiv:2308.07661",
    equation="y_n = W_o ((Σ_i W_i x_{n−i} + b) ⊙ (W_a x_n + b_a)) + b_o",
    complexity="O(N² C²) time, O(L C) state",
    patterns=frozenset({Pattern.CAUSAL_SELF}),
    grids=(1,),
    streams=True,
    examples=(
        Example(parameters=7 * 16 * 16 + 16 + 2 * (16 * 16 + 16)),
        Example(grid=(9,), params={"bias": False}, parameters=9 * 16 * 16 + 2 * 16 * 16),
    ),
    reconstruction=True,
)


@register(SPEC)
class ExtractorSHE(LaggedMixer):
    """The super high-performance extractor.

    Args:
        site: where it is installed; its length is L, the longest context.
        backend: of `lagged_sum`.
        bias: of the sum, of the adjustment and of the output.

    Attributes:
        weight: of the lags, (L, C in, C out).
    """

    def __init__(self, site: Site, backend: str = "auto", *, bias: bool = True) -> None:
        super().__init__(site, backend, bias=bias)
        self.weight = nn.Parameter((self.lags * site.dim) ** -0.5 * torch.randn(self.lags, site.dim, site.dim))
        self.adjust_proj = nn.Linear(site.dim, site.dim, bias)
        self.out_proj = nn.Linear(site.dim, site.dim, bias)

    def finish(self, sum_BNC: Tensor, x_BNC: Tensor) -> Tensor:
        """Adjusted by the token, and projected."""
        return self.out_proj(sum_BNC * self.adjust_proj(x_BNC))

    def term(self, x_C: Tensor, lag: int) -> Tensor:
        """A product with a matrix of its own."""
        return x_C @ self.weight[lag]
