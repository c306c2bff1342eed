"""Criss-cross attention: every position attends to its own row and column, and does so twice.

    y_u = γ Σ_i softmax_i(q_u · k_i) v_i + x_u,   i over the row and the column of u

with q = W_q x, k = W_k x of C / reduction channels and v = W_v x of C. The softmax runs jointly over the
H + W - 1 positions, u itself once; scores are not scaled; γ starts at 0. The pass is repeated `recurrence`
times with the same weights: after two passes every position has reached every other, through the corner
where the row of one meets the column of the other. On a (T, H, W) grid a pass covers the three lines
through u and three passes reach everywhere. Prefix tokens lie on no line and are passed on unchanged. A
position whose lines hold nothing but padding keeps x_u.

x (B, N, C) on a grid S of two or three axes. Time O(N (H + W) C) per pass, memory O(N (H + W)).

Source: Huang et al., "CCNet: Criss-Cross Attention for Semantic Segmentation", 2018 (arXiv:1811.11721),
official code speedinghzl/CCNet. Its functions3d.py transposes the row weights and counts u twice; three axes
here follow the definition.
"""

from itertools import combinations
from math import prod

import torch
from torch import Tensor, nn

from attlas.core.errors import BadInput
from attlas.core.grid import Grid
from attlas.core.mask import Mask
from attlas.core.mechanism import Call, Cost, Mixer, Site, Sizes
from attlas.core.registry import register
from attlas.core.spec import Example, Pattern, Spec
from attlas.ops.softmax import softmax_attention

SPEC = Spec(
    name="criss_cross",
    title="CCNet: Criss-Cross Attention for Semantic Segmentation",
    year=2018,
    paper="arXiv:1811.11721",
    equation="y = γ softmax(q kᵀ over row and column) v + x, R times",
    complexity="O(N (H + W) C) time",
    patterns=frozenset({Pattern.NONCAUSAL_SELF}),
    grids=(2, 3),
    examples=(
        Example(grid=(5, 4), parameters=2 * (16 * 2 + 2) + 16 * 16 + 16 + 1),
        Example(grid=(2, 3), prefix=1, parameters=2 * (16 * 2 + 2) + 16 * 16 + 16 + 1),
        Example(
            grid=(2, 3, 4),
            params={"reduction": 4, "recurrence": 3},
            parameters=2 * (16 * 4 + 4) + 16 * 16 + 16 + 1,
        ),
    ),
)


