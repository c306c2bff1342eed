"""Kernel attention with relative positions: the exponential of a bias is a Toeplitz matrix, which a transform applies.

    o_i = Σ_j c_{j−i} φ(q_i)·φ(k_j) v_j / Σ_j c_{j−i} φ(q_i)·φ(k_j),    c_t = exp(b_t),
    φ(x)_r = exp(w_r · x̂ − |x̂|²/2) / √R,    x̂ = x / |x|, or 0 for 0,    w_r ~ N(0, I)

This estimates softmax attention of unit queries and keys with b_{j−i} added to the scores; the bias itself is exact.
Linear attention cannot take a bias into its features, but all sums Σ_j c_{j−i} φ(k_j)_r v_j are products with one
Toeplitz matrix, O(N log N) by Fourier transforms (`attlas.ops.toeplitz`), numerator and denominator together. Unit
norms are what makes it train: the features needed for an error grow as exp(|q|² + |k|²), and the contrast that
q̂ · k̂ lacks is given back by the positions.

b is learned from 0, per head: 2 L − 1 numbers, or (2 H − 1)(2 W − 1) on a grid. A causal layer has c_t = 0 for t > 0,
on a grid for all that follows row by row. The largest b in use is subtracted first, which cancels; where all that a
query sees lies some 100 below it, in float32 it sees nothing. Exponents of features are bounded by |w_r| as queries
and keys have norm 1, so no maximum over the keys is subtracted, none looks ahead. Prefix tokens have no position:
b = 0 to and from them (ours).

q (B, H, N, D), k (B, H, M, D), v (B, H, M, E), w (R, D), orthogonal in blocks of D and kept with the weights; `redraw`
draws anew. A query that sees nothing gives 0.

Transforms take over at some thousand tokens. They round relative to the largest sum of a head: seven digits where
all sums are about as large, in float32 none where b sets them apart by 16, and smaller totals than that count as the
rounding of 1. A causal layer transforms only what lies before a query, between halves of the sequence: what follows
it, as long as it is finite, changes no bit of its output, and the error is relative to the sums of its half. The
dense product, backend "torch", is exact for any b.

Time O(N log N R E), O(N log² N R E) in a causal layer, memory O(N (R + E)), some features being transformed at a time.
A stream on one axis keeps the features and values of all tokens, R + E + 1 numbers per token and head: there is no
smaller state for any b.

Source: Luo et al., "Stable, Fast and Accurate: Kernelized Attention with Relative Positional Encoding", 2021
(arXiv:2106.12566). A reconstruction: no official code was found, the number of features is ours.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attlas.core.errors import BadInput
from attlas.core.grid import Grid
from attlas.core.mask import Mask
from attlas.core.mechanism import Attend, Call, Cost, Site, Sizes
from attlas.core.registry import register
from attlas.core.spec import Example, Pattern, Spec
from attlas.core.state import KVCache
from attlas.ops.linear import with_ones
from attlas.ops.precision import wide
from attlas.ops.random_features import exponents, orthogonal_gaussian
from attlas.ops.softmax import blank_padding
from attlas.ops.toeplitz import toeplitz_attention, toeplitz_flops

SPEC = Spec(
    name="nprf_rpe",
    title="Stable, Fast and Accurate: Kernelized Attention with Relative Positional Encoding",
    year=2021,
    paper="arXiv:2106.12566",
    equation="o_i = φ(q_i) Σ_j exp(b_{j−i}) φ(k_j) v_jᵀ / φ(q_i) Σ_j exp(b_{j−i}) φ(k_j),  φ(x) = exp(W x/|x|)",
    complexity="O(N log N R D) time, log² N if causal, O(N (R + D)) state, R random features",
    patterns=frozenset({Pattern.NONCAUSAL_SELF, Pattern.CAUSAL_SELF}),
    grids=(1, 2),
    streams=True,
    examples=(
        Example(params={"features": 12}, parameters=4 * (16 * 16 + 16) + 2 * 13),
        Example(heads=4, grid=(2, 4), prefix=1, params={"features": 5}, parameters=4 * (16 * 16 + 16) + 4 * 3 * 7),
    ),
    reconstruction=True,
)


@register(SPEC)
class NPRF(Attend):
    """Attention by normalised positive random features with relative positions.

    Args:
        site: where it is installed; its grid, or its length, says how far biases reach.
        backend: of `toeplitz_attention`.
        features: R.
    """

    projection: Tensor

    def __init__(self, site: Site, backend: str = "auto", *, features: int = 64) -> None:
        super().__init__(site, backend)
        if features < 1:
            raise BadInput(f"features counts random features, at least 1, got {features}")
        if site.grid is None and site.length is None:
            raise BadInput(
                "nprf_rpe learns a bias for each offset: pass length=, the longest sequence, or grid=(height, width)"
            )
        self.axes = (site.length or 1,) if site.grid is None else site.grid.shape
        if len(self.axes) not in SPEC.grids:
            raise self._unsupported(f"a {site.grid}", grid=len(self.axes))
        self.features = features
        self.bias = nn.Parameter(torch.zeros(site.heads, *(2 * size - 1 for size in self.axes)))
        self.register_buffer("projection", orthogonal_gaussian(features, site.head_dim))

    @torch.no_grad()
    def redraw(self, generator: torch.Generator | None = None) -> None:
        """Draw new features; a state of the old ones is then void."""
        self.projection.copy_(orthogonal_gaussian(self.features, self.site.head_dim, generator))

    def compute(self, q_BHND: Tensor, k_BHMD: Tensor, v_BHME: Tensor, call: Call) -> Tensor:
        """Positions by one Toeplitz product; to and from prefix tokens by linear attention."""
        grid, keep = self._check_grid(call.grid, q_BHND.shape[2], k_BHMD.shape[2]), call.mask.keys
        q, (k, v) = self._map(q_BHND), self._keys(k_BHMD, v_BHME, keep)
        c_HT, prefix_H11 = self._factors(grid)
        (q_first, q_last), (k_first, k_last), (v_first, v_last) = (_split(x, grid.prefix) for x in (q, k, v))
        o, rounding = self._sums(q_last, k_last, v_last, c_HT)
        if grid.prefix:
            gathered = k_first.mT @ v_first
            if call.mask.causal:
                first = (q_first @ k_first.mT).tril() @ v_first
            else:
                first = q_first @ (gathered + k_last.mT @ v_last)
            o = torch.cat([first * prefix_H11, o + q_last @ gathered * prefix_H11], 2)
        return _ratio(o.to(v.dtype), rounding).to(q_BHND.dtype)

    def _sums(self, q: Tensor, k: Tensor, v: Tensor, c_HT: Tensor) -> tuple[Tensor, float]:
        """Numerators and denominators, and what these are above if transforms have not rounded them away."""
        causal = self.site.causal
        chosen, _ = toeplitz_attention.choose(self.backend, q, k, v, c_HT, causal=causal)
        o = toeplitz_attention(q, k, v, c_HT, causal=causal, backend=self.backend)
        return o, torch.finfo(v.dtype).eps if chosen.name == "fft" and not causal else 0.0

    def _check_grid(self, grid: Grid, queries: int, keys: int) -> Grid:
        """How the keys lie, if there is a bias for each of their offsets."""
        if queries != keys:
            if grid.rank > 1 or grid.prefix or queries > keys:
                raise BadInput(f"nprf_rpe needs as many queries as keys on a {grid}, got {queries} and {keys}")
            grid = Grid((keys,))
        if grid.rank != len(self.axes) or any(size > most for size, most in zip(grid.shape, self.axes, strict=True)):
            raise BadInput(
                f"nprf_rpe has biases for a {Grid(self.axes)}, the tokens lie on a {grid}; build it with "
                f"{f'length={grid.shape[0]}' if grid.rank == 1 else f'grid={grid.shape}'} or more"
            )
        return grid

    def _map(self, x: Tensor) -> Tensor:
        """φ, in float32 at least."""
        return exponents(F.normalize(wide(x), dim=-1), self.projection).exp() * self.features**-0.5

    def _keys(self, k: Tensor, v: Tensor, keep: Tensor | None) -> tuple[Tensor, Tensor]:
        """Features of the keys, and the values with a 1 behind each: its sums are the denominators."""
        k, v = blank_padding(keep, k, v)
        (k,) = blank_padding(keep, self._map(k))
        return k, with_ones(v, keep)

    def _factors(self, grid: Grid) -> tuple[Tensor, Tensor]:
        """c for the offsets on this grid, and for prefix tokens (H, 1, 1), relative to the largest."""
        b = wide(self.bias)
        for axis, (size, most) in enumerate(zip(grid.shape, self.axes, strict=True), 1):
            b = b.narrow(axis, most - size, 2 * size - 1)
        offsets = b[0].numel()
        b_HT = b.flatten(1)
        if self.site.causal:
            later = torch.arange(offsets, device=b.device) > offsets // 2  # the middle is the offset 0
            b_HT = b_HT.masked_fill(later, -torch.inf)
        largest_H1 = b_HT.detach().amax(1, keepdim=True)
        if grid.prefix:
            largest_H1 = largest_H1.clamp(min=0)
        return (b_HT - largest_H1).exp().view_as(b), (-largest_H1).exp().unsqueeze(-1)

    def oracle(self, q_BHND: Tensor, k_BHMD: Tensor, v_BHME: Tensor, call: Call) -> Tensor:
        """Query by query over its visible keys, each weight by itself."""
        (batch, heads, queries, _), keys = q_BHND.shape, k_BHMD.shape[2]
        grid = self._check_grid(call.grid, queries, keys)
        places = [None] * grid.prefix + grid.places().tolist()
        seen = call.mask.pairs(queries, keys, q_BHND.device)
        seen = torch.ones_like(q_BHND[:1, :1, :1, :1], dtype=torch.bool) if seen is None else seen
        seen = seen.expand(batch, heads, queries, keys)
        w = self.projection.to(q_BHND)
        o = v_BHME.new_zeros(batch, heads, queries, v_BHME.shape[3])
        for b, h, n in seen.any(-1).nonzero().tolist():
            q = q_BHND[b, h, n]
            q = F.normalize(q, dim=0)
            phi_q = (w @ q - q @ q / 2).exp()
            numerator, denominator = torch.zeros_like(o[b, h, n]), o.new_zeros(())
            for m in seen[b, h, n].nonzero().flatten().tolist():
                k, here, there = F.normalize(k_BHMD[b, h, m], dim=0), places[n + keys - queries], places[m]
                weight = phi_q @ (w @ k - k @ k / 2).exp() / self.features
                if here is not None and there is not None:
                    entry = [j - i + size - 1 for i, j, size in zip(here, there, self.axes, strict=True)]
                    weight = weight * self.bias[h][tuple(entry)].exp()
                numerator, denominator = numerator + weight * v_BHME[b, h, m], denominator + weight
            o[b, h, n] = numerator / denominator
        return o

    def count(self, sizes: Sizes) -> Cost:
        """Exponents of the features, and their sums over pairs or by transforms; the torch backend takes all pairs."""
        grid, size, features = sizes.grid, self.site.head_dim, self.features
        copies, value = sizes.batch * self.site.heads, self.site.head_dim + 1
        mask, last, first = Mask(causal=self.site.causal), grid.positions, grid.prefix
        mapped = 2 * 2 * sizes.queries * size * features
        placed = 2 * last * last * (features + value)
        needed = toeplitz_flops(grid.shape, features, value, mask.area(last, last), mask.causal)
        if first:
            gathered = 2 * (first + last) * features * value  # the prefix of keys, for the positions
            within = 2 * first * first * (features + value)
            everywhere = 2 * (first + last) * features * value
            prefixed = gathered + (within if self.site.causal else everywhere)
            placed, needed = placed + prefixed, needed + prefixed
        pairs = mask.area(sizes.queries, sizes.keys, copies)
        return Cost(copies * (mapped + needed), copies * (mapped + placed), pairs)

    def initial_state(self, batch: int, like: Tensor) -> KVCache:
        """No tokens yet: as keys their features, as values the values and 1."""
        if len(self.axes) > 1 or (self.site.grid is not None and self.site.grid.prefix):
            raise BadInput(f"nprf_rpe streams along one axis without prefix tokens, it is built for a {self.site.grid}")
        return KVCache.empty(batch, self.site.heads, self.features, self.site.head_dim + 1, wide(like))

    def advance(
        self, q: Tensor, k: Tensor, v: Tensor, state: KVCache, keep: Tensor | None, tokens: Tensor | None
    ) -> tuple[Tensor, KVCache]:
        """The segment's own rows of the sum over all tokens so far; padding has features of 0."""
        state = state.append(*self._keys(k, v, keep), None)
        keys, values = state.k.rows, state.v.rows
        grid = self._check_grid(Grid((q.shape[2],)), q.shape[2], keys.shape[2])
        o, rounding = self._sums(self._map(q), keys, values, self._factors(grid)[0])
        return _ratio(o, rounding).to(q.dtype), state


def _split(x_BHND: Tensor, prefix: int) -> tuple[Tensor, Tensor]:
    return x_BHND[:, :, :prefix], x_BHND[:, :, prefix:]


def _ratio(o_BHNE1: Tensor, rounding: float) -> Tensor:
    total = o_BHNE1[..., -1:].clamp(min=rounding)
    return o_BHNE1[..., :-1] / total.where(total > 0, 1)  # nothing seen: 0 / 1
