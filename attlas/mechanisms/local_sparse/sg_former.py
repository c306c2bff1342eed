"""Self-guided attention: keys are merged, finely where the picture matters and coarsely where it does not.

Two attentions, one after the other; the first one finds out what matters, the second one uses it.

    hybrid    u = W_o [softmax(q₁ k₁ᵀ / √D) v₁ ; softmax over windows (q₂ k₂ᵀ / √D) v₂] + LePE
              k₁, v₁ of z = GELU(LayerNorm(conv_r(x))), one for each cell of r places; k₂, v₂ of x itself
              S_m = mean_{h, n} of the weights of m's cell + mean_{h, n in m's window} of those of m
    guided    y = W_o softmax(q kᵀ / √D) v + LePE,    k, v of s = merged tokens

Half of the hybrid's heads are global, half look at windows without a shift. S (B, N), the mean attention that a token
is paid, is cut off from the gradient. For s the tokens are sorted by S, ascending, and cut into parts: the lowest
quarter, the middle half and the highest quarter (or two halves). In each part so many neighbours of the order as
`groups` says become one, s_j = Σ_i f_i x_(i) + b with a learned f for each part. At 224 pixels and the published
groups 60, 60 and 147 of 3136, 784 and 196 tokens are left. LePE is DWConv_{3x3}(W_l x), added before W_o.

This layer runs both, y = u + guided(x + u, S), so that adding y to x makes both residual steps. In the paper each of
the two is a block of its own, and norms and an MLP stand between them: `HybridScale` and `SelfGuided` are there for
that. The official code sorts a second time, column by column, for half of the guided heads: that is the same order
wherever no two tokens have equal S, so here it is sorted once, equals row by row.

x (B, N, C) on a grid of two axes; N, windows and cells need not divide: the last cells, windows and groups are smaller.
Padding is 0 to convolutions, is no key, has no share in S, and the real tokens alone are sorted and cut into parts.
What decides the order, S, is computed in float32 at least. Time O(N (N / r² + w² + M) C), M = merged tokens.

Source: Ren et al., "SG-Former: Self-guided Transformer with Evolving Token Reallocation", 2023 (arXiv:2308.12216),
official code OliverRensu/SG-Former.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attlas.core.errors import BadInput
from attlas.core.grid import Grid
from attlas.core.mask import Mask
from attlas.core.mechanism import Call, Cost, Mixer, Site, Sizes
from attlas.core.registry import register
from attlas.core.spec import Example, Pattern, Spec
from attlas.ops.cells import cell_convolution, cell_flops, cell_shape, live_cells
from attlas.ops.grid_conv import convolution_flops, depthwise, grid_convolution
from attlas.ops.precision import as_written, wide
from attlas.ops.softmax import attention_weights, softmax_attention
from attlas.ops.tile_order import TileOrder

GROUPS = {8: (196, 56, 28), 4: (49, 14, 7), 2: (2, 1)}
"""The published groups by the reduction of the stage."""

LINEAR = 16 * 16 + 16
LEPE = LINEAR + 16 * (9 + 1)
HYBRID = 4 * LINEAR + 2 * 16 + LEPE
GUIDED = 4 * LINEAR + LEPE

SPEC = Spec(
    name="sg_former",
    title="SG-Former: Self-guided Transformer with Evolving Token Reallocation",
    year=2023,
    paper="arXiv:2308.12216",
    equation="o = softmax(q kᵀ / √D) v, k and v of tokens merged by the attention that they were paid",
    complexity="O(N (N / r² + w² + M) C) time",
    patterns=frozenset({Pattern.NONCAUSAL_SELF}),
    grids=(2,),
    prefix=False,
    examples=(
        Example(
            grid=(4, 6),
            params={"reduction": 2, "window": 2},
            parameters=HYBRID + GUIDED + 16 * 16 * 4 + 16 + 3 + 2,
        ),
        Example(
            grid=(5, 4),
            heads=4,
            params={"reduction": 3, "window": 3, "groups": (3, 2, 2)},
            parameters=HYBRID + GUIDED + 16 * 16 * 9 + 16 + 4 + 3 + 3,
        ),
    ),
)


class _Local(nn.Module):
    """LePE and the output projection, which both attentions end with."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.proj = nn.Linear(dim, dim)
        self.conv = depthwise(dim, 3, 2)
        self.out_proj = nn.Linear(dim, dim)

    def forward(self, o_BHND: Tensor, x_BNC: Tensor, grid: Grid, keep_BN: Tensor | None, backend: str) -> Tensor:
        lepe = grid_convolution(self.proj(x_BNC), self.conv.weight, self.conv.bias, grid, keep_BN, backend=backend)
        return self.out_proj(o_BHND.transpose(1, 2).flatten(2) + lepe)