@register(SPEC)
class CrissCross(Mixer):
    """Criss-cross attention with shared recurrence.

    Args:
        site: where it is installed.
        backend: `auto`, `torch` or `oracle`.
        reduction: how many times fewer channels queries and keys have.
        recurrence: passes with the same weights.
    """

    def __init__(self, site: Site, backend: str = "auto", *, reduction: int = 8, recurrence: int = 2) -> None:
        super().__init__(site, backend)
        if not 1 <= reduction <= site.dim:
            raise BadInput(f"reduction leaves dim // reduction channels: 1 to {site.dim}, got {reduction}")
        if recurrence < 1:
            raise BadInput(f"recurrence counts passes, at least 1, got {recurrence}")
        self.recurrence = recurrence
        self.q_proj = nn.Linear(site.dim, site.dim // reduction)
        self.k_proj = nn.Linear(site.dim, site.dim // reduction)
        self.v_proj = nn.Linear(site.dim, site.dim)
        self.gamma = nn.Parameter(torch.zeros(1))

    def compute(self, x_BNC: Tensor, context_BMC: Tensor | None, call: Call) -> Tensor:
        """Scores along each axis side by side, one softmax over all, weighted sums along each axis."""
        prefix, x = call.grid.split(x_BNC)
        x_BSC = call.grid.unflatten(x)
        seen_BSL = self._seen(call.grid, call.mask.keys, x.device)
        axes = range(1, 1 + call.grid.rank)
        if call.mask.keys is not None:
            real_BS1 = call.mask.keys[:, call.grid.prefix :].unflatten(1, call.grid.shape).unsqueeze(-1)
        for _ in range(self.recurrence):
            source_BSC = x_BSC if call.mask.keys is None else x_BSC.masked_fill(~real_BS1, 0)  # NaN in padding
            q, k, v = self.q_proj(x_BSC), self.k_proj(source_BSC), self.v_proj(source_BSC)
            lines = [q.movedim(axis, -2) @ k.movedim(axis, -2).transpose(-1, -2) for axis in axes]
            scores_BSL = torch.cat([line.movedim(-2, axis) for axis, line in zip(axes, lines, strict=True)], -1)
            lowest = torch.finfo(scores_BSL.dtype).min
            weights_BSL = scores_BSL.masked_fill(~seen_BSL, lowest).softmax(-1) * seen_BSL
            parts = weights_BSL.split(call.grid.shape, -1)
            out_BSC = sum(
                (part.movedim(axis, -2) @ v.movedim(axis, -2)).movedim(-2, axis)
                for axis, part in zip(axes, parts, strict=True)
            )
            x_BSC = self.gamma * out_BSC + x_BSC
        return torch.cat([prefix, x_BSC.flatten(1, -2)], 1)

    def _seen(self, grid: Grid, keep_BN: Tensor | None, device: torch.device) -> Tensor:
        """Which places of its lines, axis after axis, a position sees: (B or 1, S..., sum of S)."""
        if keep_BN is None:
            keep_BN = torch.ones(1, grid.tokens, dtype=torch.bool, device=device)
        real_BS = keep_BN[:, grid.prefix :].unflatten(1, grid.shape)
        lines = []
        for axis, length in enumerate(grid.shape, 1):
            line = real_BS.movedim(axis, -1).unsqueeze(axis).expand(-1, *grid.shape, -1)
            if axis < grid.rank:  # u stands on all its lines and is counted on the last
                shape = [1] * line.ndim
                shape[axis] = shape[-1] = length
                line = line & ~torch.eye(length, dtype=torch.bool, device=device).view(shape)
            lines.append(line)
        return torch.cat(lines, -1)

    def oracle(self, x_BNC: Tensor, context_BMC: Tensor | None, call: Call) -> Tensor:
        """Dense attention in which positions see those that differ from them on at most one axis."""
        places = call.grid.places(x_BNC.device)
        mask = Mask.pairs_((places[:, None] != places).sum(-1) <= 1)
        if call.mask.keys is not None:
            mask = mask & Mask.padding(call.mask.keys[:, call.grid.prefix :])
        prefix, x = call.grid.split(x_BNC)
        for _ in range(self.recurrence):
            q, k, v = (proj(x).unsqueeze(1) for proj in (self.q_proj, self.k_proj, self.v_proj))
            x = self.gamma * softmax_attention(q, k, v, mask, scale=1.0, backend="oracle")[:, 0] + x
        return torch.cat([prefix, x], 1)

    def count(self, sizes: Sizes) -> Cost:
        """Projections and lines of every pass; the torch backend also multiplies the masked selves.

        The pairs are those of all passes together, of positions that differ on at most `recurrence` axes, and every
        prefix token with itself.
        """
        dim, reduced = self.site.dim, self.q_proj.out_features
        grid = sizes.grid
        positions = sizes.batch * grid.positions
        projections = 2 * positions * dim * (2 * reduced + dim)
        multiplied = positions * sum(grid.shape)
        on_lines = multiplied - positions * (grid.rank - 1)
        flops, executed = (projections + 2 * count * (reduced + dim) for count in (on_lines, multiplied))
        passes = min(self.recurrence, grid.rank)
        moves = [axes for count in range(passes + 1) for axes in combinations(grid.shape, count)]
        reached = sum(prod(length - 1 for length in axes) for axes in moves)
        pairs = self.site.heads * (positions * reached + sizes.batch * grid.prefix)
        return Cost(self.recurrence * flops, self.recurrence * executed, pairs)
