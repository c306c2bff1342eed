"""Bi-level routing attention: regions choose regions by their means, then tokens attend to the tokens of those.

    r_i = {the K regions j with the largest q̄_i · k̄_j}                  q̄, k̄ means over a region, all heads together
    o_n = Σ_m softmax_m(q_n · k_m / √C) v_m + LePE(v)_n,    m over the tokens of the regions in r_i, n in region i

The grid is cut into S regions on each axis, which hold length // S places each; where that does not divide, smaller
regions follow behind, and there are more than S. All heads share one choice, the own region need not be part of it,
and no gradient passes through it. Of equal products the region that comes first is better. LePE is a depthwise
convolution of the values with `kernel` taps on each axis. The scale is that of all C = H D channels, not of a head.

q, k, v (B, H, N, D) on a grid; R regions of about N / R tokens. Time O(R² C + N K (N / R) C), which is
O(N^4/3 C) at the best R.

Padding has no part in the means, is never attended to, and a region of padding alone is never chosen. Where fewer
than K regions hold tokens, all of them are.

Source: Zhu et al., "BiFormer: Vision Transformer with Bi-Level Routing Attention", 2023 (arXiv:2303.08810), official
code rayleizhu/BiFormer, whose refactored form this is. Where regions do not divide the grid, that form pads the keys
with zeros that take part in the softmax; here they do not. One and three axes are ours.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from attlas.core.errors import BadInput
from attlas.core.grid import Grid
from attlas.core.mechanism import Attend, Call, Cost, Site, Sizes
from attlas.core.registry import register
from attlas.core.spec import Example, Pattern, Spec
from attlas.ops.block_sparse import block_sparse_attention
from attlas.ops.grid_conv import convolution_flops, convolve_values, value_convolution
from attlas.ops.pairs import weighted_values
from attlas.ops.precision import as_written, wide
from attlas.ops.softmax import blank_padding
from attlas.ops.tile_order import TileOrder
from attlas.ops.topk import largest
from attlas.ops.windows import per_axis

PROJECTIONS = 4 * (16 * 16 + 16)

SPEC = Spec(
    name="biformer",
    title="BiFormer: Vision Transformer with Bi-Level Routing Attention",
    year=2023,
    paper="arXiv:2303.08810",
    equation="o = softmax(q kᵀ / √C over the K regions with the largest q̄ k̄ᵀ) v + LePE(v)",
    complexity="O(N^4/3 D) time",
    patterns=frozenset({Pattern.NONCAUSAL_SELF}),
    prefix=False,
    # At these sizes no two products are close, so that half precision chooses the same regions.
    examples=(
        Example(grid=(4, 6), params={"regions": 2, "top": 2}, parameters=PROJECTIONS + 16 * (25 + 1)),
        Example(grid=(4, 4), params={"regions": (2, 4), "top": 3, "kernel": 0}, parameters=PROJECTIONS),
        Example(grid=(11,), params={"regions": 3, "top": 2, "kernel": 3}, parameters=PROJECTIONS + 16 * (3 + 1)),
        Example(
            grid=(2, 3, 4),
            params={"regions": (1, 2, 2), "top": 4, "kernel": 3},
            parameters=PROJECTIONS + 16 * (27 + 1),
        ),
    ),
)


@register(SPEC)
class BiFormer(Attend):
    """Bi-level routing attention.

    Args:
        site: where it is installed; the convolution needs its grid.
        backend: of `block_sparse_attention`.
        regions: S, into how many regions each axis is cut, or one number per axis.
        top: K, regions that a region attends to; the published stages have 1, 4 and 16.
        kernel: taps of the convolution on each axis, odd; 0 for no convolution.
    """

    def __init__(
        self,
        site: Site,
        backend: str = "auto",
        *,
        regions: int | Sequence[int] = 7,
        top: int = 4,
        kernel: int = 5,
    ) -> None:
        super().__init__(site, backend)
        numbers = list(regions) if isinstance(regions, Sequence) else [regions]
        if not all(isinstance(number, int) and number >= 1 for number in [*numbers, top]):
            raise BadInput(f"regions and top count regions: whole numbers of at least 1, got {regions!r} and {top!r}")
        self.regions, self.top, self.kernel = regions, top, kernel
        if site.grid is not None:
            self._order(site.grid)
        self.convolution = value_convolution(site, kernel, self.spec.name)

    def _order(self, grid: Grid) -> TileOrder:
        """The regions as tiles of the grid."""
        regions = per_axis("regions", self.regions, grid.rank)
        if any(number > length for number, length in zip(regions, grid.shape, strict=True)):
            raise BadInput(f"a {grid} cannot be cut into {regions} regions: take at most {grid.shape}")
        order = TileOrder(grid.shape, tuple(length // s for length, s in zip(grid.shape, regions, strict=True)))
        if self.top > order.tiles:
            raise BadInput(f"top is {self.top} regions and the {grid} has {order.tiles}; take at most {order.tiles}")
        return order

    @property
    def _scale(self) -> float:
        return float((self.site.heads * self.site.head_dim) ** -0.5)

    def compute(self, q_BHND: Tensor, k_BHND: Tensor, v_BHND: Tensor, call: Call) -> Tensor:
        """Order by regions, route, attend."""
        order = self._order(call.grid)
        keep_BN = call.mask.keys
        q, k, v = blank_padding(keep_BN, q_BHND, k_BHND, v_BHND)
        real_BTP, keep_BM = order.held(keep_BN, q)
        chosen_BTT = self._route(order.cut(q), order.cut(k), real_BTP)
        o = block_sparse_attention(
            *(order.cut(x).flatten(2, 3) for x in (q, k, v)),
            chosen_BTT.unsqueeze(1),
            rows=order.places,
            columns=order.places,
            keep=keep_BM,
            scale=self._scale,
            backend=self.backend,
        )
        o_BHND = order.join(o.unflatten(2, (order.tiles, order.places)))
        if self.convolution is None:
            return o_BHND
        return o_BHND + convolve_values(self.convolution, v, call.grid, keep_BN)

    @torch.no_grad()
    def _route(self, q_BHTPD: Tensor, k_BHTPD: Tensor, real_BTP: Tensor) -> Tensor:
        """Which regions each region attends to, (B, T, T). Off the grid and at padding q and k are 0."""
        size_B1T1 = real_BTP.sum(-1)[:, None, :, None]
        with as_written(q_BHTPD):
            q_BTC, k_BTC = (
                (wide(x).sum(3) / size_B1T1.clamp(min=1)).transpose(1, 2).flatten(2) for x in (q_BHTPD, k_BHTPD)
            )
            product_BTT = q_BTC @ k_BTC.mT
        live_B1T = (size_B1T1 > 0)[..., 0]
        return largest(product_BTT.masked_fill(~live_B1T, -torch.inf), self.top) & live_B1T

    def oracle(self, q_BHND: Tensor, k_BHND: Tensor, v_BHND: Tensor, call: Call) -> Tensor:
        """Region by region over the positions that it holds, then one matrix of weights per head."""
        self._order(call.grid)  # checks that the regions fit
        batch, _, tokens, _ = q_BHND.shape
        region_N = self._region(call.grid, q_BHND.device)
        (q, k, v), keep_BN = blank_padding(call.mask.keys, q_BHND, k_BHND, v_BHND), call.mask.keys
        seen_BNN = q.new_zeros(batch, tokens, tokens, dtype=torch.bool)
        for b in range(batch):
            real_N = torch.ones_like(region_N, dtype=torch.bool) if keep_BN is None else keep_BN[b]
            members = {int(i): (region_N == i) & real_N for i in region_N.unique()}
            members = {i: member_N for i, member_N in members.items() if member_N.any()}
            for own_N in members.values():
                q_C = wide(q[b].detach())[:, own_N].mean(1).flatten()
                k_C = {i: wide(k[b].detach())[:, other_N].mean(1).flatten() for i, other_N in members.items()}
                product = {i: float(q_C @ k_C[i]) for i in members}
                for i in sorted(product, key=lambda i: (-product[i], i))[: self.top]:
                    seen_BNN[b] |= own_N[:, None] & members[i]
        scores = (torch.einsum("bhnd,bhmd->bhnm", q, k) * self._scale).masked_fill(~seen_BNN[:, None], -torch.inf)
        seeing = seen_BNN.any(-1)[:, None, :, None]
        weights = scores.masked_fill(~seeing, 0).softmax(-1) * seeing
        o_BHND = weighted_values(weights, v, call.mask)
        if self.convolution is None:
            return o_BHND
        return o_BHND + convolve_values(self.convolution, v, call.grid, keep_BN, "oracle")

    def _region(self, grid: Grid, device: torch.device) -> Tensor:
        """The number of the region of each position."""
        number = torch.zeros(grid.positions, dtype=torch.long, device=device)
        regions = per_axis("regions", self.regions, grid.rank)
        for place, length, count in zip(grid.places(device).unbind(1), grid.shape, regions, strict=True):
            number = number * (2 * length) + place // (length // count)
        return number

    def count(self, sizes: Sizes) -> Cost:
        """Products of the means, and two per pair; torch multiplies all pairs, and all taps of the convolution.

        Where regions differ in size, which are chosen decides how many pairs there are: as many as on average.
        """
        order, batch, heads, size = self._order(sizes.grid), sizes.batch, self.site.heads, self.site.head_dim
        positions, channels = sizes.grid.positions, batch * heads * size
        routing = 2 * channels * order.tiles**2
        exact = order.even or self.top == order.tiles
        pairs = positions * positions * self.top // order.tiles
        on_grid, multiplied = convolution_flops(sizes.grid, self.kernel) if self.convolution is not None else (0, 0)
        return Cost(
            routing + channels * (4 * pairs + on_grid),
            routing + channels * (4 * (order.tiles * order.places) ** 2 + multiplied),
            batch * heads * pairs if exact and self.convolution is None else 0,
        )
