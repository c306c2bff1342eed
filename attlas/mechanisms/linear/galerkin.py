"""Galerkin attention: a kernel integral without softmax, whose features are a basis of functions.

    o(x_n) = q_n . Σ_m w_m k̂_m v̂_m^T,    x̂ = (x − ∫x) / sqrt(∫(x − ∫x)² + eps)

The columns of k and v are functions on the domain, known at the points x_m; each is brought to mean 0 and variance 1
over the domain, feature by feature and head by head. The inner matrix holds the inner products of keys with values,
D x E numbers however many points there are, and o is a combination of those with q as coefficients. w_m are
quadrature weights: those of a rule on the grid of the keys have the sum 1 over the real ones, given weights are taken
as they are. Means and variances are integrals of the same weights, divided by their sum. Keys of another sequence lie
on one axis unless weights are given. There is no 1 / sqrt(D); a query that sees nothing gives 0.

The released codes mean to normalise so, and hand their instance norm an array whose last axis is that of features: it
normalises every point over the features of its head. over="features" does that, over="points" the formula.

q (B, H, N, D), k (B, H, M, D), v (B, H, M, E). Time O((N + M) D E), memory O(N D).

Source: Li, Meidani and Farimani, "Transformer for Partial Differential Equations' Operator Learning", 2022
(arXiv:2205.13671), after Cao, "Choose a Transformer: Fourier or Galerkin", 2021 (arXiv:2105.14995); with quadrature
weights in Berner et al., 2025 (arXiv:2506.10973), official code neuraloperator/NNs-to-NOs and its layers in
neuraloperator/neuraloperator. Those multiply given weights with the outputs instead of the keys; on equal weights,
which all published runs have, nothing differs.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from attlas.core.errors import BadInput
from attlas.core.mechanism import Attend, Call, Cost, Site, Sizes
from attlas.core.registry import register
from attlas.core.spec import Example, Pattern, Spec
from attlas.ops.linear import feature_product, product_flops
from attlas.ops.precision import wide
from attlas.ops.quadrature import Quadrature, normalised

SPEC = Spec(
    name="galerkin",
    title="Transformer for Partial Differential Equations' Operator Learning",
    year=2022,
    paper="arXiv:2205.13671",
    equation="o = q Σ w k̂ v̂ᵀ,  k̂ and v̂ of mean 0 and variance 1 over the domain",
    complexity="O(N D²) time",
    patterns=frozenset({Pattern.NONCAUSAL_SELF, Pattern.NONCAUSAL_CROSS}),
    prefix=False,
    shell={"bias": False},
    examples=(
        Example(params={"rule": "trapezoid"}, parameters=4 * 16 * 16 + 16),
        Example(heads=4, grid=(2, 4), parameters=4 * 16 * 16 + 16),
        Example(
            grid=(6,),
            params={"weights": (0.1, 0.2, 0.4, 0.1, 0.1, 0.3)},
            parameters=4 * 16 * 16 + 16,
            patterns=frozenset({Pattern.NONCAUSAL_SELF}),
        ),
    ),
)


@register(SPEC)
class Galerkin(Attend):
    """Softmax-free attention with quadrature weights.

    Args:
        site: where it is installed.
        backend: of `feature_product`.
        rule: how the grid of the keys lies on the domain: "midpoint", in the middle of equal cells, or "trapezoid",
            from border to border: of the real points, so that padding is refused there on more than one axis.
        weights: one for each key, positive, instead of a rule.
        over: "points" normalises each feature over the domain, "features" each point over the features of its head.
        eps: added to the variances.
    """

    def __init__(
        self,
        site: Site,
        backend: str = "auto",
        *,
        rule: str = "midpoint",
        weights: Tensor | Sequence[float] | None = None,
        over: str = "points",
        eps: float = 1e-5,
    ) -> None:
        super().__init__(site, backend)
        if eps <= 0:
            raise BadInput(f"eps keeps the variance of a constant function from 0, so it is positive; got {eps}")
        if over not in ("points", "features"):
            raise BadInput(f"over is 'points' or 'features', got {over!r}")
        self.over = over
        self.quadrature = Quadrature(rule, weights)
        self.eps = eps

    def _weights(self, k_BHMD: Tensor, call: Call) -> Tensor:
        """(B, M), 0 for padding."""
        w_BM = self.quadrature(None if call.cross else call.grid, k_BHMD.shape[2], k_BHMD, call.mask.keys)
        return w_BM.expand(len(k_BHMD), -1)

    def compute(self, q_BHND: Tensor, k_BHMD: Tensor, v_BHME: Tensor, call: Call) -> Tensor:
        """Multiply keys with values first."""
        w_BM = self._weights(k_BHMD, call)
        k, v = (self._normalised(wide(x), w_BM) for x in (k_BHMD, v_BHME))
        o, _ = feature_product(wide(q_BHND), k * w_BM[:, None, :, None], v, backend=self.backend)
        return o.to(q_BHND.dtype)

    def _normalised(self, x_BHMD: Tensor, w_BM: Tensor) -> Tensor:
        if self.over == "points":
            return normalised(x_BHMD, w_BM, self.eps)
        x_BHMD = x_BHMD.where((w_BM > 0)[:, None, :, None], 0)
        centred = x_BHMD - x_BHMD.mean(-1, keepdim=True)
        return centred * (centred.square().mean(-1, keepdim=True) + self.eps).rsqrt()

    def oracle(self, q_BHND: Tensor, k_BHMD: Tensor, v_BHME: Tensor, call: Call) -> Tensor:
        """The kernel between all pairs, sequence by sequence, on its real points alone."""
        rows = []
        for b, w_M in enumerate(self._weights(k_BHMD, call)):
            real = w_M.nonzero()[:, 0]
            w, share = w_M[real], w_M[real] / w_M.sum()
            functions = []
            for x in (k_BHMD[b, :, real], v_BHME[b, :, real]):
                if self.over == "points":
                    mean = torch.einsum("m,hmd->hd", share, x).unsqueeze(1)
                    variance = torch.einsum("m,hmd->hd", share, (x - mean) ** 2).unsqueeze(1)
                else:
                    mean = x.mean(-1, keepdim=True)
                    variance = ((x - mean) ** 2).mean(-1, keepdim=True)
                functions.append((x - mean) / (variance + self.eps).sqrt())
            kernel_HNM = torch.einsum("hnd,hmd->hnm", q_BHND[b], functions[0])
            rows.append(torch.einsum("hnm,m,hme->hne", kernel_HNM, w, functions[1]))
        return torch.stack(rows)

    def count(self, sizes: Sizes) -> Cost:
        """The inner products and their combinations."""
        size, copies = self.site.head_dim, sizes.batch * self.site.heads
        needed, made = product_flops(sizes.queries, sizes.keys, size, size, False)
        return Cost(copies * needed, copies * made, copies * sizes.queries * sizes.keys)
