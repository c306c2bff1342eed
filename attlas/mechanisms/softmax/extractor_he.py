"""The higher-performance extractor: one projection, and a weight for each lag and channel.

    y_n = W_o (e_n ⊙ (W_a x_n + b_a)) + b_o,    e_n = Σ_{i≤n} w_i ⊙ W_e x_{n−i} + b

The matrices of the super high-performance extractor, W_i = diag(w_i) W_e: all lags share a projection and have a
vector each. A context of L tokens costs L C parameters, and the layer cannot go beyond it.

x (B, N, C); time O(N C²) and O(N² C) by sums or O(C N log N) by transforms; the state are the projections of
the last L - 1 tokens. Padding is 0 in the sum.

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
    name="extractor_he",
    title="Attention Is Not All You Need Anymore",
    year=2023,
    paper="arXiv:2308.07661",
    equation="y_n = W_o ((Σ_i w_i ⊙ W_e x_{n−i} + b) ⊙ (W_a x_n + b_a)) + b_o",
    complexity="O(N C² + N log N C) time, O(L C) state",
    patterns=frozenset({Pattern.CAUSAL_SELF}),
    grids=(1,),
    streams=True,
    examples=(
        Example(parameters=7 * 16 + 16 * 16 + 16 + 2 * (16 * 16 + 16)),
        Example(grid=(9,), params={"bias": False}, parameters=9 * 16 + 3 * 16 * 16),
    ),
    reconstruction=True,
)


@register(SPEC)
class ExtractorHE(LaggedMixer):
    """The higher-performance extractor.

    Args:
        site: where it is installed; its length is L, the longest context.
        backend: of `lagged_sum`.
        bias: of the sum, of the adjustment and of the output.

    Attributes:
        weight: of the lags, (L, C).
    """

    def __init__(self, site: Site, backend: str = "auto", *, bias: bool = True) -> None:
        super().__init__(site, backend, bias=bias)
        self.weight = nn.Parameter(self.lags**-0.5 * torch.randn(self.lags, site.dim))
        self.extract_proj = nn.Linear(site.dim, site.dim, bias=False)
        self.adjust_proj = nn.Linear(site.dim, site.dim, bias)
        self.out_proj = nn.Linear(site.dim, site.dim, bias)

    def rows(self, x_BNC: Tensor) -> Tensor:
        """The projections of the tokens."""
        return self.extract_proj(x_BNC)

    def finish(self, sum_BNC: Tensor, x_BNC: Tensor) -> Tensor:
        """Adjusted by the token, and projected."""
        return self.out_proj(sum_BNC * self.adjust_proj(x_BNC))

    def term(self, x_C: Tensor, lag: int) -> Tensor:
        """A product with W_i written out."""
        return x_C @ (self.extract_proj.weight.T * self.weight[lag])
