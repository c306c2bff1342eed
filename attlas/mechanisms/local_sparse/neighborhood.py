"""Neighborhood attention, sliding, dilated, strided, blocked or causal, on one to three axes.

    o_n = sum_{m in window(n)} softmax_m(q_n . k_m / sqrt(D) + b_(m - n)) v_m

q (B, H, N, D), k (B, G, N, D), v (B, G, N, E). The window is a product of intervals, one per axis. A window
that would cross the border is shifted inwards, never padded: every query sees exactly as many keys as any
other. An even window reaches one place further to the left. On each axis, on its own:

- `dilation` d: the axis is cut into d interleaved groups and windows stay in their group;
- `stride` s: s neighbouring queries share the window of their leader; s = 1 slides, s = window is block
  attention (Swin's windows), between the two lies what hardware likes;
- causal: the window is the last places up to the query, fewer at the beginning; `causal_axes` makes time
  causal and space not, a causal layer makes every axis causal.

`relative_bias` is the table of the Neighborhood Attention Transformer and its dilated successor: one number
per head and offset, in places of the dilation group. It is defined for odd windows that slide, and NATTEN's
fused kernels do not have it, so it is off by default.

Prefix tokens see every token and every token sees them, in the same softmax and without bias; in a causal
layer they see the prefix up to themselves.

Time O(N w^axes D H), memory O(N w^axes D G); the causal state is the last w d - 1 keys and values.

Sources: Hassani et al., "Neighborhood Attention Transformer", 2022 (arXiv:2204.07143); Hassani and Shi,
"Dilated Neighborhood Attention Transformer", 2022 (arXiv:2209.15001); Hassani et al., "Faster Neighborhood
Attention", 2024 (arXiv:2403.04690) and "Generalized Neighborhood Attention", 2025 (arXiv:2504.16922);
official code SHI-Labs/NATTEN.
"""

from collections.abc import Sequence
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor, nn

from attlas.core.errors import BadInput
from attlas.core.grid import Grid
from attlas.core.mechanism import Attend, Call, Cost, Site, Sizes
from attlas.core.registry import register
from attlas.core.spec import Example, Pattern, Spec
from attlas.ops.neighborhood import Axis, neighborhood_attention
from attlas.ops.windows import per_axis

NONCAUSAL = frozenset({Pattern.NONCAUSAL_SELF})
SHELL_PARAMETERS = 4 * (16 * 16 + 16)

SPEC = Spec(
    name="neighborhood",
    title="Neighborhood Attention Transformer",
    year=2022,
    paper="arXiv:2204.07143",
    equation="o = softmax over the window of (q kᵀ / √D + b) v",
    complexity="O(N w D) time, O(w D) state",
    patterns=frozenset({Pattern.NONCAUSAL_SELF, Pattern.CAUSAL_SELF}),
    streams=True,
    grouped=True,
    examples=(
        Example(grid=(9,), params={"window": 3, "dilation": 2}, parameters=SHELL_PARAMETERS),
        Example(
            grid=(4, 5),
            prefix=1,
            heads=4,
            kv_heads=2,
            params={"window": (2, 4), "stride": (2, 3)},
            parameters=2 * (16 * 16 + 16) + 2 * (16 * 8 + 8),
        ),
        Example(
            grid=(5, 3),
            params={"window": (5, 3), "relative_bias": True},
            parameters=SHELL_PARAMETERS + 2 * 9 * 5,
            patterns=NONCAUSAL,
        ),
        Example(
            grid=(4, 2, 3),
            params={"window": (2, 1, 3), "dilation": (2, 1, 1), "causal_axes": (True, False, False)},
            parameters=SHELL_PARAMETERS,
            patterns=NONCAUSAL,
        ),
    ),
)


class NeighborhoodState(NamedTuple):
    """The last w d - 1 keys and values (B, G, w d - 1, D) and which are real (B, w d - 1)."""

    k: Tensor
    v: Tensor
    keep: Tensor


