"""Strip self-attention: queries and keys of one channel per head, keys and values of a coarser picture.

    y = W_o concat_h softmax(q_h k_hᵀ / √w) v_h,    q = W_q x,  k = W_k z,  v = W_v z,  z = LayerNorm(DWConv_r(x))

With the published w = 1 the queries of a head are one column (a strip), and so are its keys: the scores are an outer
product, of rank 1, and cost N M numbers per head whatever the channels. Values keep all C channels. DWConv_r is a
depthwise convolution of r taps on each axis with steps of r: M = N / r². With r = 1 there is none, nor a norm.

x (B, N, C) on a grid of two axes; q (B, H, N, w), k (B, H, M, w), v (B, H, M, C / H). A grid that r does not divide
ends in cells of fewer tokens. Padding is 0 to the convolution; a cell of padding alone is seen by nobody. Time
O(N M (w H + C)), projections O(N C (C + w H)).

Source: Xu et al., "S2AFormer: Strip Self-Attention for Efficient Vision Transformer", 2025 (arXiv:2505.22195). No
official code is known: this is a reconstruction. One channel per head in queries and keys, the depthwise reduction and
full values are taken from descriptions of the paper; the norm after the reduction, the biases and r (8, 4, 2, 1 along
the stages of such pyramids) are assumed.
"""

import torch
from torch import Tensor, nn

from attlas.core.errors import BadInput
from attlas.core.mask import Mask
from attlas.core.mechanism import Call, Cost, Mixer, Site, Sizes
from attlas.core.registry import register
from attlas.core.spec import Example, Pattern, Spec
from attlas.ops.cells import cell_convolution, cell_flops, cell_shape, live_cells
from attlas.ops.softmax import softmax_attention

STRIPS = 2 * (16 * 2 + 2)
VALUES = 2 * (16 * 16 + 16)
NORM = 2 * 16

SPEC = Spec(
    name="s2aformer",
    title="S2AFormer: Strip Self-Attention for Efficient Vision Transformer",
    year=2025,
    paper="arXiv:2505.22195",
    equation="o = softmax(q kᵀ) v with one channel per head in q and k, and k, v of a coarser picture",
    complexity="O(N (N / r²) (H + C)) time",
    patterns=frozenset({Pattern.NONCAUSAL_SELF}),
    grids=(2,),
    prefix=False,
    reconstruction=True,
    examples=(
        Example(grid=(4, 6), parameters=STRIPS + VALUES + NORM + 16 * (4 + 1)),
        Example(grid=(5, 4), params={"reduction": 3}, parameters=STRIPS + VALUES + NORM + 16 * (9 + 1)),
        Example(grid=(3, 4), params={"reduction": 1, "width": 8}, parameters=2 * VALUES),
    ),
)