class HybridScale(nn.Module):
    """Hybrid-scale attention, which also says how much attention each token is paid.

    Args:
        dim: channels.
        heads: an even number; the first half is global.
        reduction: r, places of a cell on each axis.
        window: places of a window on each axis.
    """

    def __init__(self, dim: int, heads: int, reduction: int, window: int) -> None:
        super().__init__()
        self.heads, self.reduction, self.window = heads, reduction, window
        self.q_proj = nn.Linear(dim, dim)
        self.reduce = nn.Conv2d(dim, dim, reduction, reduction)
        self.reduce_norm = nn.LayerNorm(dim)
        self.cell_k, self.cell_v = nn.Linear(dim, dim // 2), nn.Linear(dim, dim // 2)
        self.k_proj, self.v_proj = nn.Linear(dim, dim // 2), nn.Linear(dim, dim // 2)
        self.local = _Local(dim)

    def forward(
        self, x_BNC: Tensor, grid: Grid, keep_BN: Tensor | None = None, backend: str = "auto"
    ) -> tuple[Tensor, Tensor]:
        """The attention (B, N, C) of tokens that are 0 where there is padding, and S (B, N)."""
        half, order = self.heads // 2, TileOrder(grid.shape, (self.window, self.window))
        with as_written(x_BNC):
            q_BHND, z_BMC, cell_k, k = self._scored(x_BNC, grid, keep_BN, backend)
            q1, q2 = q_BHND.split(half, 1)
            live_BM = live_cells(grid, self.reduction, keep_BN)
            global_BHNM = _weights(q1, cell_k, None if live_BM is None else live_BM[:, None, None])
            real_BTP = order.real(x_BNC.device)[None]
            if keep_BN is not None:
                real_BTP = order.cut(keep_BN, 1)
            local_BHTPP = _weights(order.cut(q2), order.cut(k), real_BTP[:, None, :, None])
            s_BN = self._significance(global_BHNM, local_BHTPP, real_BTP, order, grid, keep_BN)
        o1 = global_BHNM.to(x_BNC.dtype) @ _heads(self.cell_v(z_BMC.to(x_BNC.dtype)), half)
        o2 = order.join(local_BHTPP.to(x_BNC.dtype) @ order.cut(_heads(self.v_proj(x_BNC), half)))
        return self.local(torch.cat([o1, o2], 1), x_BNC, grid, keep_BN, backend), s_BN

    def _scored(
        self, x_BNC: Tensor, grid: Grid, keep_BN: Tensor | None, backend: str
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Queries of all heads, the tokens of the cells, and the keys of both halves, all wide."""
        x, half = wide(x_BNC), self.heads // 2
        weight, bias = wide(self.reduce.weight), wide(_bias(self.reduce))
        z_BMC = cell_convolution(x, weight, bias, grid, keep_BN, backend=backend)
        norm = self.reduce_norm
        z_BMC = F.gelu(F.layer_norm(z_BMC, norm.normalized_shape, wide(norm.weight), wide(norm.bias), norm.eps))
        q, cell_k, k = (
            F.linear(t, wide(proj.weight), wide(proj.bias))
            for t, proj in ((x, self.q_proj), (z_BMC, self.cell_k), (x, self.k_proj))
        )
        return _heads(q, self.heads), z_BMC, _heads(cell_k, half), _heads(k, half)

    def _significance(
        self,
        global_BHNM: Tensor,
        local_BHTPP: Tensor,
        real_BTP: Tensor,
        order: TileOrder,
        grid: Grid,
        keep_BN: Tensor | None,
    ) -> Tensor:
        """Means over heads and real queries, of a token's cell and of itself in its window."""
        seen_BHNM, near_BHTPP = global_BHNM.detach(), local_BHTPP.detach()
        if keep_BN is None:
            cells_BM = seen_BHNM.mean((1, 2))
        else:
            real_BN = keep_BN[:, None, :, None]
            cells_BM = (seen_BHNM * real_BN).mean(1).sum(1) / keep_BN.sum(1, keepdim=True).clamp(min=1)
        asking_BTP = (near_BHTPP * real_BTP[:, None, ..., None]).mean(1).sum(2)
        asking_BTP = asking_BTP / real_BTP.sum(-1, keepdim=True).clamp(min=1)
        rows, columns = (torch.arange(length, device=cells_BM.device) // self.reduction for length in grid.shape)
        cell_N = (rows[:, None] * cell_shape(grid, self.reduction)[1] + columns).flatten()
        return cells_BM[:, cell_N] + order.join(asking_BTP, 1)

    def oracle(self, x_BNC: Tensor, grid: Grid, keep_BN: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Dense attention under the rule "same window"; S from the two whole matrices."""
        half = self.heads // 2
        z_BMC = cell_convolution(x_BNC, self.reduce.weight, self.reduce.bias, grid, keep_BN, backend="oracle")
        z_BMC = F.gelu(self.reduce_norm(z_BMC))
        q1, q2 = _heads(self.q_proj(x_BNC), self.heads).split(half, 1)
        place_N2 = grid.places(x_BNC.device)
        window_N2, cell_N2 = place_N2 // self.window, place_N2 // self.reduction
        near_NN = (window_N2[:, None] == window_N2).all(-1)
        mask = Mask.pairs_(near_NN).with_(keys=keep_BN)
        live_BM = live_cells(grid, self.reduction, keep_BN)
        global_BHNM = attention_weights(q1, _heads(self.cell_k(z_BMC), half), Mask(keys=live_BM))
        local_BHNN = attention_weights(q2, _heads(self.k_proj(x_BNC), half), mask)
        o_BHND = torch.cat(
            [
                global_BHNM @ _heads(self.cell_v(z_BMC), half),
                local_BHNN @ _heads(self.v_proj(x_BNC), half),
            ],
            1,
        )
        real_BN = x_BNC.new_ones(x_BNC.shape[:2]) if keep_BN is None else keep_BN.to(x_BNC)
        shape, s_BN = cell_shape(grid, self.reduction), torch.zeros_like(real_BN)
        for m, (row, column) in enumerate(cell_N2.tolist()):
            asked_B = (global_BHNM.mean(1)[:, :, row * shape[1] + column] * real_BN).sum(1)
            around_BN = real_BN * near_NN[m]
            near_B = (local_BHNN.mean(1)[:, :, m] * around_BN).sum(1)
            s_BN[:, m] = asked_B / real_BN.sum(1).clamp(min=1) + near_B / around_BN.sum(1).clamp(min=1)
        return self.local(o_BHND, x_BNC, grid, keep_BN, "oracle"), s_BN.detach()


class SelfGuided(nn.Module):
    """Attention to tokens that were merged in the order of their significance.

    Args:
        dim: channels.
        heads: any number.
        groups: tokens that become one in each part, from the least significant on; two or three parts.
    """

    def __init__(self, dim: int, heads: int, groups: Sequence[int]) -> None:
        super().__init__()
        self.heads, self.groups = heads, tuple(groups)
        self.quarters = (0, 1, 3, 4) if len(self.groups) == 3 else (0, 2, 4)
        self.merge = nn.ModuleList(nn.Linear(size, 1) for size in self.groups)
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(dim, dim) for _ in range(3))
        self.local = _Local(dim)

    def forward(
        self, x_BNC: Tensor, s_BN: Tensor, grid: Grid, keep_BN: Tensor | None = None, backend: str = "auto"
    ) -> Tensor:
        """The attention (B, N, C) of tokens that are 0 where there is padding, with S (B, N)."""
        merged_BMC, live_BM = self._merge(x_BNC, s_BN, keep_BN)
        q, k, v = (
            _heads(proj(t), self.heads)
            for proj, t in ((self.q_proj, x_BNC), (self.k_proj, merged_BMC), (self.v_proj, merged_BMC))
        )
        o_BHND = softmax_attention(q, k, v, Mask(keys=live_BM), backend=backend)
        return self.local(o_BHND, x_BNC, grid, keep_BN, backend)

    def merged(self, tokens: int) -> list[int]:
        """How many tokens each part of so many becomes."""
        borders = [tokens * quarter // 4 for quarter in self.quarters]
        return [-(-(end - first) // size) for (first, end), size in zip(pairwise(borders), self.groups, strict=True)]

    def _merge(self, x_BNC: Tensor, s_BN: Tensor, keep_BN: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The merged tokens, and which of them (B, M) are made of any."""
        batch, count, dim = x_BNC.shape
        tokens_B1 = torch.full((1, 1), count, device=x_BNC.device)
        if keep_BN is not None:
            s_BN, tokens_B1 = s_BN.masked_fill(~keep_BN, torch.inf), keep_BN.sum(1, keepdim=True)  # padding goes last
        order_BN = s_BN.argsort(dim=1, stable=True)
        merged, live = [], []
        parts = zip(self.merge, self.groups, self.merged(count), pairwise(self.quarters), strict=True)
        for merge, size, groups, (first, end) in parts:
            rank_BS = tokens_B1 * first // 4 + torch.arange(groups * size, device=x_BNC.device)
            inside_BS = (rank_BS < tokens_B1 * end // 4).expand(batch, -1)
            index_BS = order_BN.gather(1, rank_BS.clamp(max=count - 1).expand(batch, -1))
            x_BSC = x_BNC.gather(1, index_BS.unsqueeze(-1).expand(-1, -1, dim)).where(inside_BS[..., None], 0)
            merged.append(merge(x_BSC.unflatten(1, (groups, size)).mT).squeeze(-1))
            live.append(inside_BS.unflatten(1, (groups, size)).any(-1))
        return torch.cat(merged, 1), None if keep_BN is None else torch.cat(live, 1)

    def oracle(self, x_BNC: Tensor, s_BN: Tensor, grid: Grid, keep_BN: Tensor | None = None) -> Tensor:
        """Sequence by sequence: sort, cut, merge group by group, attend."""
        q_BHND = _heads(self.q_proj(x_BNC), self.heads)
        outputs = []
        for b, x_NC in enumerate(x_BNC):
            real = range(len(x_NC)) if keep_BN is None else keep_BN[b].nonzero()[:, 0].tolist()
            ranked = sorted(real, key=lambda n, s=s_BN[b]: (float(s[n]), n))
            quarters = [0, len(ranked) // 4, 3 * len(ranked) // 4, len(ranked)]
            if len(self.groups) == 2:
                quarters = [0, len(ranked) // 2, len(ranked)]
            rows = [x_NC.new_zeros(0, x_NC.shape[1])]
            for part, (size, merge) in enumerate(zip(self.groups, self.merge, strict=True)):
                members = ranked[quarters[part] : quarters[part + 1]]
                for first in range(0, len(members), size):
                    group = members[first : first + size]
                    rows.append(merge(F.pad(x_NC[group].mT, (0, size - len(group)))).mT)
            s_MC = torch.cat(rows)
            k_HMD, v_HMD = (_heads(proj(s_MC[None]), self.heads)[0] for proj in (self.k_proj, self.v_proj))
            outputs.append((q_BHND[b] @ k_HMD.mT * q_BHND.shape[-1] ** -0.5).softmax(-1) @ v_HMD)
        return self.local(torch.stack(outputs), x_BNC, grid, keep_BN, "oracle")


@register(SPEC)
class SGFormer(Mixer):
    """Hybrid-scale attention, then self-guided attention.

    Args:
        site: where it is installed.
        backend: of the convolutions and the guided attention.
        reduction: r, places of a cell on each axis; 8, 4, 2 in the published stages.
        window: places of a window on each axis.
        groups: tokens that become one, in the lowest quarter, the middle half and the highest quarter, or in the
            lower and the upper half; the published ones of this reduction by default.
    """

    def __init__(
        self,
        site: Site,
        backend: str = "auto",
        *,
        reduction: int = 8,
        window: int = 7,
        groups: Sequence[int] | None = None,
    ) -> None:
        super().__init__(site, backend)
        dim, heads = site.dim, site.heads
        if heads % 2 or dim % heads:
            raise BadInput(f"half of the heads are global, and heads divide dim; got {heads} heads, {dim} channels")
        if reduction < 1 or window < 1:
            raise BadInput(f"reduction and window are at least 1, got {reduction} and {window}")
        if groups is None and reduction not in GROUPS:
            raise BadInput(f"groups are published for a reduction of 8, 4 or 2; give groups= for one of {reduction}")
        groups = GROUPS[reduction] if groups is None else tuple(groups)
        if len(groups) not in (2, 3) or min(groups) < 1:
            raise BadInput(f"groups are two or three counts of at least one token, got {groups}")
        self.hybrid = HybridScale(dim, heads, reduction, window)
        self.guided = SelfGuided(dim, heads, groups)
        if site.grid is not None:
            self._fit(site.grid)

    def _fit(self, grid: Grid) -> None:
        """Raise where the grid has other axes than two, or does not hold a cell and a window."""
        if grid.rank != 2:
            raise self._unsupported(f"a {grid}", grid=grid.rank)
        cell_shape(grid, self.hybrid.reduction)
        if self.hybrid.window > min(grid.shape):
            raise BadInput(
                f"a window of {self.hybrid.window} places on each axis is larger than a {grid}: take one of at most "
                f"{min(grid.shape)}"
            )

    def compute(self, x_BNC: Tensor, context_BMC: Tensor | None, call: Call) -> Tensor:
        """One after the other."""
        self._fit(call.grid)
        x_BNC, keep_BN = _blank(x_BNC, call.mask.keys), call.mask.keys
        u_BNC, s_BN = self.hybrid(x_BNC, call.grid, keep_BN, self.backend)
        return u_BNC + self.guided(_blank(x_BNC + u_BNC, keep_BN), s_BN, call.grid, keep_BN, self.backend)

    def oracle(self, x_BNC: Tensor, context_BMC: Tensor | None, call: Call) -> Tensor:
        """One after the other, by the oracles of the two."""
        self._fit(call.grid)
        x_BNC, keep_BN = _blank(x_BNC, call.mask.keys), call.mask.keys
        u_BNC, s_BN = self.hybrid.oracle(x_BNC, call.grid, keep_BN)
        return u_BNC + self.guided.oracle(_blank(x_BNC + u_BNC, keep_BN), s_BN, call.grid, keep_BN)

    def count(self, sizes: Sizes) -> Cost:
        """Both attentions; what the torch backend multiplies off the grid is not needed."""
        self._fit(sizes.grid)
        grid, dim, heads, hybrid = sizes.grid, self.site.dim, self.site.heads, self.hybrid
        tokens, parts = grid.positions, self.guided.merged(grid.positions)
        cells, merged = cell_shape(grid, hybrid.reduction), sum(parts)
        keys = cells[0] * cells[1]
        order = TileOrder(grid.shape, (hybrid.window, hybrid.window))
        # q, k₂ and v₂ make two full projections, LePE and W_o one each; the guided side has q, LePE and W_o.
        projections = 2 * dim**2 * (4 * tokens + keys + 3 * tokens + 2 * merged)
        attention = 2 * tokens * keys * dim + 4 * tokens * merged * dim
        on_grid, multiplied = (2 * dim * taps for taps in convolution_flops(grid, 3))
        in_cells, in_all_cells = cell_flops(grid, hybrid.reduction, dim**2)
        flops = projections + attention + on_grid + in_cells
        flops += 2 * sum(size**2 for size in order.sizes()) * dim + 2 * tokens * dim
        executed = projections + attention + multiplied + in_all_cells
        executed += 2 * order.tiles * order.places**2 * dim
        executed += 2 * sum(groups * size for groups, size in zip(parts, self.guided.groups, strict=True)) * dim
        return Cost(sizes.batch * flops, sizes.batch * executed, sizes.batch * heads * tokens**2)


def _heads(x_BNC: Tensor, heads: int) -> Tensor:
    return x_BNC.unflatten(-1, (heads, -1)).transpose(1, 2)


def _bias(conv: nn.Conv2d) -> Tensor:
    assert conv.bias is not None
    return conv.bias


def _blank(x_BNC: Tensor, keep_BN: Tensor | None) -> Tensor:
    return x_BNC if keep_BN is None else x_BNC.where(keep_BN.unsqueeze(-1), 0)


def _weights(q: Tensor, k: Tensor, seen: Tensor | None) -> Tensor:
    """Softmax weights, 0 for a query that sees nothing."""
    scores = q @ k.mT * q.shape[-1] ** -0.5
    if seen is None:
        return scores.softmax(-1)
    return scores.masked_fill(~seen, torch.finfo(scores.dtype).min).softmax(-1) * seen
