"""HiLo attention: some heads look at high frequencies inside small windows, the others at low ones over everything.

    Hi-Fi  o_n = Σ_{m in the window of n} softmax_m(q_n · k_m / √D) v_m
    Lo-Fi  o_n = Σ_c softmax_c(q_n · k_c / √D) v_c,    k_c, v_c of the mean of x over window c
    y = [W_hi o_hi ; W_lo o_lo]

The grid is cut into windows of `window` positions on every axis, without shift and without position bias. int(α H) of
the H heads are low, the others, in front, high; each kind has its projections and its share of the channels, and
nothing mixes the two afterwards. A window of one position makes every head low: plain attention. α = 0 is attention
in windows, α = 1 attention to pooled keys.

Where the grid does not divide, the last window of an axis is smaller and its mean is over what it has; the official
code needs grids that divide or pads them with zeros, which enter the means. Padding enters neither a softmax nor a
mean. Prefix tokens, ours, see and are seen by all: in the same softmax as a window, and unpooled beside the means.

x (B, N, C) on a grid, q (B, H, N, D), C = H D. Time O(N C² + N w^axes C + N² C / w^axes).

Source: Pan, Cai and Zhuang, "Fast Vision Transformers with HiLo Attention", 2022 (arXiv:2205.13213), official code
ziplab/LITv2. One and three axes are ours.
"""

from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attlas.core.axis import Block
from attlas.core.errors import BadInput
from attlas.core.grid import Grid
from attlas.core.mask import Mask
from attlas.core.mechanism import Call, Cost, Mixer, Site, Sizes
from attlas.core.registry import register
from attlas.core.spec import Example, Pattern, Spec
from attlas.ops.neighborhood import neighborhood_attention
from attlas.ops.precision import wide
from attlas.ops.softmax import attention_weights, softmax_attention

SPEC = Spec(
    name="hilo",
    title="Fast Vision Transformers with HiLo Attention",
    year=2022,
    paper="arXiv:2205.13213",
    equation="y = [softmax over the window of (q kᵀ) v ; softmax(q mean(k)ᵀ) mean(v)]",
    complexity="O(N w + N² / w) time",
    patterns=frozenset({Pattern.NONCAUSAL_SELF}),
    examples=(
        Example(grid=(5, 4), parameters=16 * 24 + 24 + 16 * 24 + 24 + 2 * (8 * 8 + 8)),
        Example(
            grid=(3, 4),
            prefix=1,
            heads=4,
            params={"bias": False},
            parameters=16 * 12 + (4 * 4 + 4) + 16 * 36 + (12 * 12 + 12),
        ),
        Example(grid=(7,), params={"window": 3, "alpha": 0.0}, parameters=16 * 48 + 48 + 16 * 16 + 16),
        Example(grid=(2, 3, 2), params={"window": 1}, parameters=16 * 48 + 48 + 16 * 16 + 16),
    ),
)