@register(SPEC)
class S2AFormer(Mixer):
    """Strip self-attention.

    Args:
        site: where it is installed.
        backend: of the softmax attention and the reduction.
        reduction: how many times fewer keys than queries there are on each axis.
        width: channels of queries and keys per head; dim / heads is what plain attention has.
    """

    def __init__(self, site: Site, backend: str = "auto", *, reduction: int = 2, width: int = 1) -> None:
        super().__init__(site, backend)
        dim, heads = site.dim, site.heads
        if dim % heads:
            raise BadInput(f"heads must divide dim: {dim} channels do not split into {heads} heads")
        if reduction < 1 or width < 1:
            raise BadInput(f"reduction and width are at least 1, got {reduction} and {width}")
        self.reduction, self.width = reduction, width
        if site.grid is not None:
            cell_shape(site.grid, reduction)
        self.q_proj = nn.Linear(dim, heads * width)
        self.k_proj = nn.Linear(dim, heads * width)
        self.v_proj = nn.Linear(dim, dim)
        self.out_proj = nn.Linear(dim, dim)
        self.reduce = nn.Conv2d(dim, dim, reduction, reduction, groups=dim) if reduction > 1 else None
        self.reduce_norm = nn.LayerNorm(dim) if reduction > 1 else nn.Identity()

    def compute(self, x_BNC: Tensor, context_BMC: Tensor | None, call: Call) -> Tensor:
        """Reduce, project, attend."""
        grid, keep_BN = call.grid, call.mask.keys
        if keep_BN is not None:
            x_BNC = x_BNC.masked_fill(~keep_BN.unsqueeze(-1), 0)
        z_BMC, live_BM = x_BNC, keep_BN
        if self.reduce is not None:
            z_BMC = cell_convolution(x_BNC, self.reduce.weight, self.reduce.bias, grid, keep_BN, backend=self.backend)
            z_BMC, live_BM = self.reduce_norm(z_BMC), live_cells(grid, self.reduction, keep_BN)
        q, k, v = (self._heads(t) for t in (self.q_proj(x_BNC), self.k_proj(z_BMC), self.v_proj(z_BMC)))
        o_BHNE = softmax_attention(q, k, v, Mask(keys=live_BM), scale=self.width**-0.5, backend=self.backend)
        return self.out_proj(o_BHNE.transpose(1, 2).flatten(2))

    def _heads(self, x_BNC: Tensor) -> Tensor:
        return x_BNC.unflatten(-1, (self.site.heads, -1)).transpose(1, 2)

    def oracle(self, x_BNC: Tensor, context_BMC: Tensor | None, call: Call) -> Tensor:
        """Cell by cell, head by head and query by query, the scores a sum over the channels of the strips."""
        real_BN = x_BNC.new_ones(x_BNC.shape[:2], dtype=torch.bool) if call.mask.keys is None else call.mask.keys
        x_BNC = x_BNC.where(real_BN.unsqueeze(-1), 0)
        z_BMC, live_BM = x_BNC, real_BN
        if self.reduce is not None:
            members: dict[tuple[int, int], list[int]] = {}
            for n, (row, column) in enumerate(call.grid.places().tolist()):
                members.setdefault((row // self.reduction, column // self.reduction), []).append(n)
            taps_N2 = call.grid.places() % self.reduction
            weight_NC = self.reduce.weight[:, 0, taps_N2[:, 0], taps_N2[:, 1]].T
            cells = [(weight_NC[own] * x_BNC[:, own]).sum(1) for own in members.values()]
            z_BMC = self.reduce_norm(torch.stack(cells, 1) + self.reduce.get_parameter("bias"))
            live_BM = torch.stack([real_BN[:, own].any(1) for own in members.values()], 1)
        q_BNS, k_BMS, v_BMC = self.q_proj(x_BNC), self.k_proj(z_BMC), self.v_proj(z_BMC)
        heads, width = self.site.heads, self.width
        size = self.site.dim // heads
        o_BNC = torch.zeros_like(x_BNC)
        for b in range(len(x_BNC)):
            seen = live_BM[b]
            for h in range(heads):
                strip, own = slice(h * width, (h + 1) * width), slice(h * size, (h + 1) * size)
                for n in range(x_BNC.shape[1]):
                    scores = (k_BMS[b, seen, strip] * q_BNS[b, n, strip]).sum(1)
                    o_BNC[b, n, own] = (scores / width**0.5).softmax(0) @ v_BMC[b, seen, own]
        return self.out_proj(o_BNC)

    def count(self, sizes: Sizes) -> Cost:
        """Projections, the reduction, and a product of width w and one of the head size per query and cell."""
        batch, grid, dim, heads = sizes.batch, sizes.grid, self.site.dim, self.site.heads
        queries, cells = grid.positions, 1
        for count in cell_shape(grid, self.reduction):
            cells *= count
        strips = heads * self.width
        projections = 2 * (queries * dim * (strips + dim) + cells * dim * (strips + dim))
        attention = 2 * queries * cells * (strips + dim)
        on_grid, multiplied = cell_flops(grid, self.reduction, dim) if self.reduce is not None else (0, 0)
        pairs = batch * heads * queries**2
        return Cost(batch * (projections + attention + on_grid), batch * (projections + attention + multiplied), pairs)
