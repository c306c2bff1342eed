"""Multi-axis gated MLP (MAXIM): half the channels are mixed across blocks, the other half within them.

    [u, v] = gelu(W_i x)
    y = W_o [g_across(u), g_within(v)]
    g(z) = z + W_2 (a ⊙ (M norm(b) + 1)),    [a, b] = gelu(W_1 norm(z))

The grid is cut into blocks in two ways. For u there are as many blocks as `cells` says, whatever their size, and the
matrix M mixes what stands at the same place of every block: a dilated mixing of the whole picture. For v blocks have
`block` places on every axis, as many as there are, and M mixes the places of each. So both matrices are of fixed size,
the cost is linear, and one set of weights serves every grid that divides; two layers in a row connect all tokens. M
has a bias; gelu is approximated by tanh, as in the official code.

x (B, N, C); u, v, z, a, b (B, N, C). What is padded is 0 where M sums.

Time O(N C (C + cells + block)), for their numbers over all axes.

Source: Tu et al., "MAXIM: Multi-Axis MLP for Image Processing", 2022 (arXiv:2201.02973), official code
google-research/maxim.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attlas.core.errors import BadInput
from attlas.core.grid import Grid
from attlas.core.mechanism import Call, Cost, Mixer, Site, Sizes
from attlas.core.registry import register
from attlas.core.spec import Example, Pattern, Spec
from attlas.ops.multi_axis import MultiAxisLinear
from attlas.ops.windows import per_axis

EPSILON = 1e-6


def _size(c: int, cells: int, places: int) -> int:
    gated = 2 * (2 * c + 2 * c * c + 2 * c + 2 * c + c * c + c) + (cells + 1) * cells + (places + 1) * places
    return 2 * c * c + 2 * c + gated + 2 * c * c + c


SPEC = Spec(
    name="maxim",
    title="MAXIM: Multi-Axis MLP for Image Processing",
    year=2022,
    paper="arXiv:2201.02973",
    equation="y = W [g_across(u), g_within(v)],  g(z) = z + W (a ⊙ (M b + 1))",
    complexity="O(N C (C + cells + block)) time",
    patterns=frozenset({Pattern.NONCAUSAL_SELF}),
    prefix=False,
    examples=(
        Example(grid=(6, 4), params={"cells": (3, 2), "block": 2}, parameters=_size(16, 6, 4)),
        Example(grid=(4, 4), dim=6, params={"cells": 2, "block": (2, 1)}, parameters=_size(6, 4, 2)),
        Example(grid=(12,), params={"cells": 4, "block": 6}, parameters=_size(16, 4, 6)),
        Example(grid=(2, 3, 2), dim=4, params={"cells": (2, 1, 1), "block": 1}, parameters=_size(4, 2, 1)),
    ),
)


class SpatialGatedMlp(nn.Module):
    """g: a gated MLP whose gate is mixed over blocks or over the places of a block."""

    def __init__(self, dim: int, counts: Sequence[int], across: bool) -> None:
        super().__init__()
        self.norm, self.in_proj = nn.LayerNorm(dim, EPSILON), nn.Linear(dim, 2 * dim)
        self.gate_norm, self.mix = nn.LayerNorm(dim, EPSILON), MultiAxisLinear(counts, across)
        self.out_proj = nn.Linear(dim, dim)

    def forward(self, z_BNC: Tensor, grid: Grid, keep_BN: Tensor | None) -> Tensor:
        """Gate."""
        a_BNC, b_BNC = F.gelu(self.in_proj(self.norm(z_BNC)), approximate="tanh").chunk(2, -1)
        b_BNC = self.gate_norm(b_BNC)
        if keep_BN is not None:
            b_BNC = b_BNC.where(keep_BN.unsqueeze(-1), 0)
        return z_BNC + self.out_proj(a_BNC * (self.mix(b_BNC, grid) + 1))


@register(SPEC)
class Maxim(Mixer):
    """Mixing across blocks and within them, side by side.

    Args:
        site: where it is installed; its grid says how many axes there are, two where it has none, and no axis is cut
            into more than its places.
        backend: `auto`, `torch` or `oracle`.
        cells: blocks on every axis in the mixing across them, or one number per axis.
        block: places of a block on every axis in the mixing within them, or one number per axis.
    """

    def __init__(
        self,
        site: Site,
        backend: str = "auto",
        *,
        cells: int | Sequence[int] = 16,
        block: int | Sequence[int] = 16,
    ) -> None:
        super().__init__(site, backend)
        rank = 2 if site.grid is None else site.grid.rank
        counts = per_axis("cells", cells, rank), per_axis("block", block, rank)
        if min(*counts[0], *counts[1]) < 1:
            raise BadInput(f"cells and block are at least 1, got {cells} and {block}")
        if site.grid is not None:
            lengths = site.grid.shape
            counts = tuple(tuple(map(min, each, lengths)) for each in counts)  # type: ignore[assignment]
        self.in_proj = nn.Linear(site.dim, 2 * site.dim)
        self.across = SpatialGatedMlp(site.dim, counts[0], True)
        self.within = SpatialGatedMlp(site.dim, counts[1], False)
        self.out_proj = nn.Linear(2 * site.dim, site.dim)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def compute(self, x_BNC: Tensor, context_BMC: Tensor | None, call: Call) -> Tensor:
        """Both halves, then one projection."""
        keep = call.mask.keys
        if keep is not None:
            x_BNC = x_BNC.where(keep.unsqueeze(-1), 0)
        u_BNC, v_BNC = F.gelu(self.in_proj(x_BNC), approximate="tanh").chunk(2, -1)
        parts = self.across(u_BNC, call.grid, keep), self.within(v_BNC, call.grid, keep)
        return self.out_proj(torch.cat(parts, -1))

    def oracle(self, x_BNC: Tensor, context_BMC: Tensor | None, call: Call) -> Tensor:
        """Matrices of tokens by tokens, everything written out."""
        grid, keep = call.grid, call.mask.keys
        real_BN1 = x_BNC.new_ones(*x_BNC.shape[:2], 1) if keep is None else keep.unsqueeze(-1).to(x_BNC)
        x_BNC = x_BNC if keep is None else x_BNC.masked_fill(~keep.unsqueeze(-1), 0)
        place_NR = grid.places(x_BNC.device)

        def gelu(h: Tensor) -> Tensor:
            return 0.5 * h * (1 + (2**0.5 * torch.pi**-0.5 * (h + 0.044715 * h**3)).tanh())

        def normalised(norm: nn.LayerNorm, h: Tensor) -> Tensor:
            centred = h - h.mean(-1, keepdim=True)
            return centred / (centred.square().mean(-1, keepdim=True) + EPSILON).sqrt() * norm.weight + norm.bias

        def index(digits_NR: Tensor, counts: Sequence[int]) -> Tensor:
            flat = torch.zeros_like(digits_NR[:, 0])
            for digit, count in zip(digits_NR.unbind(1), counts, strict=True):
                flat = flat * count + digit
            return flat

        def gated(g: SpatialGatedMlp, z: Tensor) -> Tensor:
            size = torch.tensor(g.mix.places(grid), device=z.device)
            blocks = [length // int(each) for length, each in zip(grid.shape, size, strict=True)]
            block_N, inner_N = index(place_NR // size, blocks), index(place_NR % size, size.tolist())
            mixed_N, same_N = (block_N, inner_N) if g.mix.across else (inner_N, block_N)
            matrix_NM = g.mix.weight[mixed_N][:, mixed_N] * (same_N.unsqueeze(1) == same_N)
            h = gelu(normalised(g.norm, z) @ g.in_proj.weight.T + g.in_proj.bias)
            a, b = h[..., : z.shape[-1]], normalised(g.gate_norm, h[..., z.shape[-1] :]) * real_BN1
            gate = torch.einsum("nm,bmc->bnc", matrix_NM, b) + g.mix.bias[mixed_N].unsqueeze(-1) + 1
            return z + (a * gate) @ g.out_proj.weight.T + g.out_proj.bias

        h = gelu(x_BNC @ self.in_proj.weight.T + self.in_proj.bias)
        u, v = h[..., : self.site.dim], h[..., self.site.dim :]
        return (
            torch.cat([gated(self.across, u), gated(self.within, v)], -1) @ self.out_proj.weight.T + self.out_proj.bias
        )

    def count(self, sizes: Sizes) -> Cost:
        """Ten C x C matrices on every token, and the two that mix."""
        dim, tokens = self.site.dim, sizes.batch * sizes.queries
        self.across.mix.places(sizes.grid), self.within.mix.places(sizes.grid)
        cells, places = self.across.mix.in_features, self.within.mix.in_features
        flops = 2 * tokens * dim * (10 * dim + cells + places)
        return Cost(flops, flops)
