"""The minimalist extractor: a weight for each lag and channel, and nothing else.

    y_n = Σ_{i≤n} w_i ⊙ x_{n−i} + b

The worthwhile extractor without gate and output projection: a long causal convolution, channel by channel. A
context of L tokens costs L C parameters, and the layer cannot go beyond it.

x (B, N, C); time O(N² C) by sums or O(C N log N) by transforms; the state are the last L - 1 tokens. Padding
is 0 in the sum.

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
    name="extractor_me",
    title="Attention Is Not All You Need Anymore",
    year=2023,
    paper="arXiv:2308.07661",
    equation="y_n = Σ_i w_i ⊙ x_{n−i} + b",
    complexity="O(N log N C) time, O(L C) state",
    patterns=frozenset({Pattern.CAUSAL_SELF}),
    grids=(1,),
    streams=True,
    examples=(
        Example(parameters=7 * 16 + 16),
        Example(grid=(9,), params={"bias": False}, parameters=9 * 16),
    ),
    reconstruction=True,
)


@register(SPEC)
class ExtractorME(LaggedMixer):
    """The minimalist extractor.

    Args:
        site: where it is installed; its length is L, the longest context.
        backend: of `lagged_sum`.
        bias: of the sum.

    Attributes:
        weight: of the lags, (L, C).
    """

    def __init__(self, site: Site, backend: str = "auto", *, bias: bool = True) -> None:
        super().__init__(site, backend, bias=bias)
        self.weight = nn.Parameter(self.lags**-0.5 * torch.randn(self.lags, site.dim))

    def finish(self, sum_BNC: Tensor, x_BNC: Tensor) -> Tensor:
        """The sum itself."""
        return sum_BNC

    def term(self, x_C: Tensor, lag: int) -> Tensor:
        """Channel by channel."""
        return x_C * self.weight[lag]