@register(SPEC)
class Neighborhood(Attend):
    """Neighborhood attention.

    Args:
        site: where it is installed.
        backend: of `neighborhood_attention`.
        window: places on every axis, or one number per axis; `window * dilation` positions must exist
            on an axis that is not causal.
        dilation: distance between neighbouring places, or one per axis.
        stride: queries that share a window, at most the window, or one per axis.
        causal_axes: which axes are causal, in a layer that is not causal as a whole.
        relative_bias: learn a bias per head and offset, (H, 2 window - 1, ...); for odd windows with
            stride 1 that are not causal.
        scale: of the scores; D ** -0.5 by default.
    """

    def __init__(
        self,
        site: Site,
        backend: str = "auto",
        *,
        window: int | Sequence[int] = 7,
        dilation: int | Sequence[int] = 1,
        stride: int | Sequence[int] = 1,
        causal_axes: Sequence[bool] | None = None,
        relative_bias: bool = False,
        scale: float | None = None,
    ) -> None:
        super().__init__(site, backend)
        if site.causal and causal_axes is not None and not all(causal_axes):
            raise BadInput(
                f"a causal layer makes every axis causal, got causal_axes {tuple(causal_axes)}; "
                "build it with causal=False"
            )
        self.window, self.dilation, self.stride = window, dilation, stride
        self.causal_axes = site.causal if causal_axes is None else causal_axes
        self.scale = scale
        axes = self._axes(site.grid or self._smallest_grid())
        self.relative_bias: nn.Parameter | None = None
        if relative_bias:
            if any(axis.window % 2 == 0 or axis.stride > 1 or axis.causal for axis in axes):
                raise BadInput(
                    "relative_bias is defined for odd windows with stride 1 that are not causal, got "
                    f"window {window}, stride {stride}, causal {self.causal_axes}"
                )
            self.relative_bias = nn.Parameter(torch.empty(site.heads, *(2 * axis.window - 1 for axis in axes)))
            nn.init.trunc_normal_(self.relative_bias, std=0.02)

    def _smallest_grid(self) -> Grid:
        """A grid on which the settings can be checked where the real one is not known yet."""
        settings = (self.window, self.dilation, self.stride, self.causal_axes)
        rank = max((len(each) for each in settings if isinstance(each, Sequence)), default=1)
        windows, dilations = (
            per_axis("window", self.window, rank),
            per_axis("dilation", self.dilation, rank),
        )
        return Grid(tuple(max(w * d, 1) for w, d in zip(windows, dilations, strict=True)))

    def _axes(self, grid: Grid) -> tuple[Axis, ...]:
        """The rule of each axis; raises where the settings do not fit the grid."""
        names = ("window", "dilation", "stride", "causal_axes")
        settings = (per_axis(name, getattr(self, name), grid.rank) for name in names)
        return tuple(Axis(length, *each) for length, *each in zip(grid.shape, *settings, strict=True))

    def compute(self, q_BHND: Tensor, k_BGMD: Tensor, v_BGME: Tensor, call: Call) -> Tensor:
        """Run the op."""
        queries, keys, grid = q_BHND.shape[2], k_BGMD.shape[2], call.grid
        if queries != keys:
            home = self.site.grid or grid
            if home.rank > 1 or home.prefix:
                raise BadInput(f"on a {home} every token is a query, got {queries} queries for {keys} keys")
            grid = Grid((keys,))
        if self.relative_bias is not None and self.relative_bias.ndim != 1 + grid.rank:
            raise BadInput(
                f"relative_bias was built for {self.relative_bias.ndim - 1} axes, the call has a {grid}; "
                f"build the layer with a grid of {grid.rank} axes"
            )
        return self._attend(q_BHND, k_BGMD, v_BGME, grid, call.mask.keys)

    oracle = compute  # the op's own oracle backend

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, grid: Grid, keep: Tensor | None) -> Tensor:
        return neighborhood_attention(
            q,
            k,
            v,
            self._axes(grid),
            prefix=grid.prefix,
            keep=keep,
            bias=self.relative_bias,
            scale=self.scale,
            backend=self.backend,
        )

    def count(self, sizes: Sizes) -> Cost:
        """Two products per visible pair; a causal window is multiplied in full by the torch backend."""
        axes, prefix, positions = self._axes(sizes.grid), sizes.grid.prefix, sizes.grid.positions
        in_reach = pairs = prefix * (prefix + positions)
        if all(axis.causal for axis in axes):
            in_reach, pairs = prefix * prefix, prefix * (prefix + 1) // 2
        pairs += positions * prefix + prod(axis.pairs() for axis in axes)
        executed = in_reach + positions * (prefix + prod(axis.window for axis in axes))
        heads = sizes.batch * self.site.heads
        size = self.site.head_dim
        return Cost(4 * heads * pairs * size, 4 * heads * executed * size, heads * pairs)

    def initial_state(self, batch: int, like: Tensor) -> NeighborhoodState:
        """Nothing real yet."""
        home = self.site.grid or self._smallest_grid()
        if home.rank > 1 or home.prefix:
            raise BadInput(f"streams run along one axis without prefix tokens, the layer is built for a {home}")
        (axis,) = self._axes(self._smallest_grid())
        if axis.stride > 1:
            raise BadInput(
                f"stride {axis.stride} does not stream: the last shared window depends on the length of the "
                "whole sequence; build with stride=1"
            )
        rows = like.new_zeros(batch, self.site.kv_heads, axis.length - 1, self.site.head_dim)
        return NeighborhoodState(rows, rows, rows.new_zeros(batch, axis.length - 1, dtype=torch.bool))

    def advance(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        state: NeighborhoodState,
        keep: Tensor | None,
        tokens: Tensor | None,
    ) -> tuple[Tensor, NeighborhoodState]:
        """Attend to the keys that the segment's first windows reach back to and to the segment."""
        span = state.k.shape[2]
        real = k.new_ones(k.shape[0], k.shape[2], dtype=torch.bool) if keep is None else keep
        k, v, real = torch.cat([state.k, k], 2), torch.cat([state.v, v], 2), torch.cat([state.keep, real], 1)
        o = self._attend(q, k, v, Grid((k.shape[2],)), real)
        last = k.shape[2] - span
        return o, NeighborhoodState(k[:, :, last:], v[:, :, last:], real[:, last:])
