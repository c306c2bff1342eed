"""Rank-augmented linear attention: a global query reweighs the keys, a gate multiplies the output.

    α = N softmax_m(q̄ · φ(k_m) / √D),  q̄ = (1/N) Σ_n φ(q_n),  φ = elu + 1         the key/value buffer's rank
    o_n = Rφ(q_n) · (1/N) Σ_m α_m Rφ(k_m) v_mᵀ / (φ(q_n) · (1/N) Σ_m α_m φ(k_m) + ε) + LePE(v)_n
    y_n = W_o (o_n ⊙ W_g x_n)                                                      the output's rank

The sum over the keys is a D x D matrix into which all tokens go alike; α, 1 in the mean, lets few tokens make it.
The output of a head has rank D at most, its product with W_g x, a gate without activation, has not. R turns
neighbouring features by their places on the grid, in the numerator only; α is in both. LePE is a depthwise 5 x 5
convolution of the values. The N of α and that of the means cancel, and the code has neither.

q (B, H, N, D), k (B, H, M, D), v (B, H, M, E); D is a multiple of twice the axes of the grid. Prefix tokens stand at
place 0 and have no LePE. Means and softmax are over real tokens only. In cross-attention, ours, keys lie on no grid
that we know: nothing is turned and there is no LePE. No causal form: the global query knows every query.

Time O((N + M) D E), memory O(N D).

Source: Fan et al., "Breaking the Low-Rank Dilemma of Linear Attention", 2024 (arXiv:2411.07635), official code
qhfan/RALA, which has it in the two stages of high resolution and softmax after them. One and three axes are ours.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from attlas.core.errors import BadInput
from attlas.core.mechanism import Attend, Call, Cost, Site, Sizes
from attlas.core.registry import register
from attlas.core.spec import Example, Pattern, Spec
from attlas.ops.elu import elu_plus_one
from attlas.ops.grid_conv import convolution_flops, convolve_values, value_convolution
from attlas.ops.linear import feature_product, product_flops
from attlas.ops.precision import wide
from attlas.ops.rotary import relative_turn, rotate_axes
from attlas.ops.softmax import blank_padding

EPS = 1e-6
SELF = frozenset({Pattern.NONCAUSAL_SELF})
PROJECTIONS = 5 * (16 * 16 + 16)

SPEC = Spec(
    name="rala",
    title="Breaking the Low-Rank Dilemma of Linear Attention",
    year=2024,
    paper="arXiv:2411.07635",
    equation="o = (Rφ(q) Σ α Rφ(k) vᵀ / φ(q) Σ α φ(k) + LePE(v)) ⊙ W x,  α = N softmax(q̄ φ(k)ᵀ / √D)",
    complexity="O(N D²) time",
    patterns=SELF | {Pattern.NONCAUSAL_CROSS},
    shell={"gate": "linear"},
    examples=(
        Example(grid=(3, 4), parameters=PROJECTIONS + 16 * (25 + 1), patterns=SELF),
        Example(grid=(2, 3), prefix=1, params={"kernel": 3}, parameters=PROJECTIONS + 16 * (9 + 1), patterns=SELF),
        Example(params={"kernel": 0}, parameters=PROJECTIONS),
    ),
)


@register(SPEC)
class RALA(Attend):
    """Rank-augmented linear attention.

    Args:
        site: where it is installed; the convolution needs the axes of its grid.
        backend: of `feature_product` and `grid_convolution`.
        kernel: taps of the depthwise convolution of the values (LePE) on each axis, odd; 0 for none.
    """

    def __init__(self, site: Site, backend: str = "auto", *, kernel: int = 5) -> None:
        super().__init__(site, backend)
        self.kernel = kernel
        self.lepe = value_convolution(site, kernel, self.spec.name)

    def compute(self, q_BHND: Tensor, k_BHMD: Tensor, v_BHME: Tensor, call: Call) -> Tensor:
        """Weigh the keys, then multiply them with the values first."""
        places_NR = self._places(q_BHND, k_BHMD, call)
        q = elu_plus_one(q_BHND)
        k, v = blank_padding(call.mask.keys, elu_plus_one(k_BHMD), wide(v_BHME))
        k = k * self._shares(q, k, call).unsqueeze(-1)
        total = (q * k.sum(2, keepdim=True)).sum(-1, keepdim=True) + EPS
        if places_NR is not None:
            q, k = rotate_axes(q, places_NR), rotate_axes(k, places_NR)
        o = (feature_product(q, k, v, backend=self.backend)[0] / total).to(q_BHND.dtype)
        if self.lepe is None or call.cross:
            return o
        return o + convolve_values(self.lepe, v_BHME, call.grid, call.mask.keys, self.backend)

    def _places(self, q: Tensor, k: Tensor, call: Call) -> Tensor | None:
        """Where the tokens stand, (N, R); prefix tokens stand at 0."""
        if call.cross:
            return None
        if q.shape[2] != k.shape[2]:
            raise BadInput(
                f"rala lays queries and keys on one grid, got {q.shape[2]} queries and {k.shape[2]} keys; keys of "
                "another sequence need cross=True"
            )
        return F.pad(call.grid.places(q.device), (0, 0, call.grid.prefix, 0))

    def _shares(self, q: Tensor, k: Tensor, call: Call) -> Tensor:
        """α / N, (B, H, M): they sum to 1 over the real keys."""
        if call.mask.queries is None:
            mean = q.mean(2, keepdim=True)
        else:
            (real,) = blank_padding(call.mask.queries, q)
            mean = real.sum(2, keepdim=True) / call.mask.queries.sum(1)[:, None, None, None].clamp(min=1)
        scores = (mean * k).sum(-1) / math.sqrt(q.shape[-1])
        if call.mask.keys is not None:
            keep = call.mask.keys.unsqueeze(1)
            # Where no key is real all share, and none counts: their features are 0.
            scores = scores.masked_fill(~(keep | ~keep.any(-1, keepdim=True)), -torch.inf)
        return scores.softmax(-1)

    def oracle(self, q_BHND: Tensor, k_BHMD: Tensor, v_BHME: Tensor, call: Call) -> Tensor:
        """Every pair's weight, turned by the difference of the places, with α and the means as published."""
        places_NR = self._places(q_BHND, k_BHMD, call)
        q, k = F.elu(q_BHND) + 1, F.elu(k_BHMD) + 1
        real_BN, real_BM = (
            torch.ones_like(x[:, 0, :, 0], dtype=torch.bool) if keep is None else keep
            for x, keep in ((q, call.mask.queries), (k, call.mask.keys))
        )
        alpha_BHM = torch.zeros_like(k[..., 0])
        for b in range(q.shape[0]):
            if real_BM[b].any() and real_BN[b].any():
                scores_HM = torch.einsum("hd,hmd->hm", q[b][:, real_BN[b]].mean(1), k[b][:, real_BM[b]])
                alpha_BHM[b, :, real_BM[b]] = real_BM[b].sum() * (scores_HM * q.shape[-1] ** -0.5).softmax(-1)
        weights_BHNM = alpha_BHM.unsqueeze(2) * torch.einsum("bhnd,bhmd->bhnm", q, k)
        turned_BHNM = weights_BHNM
        if places_NR is not None:
            cos, sin = relative_turn(places_NR, places_NR, q.shape[-1])
            (a, b_), (c, d) = ((x[..., 0::2], x[..., 1::2]) for x in (q.unsqueeze(3), k.unsqueeze(2)))
            turned_BHNM = ((a * c + b_ * d) * cos.to(q) - (b_ * c - a * d) * sin.to(q)).sum(-1)
            turned_BHNM = alpha_BHM.unsqueeze(2) * turned_BHNM
        count = real_BM.sum(1)[:, None, None, None].clamp(min=1)
        (v,) = blank_padding(call.mask.keys, v_BHME)
        o = turned_BHNM @ v / count / (weights_BHNM.sum(-1, keepdim=True) / count + EPS)
        if self.lepe is None or call.cross:
            return o
        return o + convolve_values(self.lepe, v_BHME, call.grid, call.mask.keys, "oracle")

    def count(self, sizes: Sizes) -> Cost:
        """The sum, its product with the queries, the taps that fall on the grid; torch multiplies the rest too."""
        heads, size = self.site.heads, self.site.head_dim
        needed, made = product_flops(sizes.queries, sizes.keys, size, size, causal=False)
        if self.lepe is not None and not sizes.cross:
            on_grid, multiplied = convolution_flops(sizes.grid, self.kernel)
            needed, made = needed + size * on_grid, made + size * multiplied
        copies = sizes.batch * heads
        return Cost(copies * needed, copies * made, copies * sizes.queries * sizes.keys)
