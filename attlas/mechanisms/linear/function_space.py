"""Softmax attention between functions: sums over tokens become integrals over the domain.

    o(x_n) = Σ_m w_m exp(s_nm) v_m / Σ_m w_m exp(s_nm),    s_nm = q_n . k_m / sqrt(D) + bias_nm

w_m is the quadrature weight of the point that token m stands for, the part of the domain that it speaks for. Then the
output depends on the functions and not on where they are known: it converges as points become dense, in whatever
way they do, and points may lie twice as dense where half the weight is given to each. Where all weights are equal it
is softmax attention, which is an operator already on uniform grids of any fineness.

The weights are those of a rule on the grid of the keys, or given with the layer for points that lie anyhow. Keys of
another sequence lie on one axis unless weights are given.

q (B, H, N, D), k (B, H, M, D), v (B, H, M, E). Time O(N M D).

Source: Berner et al., "Principled Approaches for Extending Neural Architectures to Function Spaces for Operator
Learning", 2025 (arXiv:2506.10973), official code neuraloperator/NNs-to-NOs. Its transformers are softmax-free (see
`galerkin`); this attention is the formula of the paper. The default scale is that of softmax attention.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from attlas.core.mask import Mask
from attlas.core.mechanism import Attend, Call, Cost, Site, Sizes
from attlas.core.registry import register
from attlas.core.spec import EVERY_MASK, Example, Pattern, Spec
from attlas.ops.pairs import dense_mask, pair_cost, weighted_values
from attlas.ops.quadrature import Quadrature
from attlas.ops.softmax import softmax_attention

SPEC = Spec(
    name="function_space",
    title="Principled Approaches for Extending Neural Architectures to Function Spaces for Operator Learning",
    year=2025,
    paper="arXiv:2506.10973",
    equation="o = Σ w exp(q k / √D) v / Σ w exp(q k / √D)",
    complexity="O(N² D) time",
    patterns=frozenset({Pattern.NONCAUSAL_SELF, Pattern.NONCAUSAL_CROSS}),
    prefix=False,
    masks=EVERY_MASK,
    examples=(
        Example(params={"rule": "trapezoid"}, parameters=4 * (16 * 16 + 16)),
        Example(heads=4, grid=(2, 4), parameters=4 * (16 * 16 + 16)),
        Example(
            grid=(6,),
            params={"weights": (0.1, 0.2, 0.4, 0.1, 0.1, 0.3)},
            parameters=4 * (16 * 16 + 16),
            patterns=frozenset({Pattern.NONCAUSAL_SELF}),
        ),
    ),
)


@register(SPEC)
class FunctionSpace(Attend):
    """Softmax attention with quadrature weights.

    Args:
        site: where it is installed.
        backend: of `softmax_attention`.
        rule: how the grid of the keys lies on the domain: "midpoint", in the middle of equal cells, or "trapezoid",
            from border to border: of the real points, so that padding is refused there on more than one axis.
        weights: one for each key, positive, instead of a rule; only their ratios matter.
        scale: of the scores; D ** -0.5 by default.
    """

    def __init__(
        self,
        site: Site,
        backend: str = "auto",
        *,
        rule: str = "midpoint",
        weights: Tensor | Sequence[float] | None = None,
        scale: float | None = None,
    ) -> None:
        super().__init__(site, backend)
        self.quadrature = Quadrature(rule, weights)
        self.scale = scale

    def _weights(self, k_BHMD: Tensor, call: Call) -> Tensor:
        """(B or 1, M), 0 for padding."""
        return self.quadrature(None if call.cross else call.grid, k_BHMD.shape[2], k_BHMD, call.mask.keys)

    def compute(self, q_BHND: Tensor, k_BHMD: Tensor, v_BHME: Tensor, call: Call) -> Tensor:
        """The logarithms of the weights as a bias."""
        mask = call.mask
        if not self.quadrature.uniform:
            w_BM = self._weights(k_BHMD, call)
            # Around 0 a bias in half precision rounds least; a common factor of the weights cancels.
            w_BM = w_BM / w_BM.mean(1, keepdim=True)
            mask = mask & Mask.biased(w_BM.where(w_BM > 0, 1).log()[:, None, None])
        return softmax_attention(q_BHND, k_BHMD, v_BHME, mask, scale=self.scale, backend=self.backend)

    def oracle(self, q_BHND: Tensor, k_BHMD: Tensor, v_BHME: Tensor, call: Call) -> Tensor:
        """Both integrals as sums over pairs."""
        scale = q_BHND.shape[-1] ** -0.5 if self.scale is None else self.scale
        scores = torch.einsum("bhnd,bhmd->bhnm", q_BHND, k_BHMD) * scale
        batch, heads, queries, keys = scores.shape
        seen, bias = dense_mask(call.mask, (batch, heads, queries, keys), q_BHND)
        scores = torch.where(seen, scores + bias, -torch.inf)
        top = scores.amax(-1, keepdim=True)
        power = torch.where(seen, (scores - top.where(top > -torch.inf, 0)).exp(), 0)
        power = power * self._weights(k_BHMD, call)[:, None, None]
        total = power.sum(-1, keepdim=True)
        return weighted_values(power, v_BHME, call.mask) / total.where(total > 0, 1)

    def count(self, sizes: Sizes) -> Cost:
        """Two products per visible pair."""
        return pair_cost(self.site, sizes)
