"""Outlook attention: the token in the middle of a window writes down all weights within it.

    y_n = W_o Σ_{windows w that hold n} Σ_{m in w} A_w[n, m] v_m,    v = W_v x
    A_w = softmax_m(reshape(W_a x̄_w + b_a) / √D)       K² rows, one for each place n, of K² weights

There is no product of queries and keys: the K⁴ weights of a head are a linear function of x̄_w, the mean of the
`stride`² tokens from the window's middle on. Windows stand `stride` places apart; what they give to a token is summed,
not averaged.

x (B, N, C) on a grid of two axes; A (B, H, windows, K², K²), D = C / H. Values are 0 off the grid and where there is
padding, as to a convolution, and still take their share of the softmax: so the official code has it at the border, and
so a picture that is padded gives what it gives alone. Means are over the real tokens only; a window without one gives
nothing. Where the stride does not divide the grid, windows still cover all of it. Prefix tokens lie in no window and
give 0.

Time O(N C (C + K⁴ H / s²) + N K⁴ C / s²), linear in N, for a stride of s.

Source: Yuan et al., "VOLO: Vision Outlooker for Visual Recognition", 2021 (arXiv:2106.13112), official code
sail-sg/volo.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attlas.core.errors import BadInput, share
from attlas.core.mechanism import Call, Cost, Mixer, Site, Sizes
from attlas.core.registry import register
from attlas.core.spec import Example, Pattern, Spec
from attlas.ops.grid_conv import positions
from attlas.ops.precision import wide

VALUES = 2 * 16 * 16 + 16

SPEC = Spec(
    name="volo",
    title="VOLO: Vision Outlooker for Visual Recognition",
    year=2021,
    paper="arXiv:2106.13112",
    equation="y = Σ over windows of softmax(W_a x̄ / √D) v, weights made by the middle of the window",
    complexity="O(N K⁴) time",
    patterns=frozenset({Pattern.NONCAUSAL_SELF}),
    grids=(2,),
    examples=(
        Example(grid=(4, 6), parameters=VALUES + 17 * 81 * 2),
        Example(grid=(5, 3), prefix=1, heads=4, params={"stride": 1}, parameters=VALUES + 17 * 81 * 4),
        Example(
            grid=(4, 5),
            heads=1,
            params={"kernel": 5, "stride": 3, "bias": True},
            parameters=VALUES + 16 + 17 * 625,
        ),
    ),
)


@register(SPEC)
class Volo(Mixer):
    """Outlook attention.

    Args:
        site: where it is installed.
        backend: `auto`, `torch` or `oracle`.
        kernel: K, places of a window on each axis, odd.
        stride: from window to window, at most K // 2 + 1, so that a window holds the tokens that its weights are
            made of; 2 in all published models.
        bias: of the values.
        weight_dropout: share of the weights dropped in training.
        dropout: on the output, in training.
    """

    def __init__(
        self,
        site: Site,
        backend: str = "auto",
        *,
        kernel: int = 3,
        stride: int = 2,
        bias: bool = False,
        weight_dropout: float = 0.0,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(site, backend)
        dim, heads = site.dim, site.heads
        if dim % heads:
            raise BadInput(f"heads must divide dim: {dim} channels do not split into {heads} heads")
        if kernel < 1 or kernel % 2 == 0:
            raise BadInput(f"a window is centred on a place, so its kernel is odd, got {kernel}")
        if not 1 <= stride <= kernel // 2 + 1:
            raise BadInput(
                f"a window of {kernel} places holds the tokens that its weights are made of for a stride of 1 to "
                f"{kernel // 2 + 1}, got {stride}"
            )
        self.kernel, self.stride = kernel, stride
        self.weight_dropout = share("weight_dropout", weight_dropout)
        self.dropout = share("dropout", dropout)
        self.v_proj = nn.Linear(dim, dim, bias)
        self.weight_proj = nn.Linear(dim, heads * kernel**4)
        self.out_proj = nn.Linear(dim, dim)

    def compute(self, x_BNC: Tensor, context_BMC: Tensor | None, call: Call) -> Tensor:
        """Unfold the values, weigh them in each window, fold the windows back."""
        grid, heads = call.grid, self.site.heads
        x_BPC, real_BP1 = positions(x_BNC, call.grid, call.mask.keys)
        v_BPC = wide(self.v_proj(x_BPC).where(real_BP1, 0))
        v_BCS = grid.unflatten(v_BPC.mT, -1)
        window = {"kernel_size": self.kernel, "padding": self.kernel // 2, "stride": self.stride}
        v_BHWKD = F.unfold(v_BCS, **window).unflatten(1, (heads, -1, self.kernel**2)).permute(0, 1, 4, 3, 2)
        real_B1S = grid.unflatten(real_BP1.mT, -1)
        pooled_BWC, live_BW1 = self._pool(grid.unflatten(x_BPC.mT, -1), real_B1S)
        scores_BWHKK = wide(self.weight_proj(pooled_BWC)).unflatten(-1, (heads, self.kernel**2, -1))
        scores_BHWKK = scores_BWHKK.transpose(1, 2) * (self.site.dim // heads) ** -0.5
        weights_BHWKK = scores_BHWKK.softmax(-1).where(live_BW1[:, None, :, :, None], 0)
        o_BHWKD = F.dropout(weights_BHWKK, self.weight_dropout, self.training) @ v_BHWKD
        o_BCS = F.fold(o_BHWKD.permute(0, 1, 4, 3, 2).flatten(1, 3), grid.shape, **window)
        y_BPC = F.dropout(self.out_proj(o_BCS.flatten(2).mT.to(x_BPC.dtype)), self.dropout, self.training)
        return F.pad(y_BPC, (0, 0, grid.prefix, 0))

    def _pool(self, x_BCS: Tensor, real_B1S: Tensor) -> tuple[Tensor, Tensor]:
        """Means of the real tokens of the windows' middles (B, windows, C), and which (B, windows, 1) have any."""
        share_B1W, mean_BCW = (F.avg_pool2d(wide(t), self.stride, ceil_mode=True) for t in (real_B1S.to(x_BCS), x_BCS))
        live_B1W = share_B1W > 0
        mean_BCW = mean_BCW / share_B1W.where(live_B1W, 1)
        return mean_BCW.flatten(2).mT.to(x_BCS.dtype), live_B1W.flatten(2).mT

    def oracle(self, x_BNC: Tensor, context_BMC: Tensor | None, call: Call) -> Tensor:
        """Window by window: its matrix, the product with the values of its places, added where they lie."""
        x_BPC, real_BP1 = positions(x_BNC, call.grid, call.mask.keys)
        x_BSC, real_BS = call.grid.unflatten(x_BPC), call.grid.unflatten(real_BP1[..., 0], -1)
        v_BSC = self.v_proj(x_BSC) * real_BS.unsqueeze(-1)
        o_BSC = torch.zeros_like(v_BSC)
        (rows, columns), kernel, heads = call.grid.shape, self.kernel, self.site.heads
        size = self.site.dim // heads
        for top in range(0, rows, self.stride):
            for left in range(0, columns, self.stride):
                middle = slice(top, top + self.stride), slice(left, left + self.stride)
                count_B1 = real_BS[:, *middle].sum((1, 2)).unsqueeze(1)
                mean_BC = x_BSC[:, *middle].sum((1, 2)) / count_B1.clamp(min=1)
                a_BHKK = self.weight_proj(mean_BC).view(-1, heads, kernel**2, kernel**2)
                a_BHKK = (a_BHKK / size**0.5).softmax(-1) * (count_B1 > 0)[:, :, None, None]
                places = [
                    (i, top + i // kernel - kernel // 2, left + i % kernel - kernel // 2) for i in range(kernel**2)
                ]
                places = [(i, y, x) for i, y, x in places if 0 <= y < rows and 0 <= x < columns]
                for h in range(heads):
                    own = slice(h * size, (h + 1) * size)
                    for i, y, x in places:
                        given = sum(a_BHKK[:, h, i, j, None] * v_BSC[:, b, a, own] for j, b, a in places)
                        o_BSC[:, y, x, own] = o_BSC[:, y, x, own] + given
        return F.pad(self.out_proj(o_BSC).flatten(1, 2), (0, 0, call.grid.prefix, 0))

    def _windows(self, length: int) -> list[range]:
        """The places of each window of one axis that are on the grid."""
        reach = self.kernel // 2
        return [range(max(0, c - reach), min(length, c + reach + 1)) for c in range(0, length, self.stride)]

    def count(self, sizes: Sizes) -> Cost:
        """Projections, and the products of places on the grid; the torch backend also multiplies the others.

        Pairs are the tokens that share a window.
        """
        grid, batch, dim, heads = sizes.grid, sizes.batch, self.site.dim, self.site.heads
        windows = products = pairs = 1
        for length in grid.shape:
            axis = self._windows(length)
            windows *= len(axis)
            products *= sum(len(window) ** 2 for window in axis)
            pairs *= len({(n, m) for window in axis for n in window for m in window})
        projections = 4 * grid.positions * dim**2 + 2 * windows * dim * heads * self.kernel**4
        flops = projections + 2 * products * dim
        executed = projections + 2 * windows * self.kernel**4 * dim
        return Cost(batch * flops, batch * executed, batch * heads * pairs)
