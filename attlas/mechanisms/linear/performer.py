"""Performer: softmax attention estimated without bias by positive orthogonal random features (FAVOR+).

    o_n = Σ_m φ(q_n)·φ(k_m) v_m / Σ_m φ(q_n)·φ(k_m),    φ(x)_r = exp(w_r · x' − |x'|²/2) + ε,    x' = x D^(−1/4)

E_w exp(w·x − |x|²/2) exp(w·y − |y|²/2) = exp(x·y) for w ~ N(0, I), so that the weights are those of softmax attention
but for noise that falls with the number R of features. The rows w_r are orthogonal in blocks of D, which lessens it.

So that no power overflows and ε means something, the largest exponent is subtracted first: from a query's its own
over its features, from all keys' one for the head, over features and keys. Without ε both would cancel. In a causal
layer that one would tell a query of keys that are still to come; here the maximum of a head runs along the
sequence, and the keys up to n are weighed with that of the keys up to n, the sums so far being rescaled whenever it
grows. So a causal output is exactly what the noncausal form gives on the tokens up to its own, and no later key or
value moves it by a bit, however large, as long as values and |k|² are finite in float32. The official code takes one
maximum over the whole sequence, and both maxima of w·x' alone, so that long queries drown in ε.

q (B, H, N, D), k (B, H, M, D), v (B, H, M, E), w (R, D), drawn at construction and kept with the weights; `redraw`
draws anew. A query that sees nothing gives 0.

Time O((N + M) R E), memory O(N R); the state is R (E + 1) + E + 2 numbers per head, in float32 at least.

Source: Choromanski et al., "Rethinking Attention with Performers", 2020 (arXiv:2009.14794), official code
google-research/google-research, performer/fast_attention.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from attlas.core.errors import BadInput
from attlas.core.mask import Mask
from attlas.core.mechanism import Attend, Call, Cost, Site, Sizes
from attlas.core.registry import register
from attlas.core.spec import ALL_PATTERNS, Example, Spec
from attlas.ops.favor import PowerSums, running_powers
from attlas.ops.linear import feature_product, product_flops, with_ones
from attlas.ops.precision import wide
from attlas.ops.random_features import exponents, orthogonal_gaussian
from attlas.ops.scan import NEVER
from attlas.ops.softmax import blank_padding

SPEC = Spec(
    name="performer",
    title="Rethinking Attention with Performers",
    year=2020,
    paper="arXiv:2009.14794",
    equation="o = φ(q) (φ(k)ᵀ v) / φ(q) (φ(k)ᵀ 1),  φ(x) = exp(W x − |x|²/2),  W orthogonal Gaussian",
    complexity="O(N R D) time, O(R D) state, R random features",
    patterns=ALL_PATTERNS,
    streams=True,
    examples=(
        Example(params={"features": 12}, parameters=4 * (16 * 16 + 16)),
        Example(heads=4, grid=(2, 4), prefix=1, params={"features": 5}, parameters=4 * (16 * 16 + 16)),
    ),
)


class PerformerState(NamedTuple):
    """Sums over the keys so far.

    Attributes:
        powers: of the powers times the values, and their largest exponent.
        values: of the values alone, which ε weighs, (B, H, 1, E + 1); last their number.
    """

    powers: PowerSums
    values: Tensor


@register(SPEC)
class Performer(Attend):
    """Softmax attention by positive orthogonal random features.

    Args:
        site: where it is installed.
        backend: of `feature_product`, or of `running_powers` in a causal layer.
        features: R.
        eps: ε, what every feature has at least, relative to the largest.
    """

    projection: Tensor

    def __init__(self, site: Site, backend: str = "auto", *, features: int = 256, eps: float = 1e-6) -> None:
        super().__init__(site, backend)
        if features < 1:
            raise BadInput(f"features counts random features, at least 1, got {features}")
        if not 0 < eps < 1:
            raise BadInput(f"eps is a small share of the largest feature, above 0 and below 1, got {eps}")
        self.features, self.eps = features, eps
        self.register_buffer("projection", orthogonal_gaussian(features, site.head_dim))

    @torch.no_grad()
    def redraw(self, generator: torch.Generator | None = None) -> None:
        """Draw new features, as officially between steps of training; a state of the old ones is then void."""
        self.projection.copy_(orthogonal_gaussian(self.features, self.site.head_dim, generator))

    def compute(self, q_BHND: Tensor, k_BHMD: Tensor, v_BHME: Tensor, call: Call) -> Tensor:
        """Multiply keys with values first."""
        q, keep = self._queries(q_BHND), call.mask.keys
        if call.mask.causal:
            return self._causal(q, k_BHMD, v_BHME, keep, None)[0].to(q_BHND.dtype)
        k, v = blank_padding(keep, k_BHMD, v_BHME)
        exponents_BHMR = _real(self._exponents(k), keep, NEVER)
        k = _real((exponents_BHMR - exponents_BHMR.amax((2, 3), keepdim=True)).exp() + self.eps, keep, 0)
        return _ratio(feature_product(q, k, with_ones(v, keep), backend=self.backend)[0]).to(q_BHND.dtype)

    def _exponents(self, x: Tensor) -> Tensor:
        return exponents(wide(x) * self.site.head_dim**-0.25, self.projection)

    def _queries(self, q: Tensor) -> Tensor:
        exponents_BHNR = self._exponents(q)
        return (exponents_BHNR - exponents_BHNR.amax(-1, keepdim=True)).exp() + self.eps

    def _causal(
        self, q_BHNR: Tensor, k: Tensor, v: Tensor, keep: Tensor | None, state: PerformerState | None
    ) -> tuple[Tensor, PerformerState]:
        """Each key relative to its own largest feature, all to the largest so far, and ε times the values."""
        k, v = blank_padding(keep, k, v)
        exponents_BHMR, v = self._exponents(k), with_ones(v, keep)
        largest_BHM = _real(exponents_BHMR.amax(-1, keepdim=True), keep, NEVER)
        k = _real((exponents_BHMR - exponents_BHMR.amax(-1, keepdim=True)).exp(), keep, 0)
        powers = None if state is None else state.powers
        o, powers = running_powers(q_BHNR, k, v, largest_BHM.squeeze(-1), powers, backend=self.backend)
        values = v.cumsum(2) if state is None else v.cumsum(2) + state.values
        seen = F.pad(values, (0, 0, q_BHNR.shape[2] - k.shape[2], 0))  # a negative pad cuts off the first
        o = o + self.eps * q_BHNR.sum(-1, keepdim=True) * seen
        return _ratio(o), PerformerState(powers, values[:, :, -1:])

    def oracle(self, q_BHND: Tensor, k_BHMD: Tensor, v_BHME: Tensor, call: Call) -> Tensor:
        """Query by query, with the features of the keys that it sees."""
        (batch, heads, queries, size), keys = q_BHND.shape, k_BHMD.shape[2]
        seen = call.mask.pairs(queries, keys, q_BHND.device)
        seen = torch.ones_like(q_BHND[:1, :1, :1, :1], dtype=torch.bool) if seen is None else seen
        seen = seen.expand(batch, heads, queries, keys)
        w = self.projection.to(q_BHND)
        o = v_BHME.new_zeros(batch, heads, queries, v_BHME.shape[3])
        for b, h, n in seen.any(-1).nonzero().tolist():
            q, k = q_BHND[b, h, n] / size**0.25, k_BHMD[b, h, seen[b, h, n]] / size**0.25
            power_q = w @ q - q @ q / 2
            power_k = torch.einsum("rd,md->mr", w, k) - torch.einsum("md,md->m", k, k)[:, None] / 2
            phi_q, phi_k = ((power - power.max()).exp() + self.eps for power in (power_q, power_k))
            weights = phi_k @ phi_q
            o[b, h, n] = weights @ v_BHME[b, h, seen[b, h, n]] / weights.sum()
        return o

    def count(self, sizes: Sizes) -> Cost:
        """The exponents, the sums and their products with the queries, with one more column for the denominator."""
        size, causal = self.site.head_dim, self.site.causal and not sizes.cross
        copies = sizes.batch * self.site.heads
        features = copies * 2 * (sizes.queries + sizes.keys) * size * self.features
        needed, made = product_flops(sizes.queries, sizes.keys, self.features, size + 1, causal)
        pairs = Mask(causal=causal).area(sizes.queries, sizes.keys, sizes.batch, self.site.heads)
        return Cost(features + copies * needed, features + copies * made, pairs)

    def initial_state(self, batch: int, like: Tensor) -> PerformerState:
        """No key yet."""
        heads, value = self.site.heads, self.site.head_dim + 1
        powers = PowerSums.empty(batch, heads, self.features, value, like)
        return PerformerState(powers, torch.zeros_like(powers.sums[:, :, :1]))

    def advance(
        self, q: Tensor, k: Tensor, v: Tensor, state: PerformerState, keep: Tensor | None, tokens: Tensor | None
    ) -> tuple[Tensor, PerformerState]:
        """The causal form, from the sums and the largest exponent before the segment."""
        o, state = self._causal(self._queries(q), k, v, keep, state)
        return o.to(q.dtype), state


def _real(x_BHMR: Tensor, keep_BM: Tensor | None, otherwise: float) -> Tensor:
    return x_BHMR if keep_BM is None else x_BHMR.where(keep_BM[:, None, :, None], otherwise)


def _ratio(o_BHNE1: Tensor) -> Tensor:
    total = o_BHNE1[..., -1:]
    return o_BHNE1[..., :-1] / total.where(total > 0, 1)  # nothing seen: 0 / 1