@register(SPEC)
class HiLo(Mixer):
    """HiLo attention.

    Args:
        site: where it is installed.
        backend: of both attentions.
        window: positions of a window on every axis; the paper has 2 on its larger and 1 on its smallest maps.
        alpha: share of the heads that are low.
        bias: of the query, key and value projections.
    """

    def __init__(
        self, site: Site, backend: str = "auto", *, window: int = 2, alpha: float = 0.9, bias: bool = True
    ) -> None:
        super().__init__(site, backend)
        dim, heads = site.dim, site.heads
        if dim % heads:
            raise BadInput(f"heads must divide dim: {dim} channels do not split into {heads} heads")
        if window < 1:
            raise BadInput(f"window counts positions on every axis, at least 1, got {window}")
        if not 0 <= alpha <= 1:
            raise BadInput(f"alpha is the share of low heads, 0 to 1, got {alpha}")
        self.window = window
        if site.grid is not None:
            self._axes(site.grid)
        self.low_heads = heads if window == 1 else int(alpha * heads)
        self.high_heads = heads - self.low_heads
        low, high = (count * dim // heads for count in (self.low_heads, self.high_heads))
        if high:
            self.high_qkv, self.high_out = nn.Linear(dim, 3 * high, bias), nn.Linear(high, high)
        if low:
            self.low_q, self.low_kv = nn.Linear(dim, low, bias), nn.Linear(dim, 2 * low, bias)
            self.low_out = nn.Linear(low, low)

    def _axes(self, grid: Grid) -> tuple[Block, ...]:
        """The windows of each axis; raises where they do not fit the grid."""
        return tuple(Block(length, self.window) for length in grid.shape)

    def _heads(self, x_BNC: Tensor, parts: int) -> list[Tensor]:
        """Cut a projection into its parts, each (B, heads, N, D)."""
        size = self.site.dim // self.site.heads
        return [part.unflatten(-1, (-1, size)).transpose(1, 2) for part in x_BNC.chunk(parts, -1)]

    def compute(self, x_BNC: Tensor, context_BMC: Tensor | None, call: Call) -> Tensor:
        """Both kinds of heads side by side."""
        axes, keep = self._axes(call.grid), call.mask.keys
        if keep is not None:
            x_BNC = x_BNC.masked_fill(~keep.unsqueeze(-1), 0)
        outputs = []
        if self.high_heads:
            q, k, v = self._heads(self.high_qkv(x_BNC), 3)
            o = neighborhood_attention(q, k, v, axes, prefix=call.grid.prefix, keep=keep, backend=self.backend)
            outputs.append(self.high_out(o.transpose(1, 2).flatten(2)))
        if self.low_heads:
            coarse_BMC, live_BM = self._pool(x_BNC, call.grid, keep)
            (q,), (k, v) = self._heads(self.low_q(x_BNC), 1), self._heads(self.low_kv(coarse_BMC), 2)
            o = softmax_attention(q, k, v, Mask(keys=live_BM), backend=self.backend)
            outputs.append(self.low_out(o.transpose(1, 2).flatten(2)))
        return torch.cat(outputs, -1)

    def _pool(self, x_BNC: Tensor, grid: Grid, keep_BN: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Prefix tokens and the means of the windows' real positions, and which of all these there are."""
        if self.window == 1:
            return x_BNC, keep_BN
        pool = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)[grid.rank - 1]

        def means(x: Tensor) -> Tensor:
            x_BCS = grid.unflatten(grid.split(x)[1].mT, -1)
            return pool(wide(x_BCS), self.window, ceil_mode=True).flatten(2).mT

        prefix = grid.split(x_BNC)[0]
        if keep_BN is None:
            return torch.cat([prefix, means(x_BNC).to(x_BNC)], 1), None
        share_BM1 = means(keep_BN.unsqueeze(-1).to(x_BNC))
        mean_BMC = means(x_BNC) / share_BM1.where(share_BM1 > 0, 1)
        live_BM = torch.cat([keep_BN[:, : grid.prefix], share_BM1[..., 0] > 0], 1)
        return torch.cat([prefix, mean_BMC.to(x_BNC)], 1), live_BM

    def oracle(self, x_BNC: Tensor, context_BMC: Tensor | None, call: Call) -> Tensor:
        """Two N x N and N x M matrices: which tokens share a window, and which windows have a real token."""
        axes, grid, keep = self._axes(call.grid), call.grid, call.mask.keys
        real_BN = x_BNC.new_ones(x_BNC.shape[:2], dtype=torch.bool) if keep is None else keep
        x_BNC = x_BNC.where(real_BN.unsqueeze(-1), 0)
        cells = [-(-axis.length // axis.window) for axis in axes]
        home_N = torch.zeros(grid.positions, dtype=torch.long, device=x_BNC.device)
        for count, place_N in zip(cells, grid.places(x_BNC.device).unbind(1), strict=True):
            home_N = home_N * count + place_N // self.window
        # Every prefix token is a window of its own in front of the others.
        home_N = torch.cat([torch.arange(grid.prefix, device=x_BNC.device), home_N + grid.prefix])
        alone_N = torch.arange(grid.tokens, device=x_BNC.device) < grid.prefix
        member_BMN = (home_N == torch.arange(grid.prefix + prod(cells), device=x_BNC.device)[:, None]) & real_BN[
            :, None
        ]
        count_BM1 = member_BMN.sum(-1, keepdim=True)
        outputs = []
        if self.high_heads:
            seen_NN = (home_N[:, None] == home_N) | alone_N[:, None] | alone_N
            q, k, v = self._heads(self.high_qkv(x_BNC), 3)
            weights = attention_weights(q, k, Mask.pairs_(seen_NN).with_(keys=real_BN))
            outputs.append(self.high_out((weights @ v).transpose(1, 2).flatten(2)))
        if self.low_heads:
            coarse_BMC = (member_BMN.to(x_BNC) / count_BM1.clamp(min=1)) @ x_BNC
            (q,), (k, v) = self._heads(self.low_q(x_BNC), 1), self._heads(self.low_kv(coarse_BMC), 2)
            weights = attention_weights(q, k, Mask(keys=count_BM1[..., 0] > 0))
            outputs.append(self.low_out((weights @ v).transpose(1, 2).flatten(2)))
        return torch.cat(outputs, -1)

    def count(self, sizes: Sizes) -> Cost:
        """Projections and products; torch multiplies border windows in full.

        Pairs are not counted: a high head's are those of windows, a low head's, through the means, all, so that the
        tokens that depend on one another are not equally many in every head.
        """
        axes, grid, dim, batch = self._axes(sizes.grid), sizes.grid, self.site.dim, sizes.batch
        size, tokens = dim // self.site.heads, sizes.queries
        high, low = self.high_heads * size, self.low_heads * size
        keys = grid.prefix + prod(-(-axis.length // axis.window) for axis in axes)
        linear = tokens * high * (3 * dim + high) + tokens * low * (dim + low) + 2 * keys * dim * low
        around = grid.prefix * (grid.prefix + 2 * grid.positions)
        pairs, multiplied = (
            high * (around + inside) + low * tokens * keys
            for inside in (prod(axis.pairs() for axis in axes), grid.positions * self.window**grid.rank)
        )
        return Cost(batch * (2 * linear + 4 * pairs), batch * (2 * linear + 4 * multiplied))
