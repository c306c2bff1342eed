"""Varying window attention: queries of a window see a context R times larger on every side, at the window's cost.

    o_n = Σ_m softmax_m(q_n · k_m / √D) v_m,    k = W_k c, v = W_v c,    y = BN(W_o o)

The map is cut into windows of P_h x P_w places, `windows` on every axis. Around each lies its context of
R P_h x R P_w places, which by itself would cost R² times as much. It is made small before it is cut out:

- pre-scaling: z = ReLU(BN(conv(x))) at every place, a dense R x R convolution from C to C / R² channels (densely
  overlapping patch embedding), the place being its ((R - 1) // 2)-th tap;
- copy-shift padding: zeros beyond the border would draw attention, so a context that crosses it takes the places
  that follow at its other end. On each axis it holds the R P places nearest to it, in an order turned round;
- space to depth: R x R places of the context become one token of R² C / R² = C channels, row by row. So a context
  has as many tokens as its window, and scores cost 2 N P_h P_w C whatever R is.

R = 1 is plain window attention, of ReLU(BN(W x)). A short cut around belongs to the block; with a norm that starts
at 0, y does too. The official decoder runs R = 2, 4 and 8 beside one another on 8 x 8 windows.

Sizes need not divide: P is the length over `windows`, rounded down, and what remains makes further windows, the last
as small as need be, with contexts as large as any; 8 windows on 15 places make 15 of one place. Official code takes
no such maps. Padding is 0 to the convolution and in its result, enters no statistics, and a token of padding alone is
not seen; it stays in its place on the grid.

x (B, N, C). Time O(N P² C + N C²), memory O(N P² H).

Source: Yan et al., "Multi-Scale Representations by Varying Window Attention for Semantic Segmentation", 2024
(arXiv:2404.16573), official code yan-hao-tian/VW. A map narrower than a context, which it pads with zeros, is refused.

In shape suffixes: B batch, N tokens, C channels, Z channels of z, U and V windows down and across, I and J places of
a context, S and T tokens of a context and queries of a window on the axes, H heads, D head size.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attlas.core.errors import BadInput
from attlas.core.grid import Grid
from attlas.core.mask import Mask
from attlas.core.mechanism import Call, Cost, Mixer, Site, Sizes
from attlas.core.registry import register
from attlas.core.spec import Example, Pattern, Spec
from attlas.ops.batch_norm import TokenBatchNorm
from attlas.ops.softmax import softmax_attention


def _parameters(dim: int, ratio: int) -> int:
    """Convolution, two norms, three projections with a bias and one without."""
    return dim * dim + 2 * (dim // ratio**2) + 3 * (dim * dim + dim) + dim * dim + 2 * dim


SPEC = Spec(
    name="vwa",
    title="Multi-Scale Representations by Varying Window Attention for Semantic Segmentation",
    year=2024,
    paper="arXiv:2404.16573",
    equation="o = softmax(q kᵀ / √D) v over a context R times larger, scaled down to the window's size",
    complexity="O(N P² C) time",
    patterns=frozenset({Pattern.NONCAUSAL_SELF}),
    grids=(2,),
    prefix=False,
    examples=(
        Example(grid=(4, 6), params={"windows": 2}, parameters=_parameters(16, 2)),
        Example(grid=(5, 7), params={"windows": 3}, parameters=_parameters(16, 2)),
        Example(grid=(4, 9), heads=4, params={"windows": 4, "ratio": 4}, parameters=_parameters(16, 4)),
        Example(grid=(4, 4), heads=1, params={"windows": 2, "ratio": 1}, parameters=_parameters(16, 1)),
    ),
)


@register(SPEC)
class VWA(Mixer):
    """Varying window attention.

    Args:
        site: where it is installed.
        backend: of `softmax_attention` within the windows.
        ratio: R, how many times wider and higher than a window its context is.
        windows: on every axis of the map that they divide, more on others; at least R.
    """

    def __init__(self, site: Site, backend: str = "auto", *, ratio: int = 2, windows: int = 8) -> None:
        super().__init__(site, backend)
        dim = site.dim
        if dim % site.heads:
            raise BadInput(f"heads must divide dim: {dim} channels do not split into {site.heads} heads")
        if ratio < 1 or dim % ratio**2:
            raise BadInput(
                f"{ratio} x {ratio} places of dim / ratio² channels make one token: ratio² must divide dim, "
                f"got ratio {ratio} and dim {dim}"
            )
        if windows < ratio:
            raise BadInput(
                f"a context is {ratio} windows wide, so there are at least as many on every axis, got windows={windows}"
            )
        self.ratio, self.windows = ratio, windows
        if site.grid is not None and len(site.grid.shape) == 2:
            self._windows(site.grid)
        self.rescale = nn.Conv2d(dim, dim // ratio**2, ratio, bias=False)
        self.rescale_norm = TokenBatchNorm(dim // ratio**2)
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(dim, dim) for _ in "qkv")
        self.out_proj = nn.Linear(dim, dim, bias=False)
        self.out_norm = TokenBatchNorm(dim)
        nn.init.zeros_(self.out_norm.weight)

    def _windows(self, grid: Grid) -> tuple[tuple[int, int], tuple[int, int]]:
        """The places of a window, and how many windows there are, on both axes."""
        if min(grid.shape) < self.windows:
            raise BadInput(
                f"a {grid} has no {self.windows} windows on every axis; build with windows={min(grid.shape)} or fewer"
            )
        height, width = (length // self.windows for length in grid.shape)
        return (height, width), (-(-grid.shape[0] // height), -(-grid.shape[1] // width))

    def _contexts(self, grid: Grid, device: torch.device) -> list[Tensor]:
        """The places of every context, (U, I) and (V, J)."""
        found = []
        for length, size, count in zip(grid.shape, *self._windows(grid), strict=True):
            wide = self.ratio * size
            begin = torch.arange(count, device=device).unsqueeze(1) * size - (wide - size + 1) // 2
            first = begin.clamp(0, length - wide)
            found.append(first + (begin - first + torch.arange(wide, device=device)) % wide)
        return found

    def compute(self, x_BNC: Tensor, context_BMC: Tensor | None, call: Call) -> Tensor:
        """Scale, cut out, attend window by window."""
        grid, keep_BN = call.grid, call.mask.keys
        if keep_BN is not None:
            x_BNC = x_BNC.where(keep_BN.unsqueeze(-1), 0)
        places = self._contexts(grid, x_BNC.device)
        z_BNZ = self.rescale_norm(self._convolve(x_BNC, grid), keep_BN).relu()
        tokens_WSC = self._tokens(z_BNZ if keep_BN is None else z_BNZ.where(keep_BN.unsqueeze(-1), 0), grid, places)
        mask = Mask()
        if keep_BN is not None:
            mask = Mask.padding(self._tokens(keep_BN.unsqueeze(-1), grid, places).any(-1))
        q, k, v = (
            x.unflatten(-1, (self.site.heads, -1)).transpose(1, 2)
            for x in (self._cut(self.q_proj(x_BNC), grid), self.k_proj(tokens_WSC), self.v_proj(tokens_WSC))
        )
        o_WTC = softmax_attention(q, k, v, mask, backend=self.backend).transpose(1, 2).flatten(2)
        return self.out_norm(self.out_proj(self._join(o_WTC, grid)), keep_BN)

    def _convolve(self, x_BNC: Tensor, grid: Grid) -> Tensor:
        before, after = (self.ratio - 1) // 2, self.ratio // 2
        x_BCHW = F.pad(grid.unflatten(x_BNC.mT, -1), (before, after, before, after))
        return self.rescale(x_BCHW).flatten(2).mT

    def _tokens(self, z_BNZ: Tensor, grid: Grid, places: list[Tensor]) -> Tensor:
        """The context of every window as tokens of R² places, (B U V, S T, R² Z)."""
        rows_UI, columns_VJ = places
        ratio = self.ratio
        z_BUVIJZ = grid.unflatten(z_BNZ)[:, rows_UI[:, None, :, None], columns_VJ[None, :, None, :]]
        z_BUVSRTRZ = z_BUVIJZ.unflatten(4, (-1, ratio)).unflatten(3, (-1, ratio))
        return z_BUVSRTRZ.transpose(4, 5).flatten(0, 2).flatten(3).flatten(1, 2)

    def _cut(self, q_BNC: Tensor, grid: Grid) -> Tensor:
        """The queries of every window, (B U V, S T, C); zeros behind the border."""
        (height, width), (down, across) = self._windows(grid)
        missing = (0, 0, 0, across * width - grid.shape[1], 0, down * height - grid.shape[0])
        q_BUSVTC = F.pad(grid.unflatten(q_BNC), missing).unflatten(2, (across, width)).unflatten(1, (down, height))
        return q_BUSVTC.transpose(2, 3).flatten(0, 2).flatten(1, 2)

    def _join(self, o_WTC: Tensor, grid: Grid) -> Tensor:
        """The way back from `_cut`."""
        (height, width), (down, across) = self._windows(grid)
        o_BUSVTC = o_WTC.unflatten(1, (height, width)).unflatten(0, (-1, down, across)).transpose(2, 3)
        return o_BUSVTC.flatten(3, 4).flatten(1, 2)[:, : grid.shape[0], : grid.shape[1]].flatten(1, 2)

    def oracle(self, x_BNC: Tensor, context_BMC: Tensor | None, call: Call) -> Tensor:
        """Window by window: the convolution tap by tap, the border by rolling, tokens by every R-th place."""
        grid, ratio, size = call.grid, self.ratio, self.site.dim // self.site.heads
        keep_BN = call.mask.keys
        real_BN1 = torch.ones_like(x_BNC[..., :1], dtype=torch.bool) if keep_BN is None else keep_BN.unsqueeze(-1)
        x_BHWC = grid.unflatten(x_BNC.where(real_BN1, 0))
        before, after = (ratio - 1) // 2, ratio // 2
        padded = F.pad(x_BHWC, (0, 0, before, after, before, after))
        z_BHWZ = sum(
            padded[:, a : a + grid.shape[0], b : b + grid.shape[1]] @ self.rescale.weight[:, :, a, b].T
            for a in range(ratio)
            for b in range(ratio)
        )
        assert isinstance(z_BHWZ, Tensor)
        z_BNZ = self.rescale_norm.oracle(z_BHWZ.flatten(1, 2), keep_BN).clamp(min=0).where(real_BN1, 0)
        o_BHWC = torch.zeros_like(x_BHWC)
        (height, width), (down, across) = self._windows(grid)
        for u in range(down):
            for v in range(across):
                tokens, seen = (
                    self._context(grid.unflatten(part), (u, v), (height, width)) for part in (z_BNZ, real_BN1)
                )
                seen_B1M = seen.any(-1).unsqueeze(1)
                own = (
                    slice(None),
                    slice(u * height, (u + 1) * height),
                    slice(v * width, (v + 1) * width),
                )
                q = self.q_proj(x_BHWC[own].flatten(1, 2))
                k, values = self.k_proj(tokens), self.v_proj(tokens)
                parts = []
                for h in range(self.site.heads):
                    rows = slice(h * size, (h + 1) * size)
                    scores = (q[..., rows] @ k[..., rows].mT / size**0.5).masked_fill(~seen_B1M, -torch.inf)
                    weights = scores.softmax(-1).where(seen_B1M.any(-1, keepdim=True), 0)
                    parts.append(weights @ values[..., rows])
                o_BHWC[own] = torch.cat(parts, -1).view_as(o_BHWC[own])
        return self.out_norm.oracle(self.out_proj(o_BHWC.flatten(1, 2)), keep_BN)

    def _context(self, z_BHWZ: Tensor, window: tuple[int, int], size: tuple[int, int]) -> Tensor:
        """The tokens of one window: the nearest places in reach, rolled to begin where the context does."""
        for axis in (0, 1):
            wide = self.ratio * size[axis]
            begin = window[axis] * size[axis] - (wide - size[axis] + 1) // 2
            first = min(max(begin, 0), z_BHWZ.shape[1 + axis] - wide)
            z_BHWZ = z_BHWZ.narrow(1 + axis, first, wide).roll(first - begin, 1 + axis)
        taps = [z_BHWZ[:, a :: self.ratio, b :: self.ratio] for a in range(self.ratio) for b in range(self.ratio)]
        return torch.cat(taps, -1).flatten(1, 2)

    def count(self, sizes: Sizes) -> Cost:
        """Convolution, projections and two products within the windows; torch also counts taps and queries off the map.

        A context's token is a mixture of places, so there are no pairs of tokens to count.
        """
        dim, grid = self.site.dim, sizes.grid
        (height, width), (down, across) = self._windows(grid)
        whole, within = down * across * height * width, height * width
        before, after = (self.ratio - 1) // 2, self.ratio // 2
        taps = [
            sum(min(n + after, length - 1) - max(n - before, 0) + 1 for n in range(length)) for length in grid.shape
        ]
        linear = 2 * dim * dim * (2 * grid.positions + 2 * whole)
        flops = linear + 2 * taps[0] * taps[1] * dim * (dim // self.ratio**2) + 4 * grid.positions * within * dim
        executed = linear + 2 * grid.positions * dim**2 + 4 * whole * within * dim
        return Cost(sizes.batch * flops, sizes.batch * executed)
