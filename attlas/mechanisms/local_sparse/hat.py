"""Overlapping cross-attention (HAT): windows of queries that touch, each with a larger window of keys.

    o_n = Σ_m softmax_m(q_n · k_m / √D + b_(m - n)) v_m     over the m in the window of n or at most h beyond it

q (B, H, N, D), k (B, G, N, D), v (B, G, N, E). The grid is cut into windows of w places on every axis; the queries of
a window see the (1 + overlap) w places around its middle, h = overlap w / 2 beyond either side, so that neighbouring
windows of keys overlap. overlap = 0 is window attention.

Where a window of keys reaches beyond the border of the map, keys and values are zeros and are not masked: such a place
takes its share exp(b) of the softmax and brings nothing, so a border query's output is that much smaller. The map may
be of any size; a last window that it does not fill is filled with such zeros. Padding is something else: no place at
all.

b (H, 2 w + 2 h - 1, ...) is learned, one number per head and offset; entry w + h - 1 is offset 0 of key - query.
The published table has as many rows, indexed by ((d + 2 - W) (w + W - 1) + e + 2 - W) modulo its length for an offset
(d, e) counted from entry 0 here, W = w + 2 h.

Time O(N ((1 + overlap) w)^axes D H), no state.

Source: Chen et al., "Activating More Pixels in Image Super-Resolution Transformer", 2022 (arXiv:2205.04437), official
code XPixelGroup/HAT.

In shape suffixes: B batch, H query heads, G key/value heads, N tokens, M places of the framed map, R axes, D head size,
E value size, L windows, W places of a window of queries, V of keys.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attlas.core.errors import BadInput
from attlas.core.grid import Grid
from attlas.core.mask import Mask
from attlas.core.mechanism import Attend, Call, Cost, Site, Sizes
from attlas.core.registry import register
from attlas.core.spec import Example, Pattern, Spec
from attlas.ops.softmax import blank_padding, softmax_attention
from attlas.ops.windows import per_axis

SHELL_PARAMETERS = 4 * (16 * 16 + 16)

SPEC = Spec(
    name="hat",
    title="Activating More Pixels in Image Super-Resolution Transformer",
    year=2022,
    paper="arXiv:2205.04437",
    equation="o = softmax over a window larger than that of the queries of (q kᵀ / √D + b) v",
    complexity="O(N w D) time",
    patterns=frozenset({Pattern.NONCAUSAL_SELF}),
    prefix=False,
    grouped=True,
    examples=(
        Example(grid=(6, 4), params={"window": 2, "overlap": 1.0}, parameters=SHELL_PARAMETERS + 2 * 5 * 5),
        Example(
            grid=(5, 7),
            heads=4,
            kv_heads=2,
            params={"window": 4},
            parameters=2 * (16 * 16 + 16) + 2 * (16 * 8 + 8) + 4 * 9 * 9,
        ),
        Example(grid=(11,), params={"window": (4,), "overlap": 0.0}, parameters=SHELL_PARAMETERS + 2 * 7),
        Example(grid=(3, 2, 4), params={"window": 2, "overlap": 1.0}, parameters=SHELL_PARAMETERS + 2 * 5 * 5 * 5),
    ),
)


@register(SPEC)
class Hat(Attend):
    """Attention of windows to larger windows around them.

    Args:
        site: where it is installed; its grid says how many axes there are, two where it has none.
        backend: of `softmax_attention`.
        window: w, places on every axis, or one number per axis.
        overlap: by which share of it a window of keys is longer; half of that must be whole places.
        scale: of the scores; D ** -0.5 by default.
    """

    def __init__(
        self,
        site: Site,
        backend: str = "auto",
        *,
        window: int | Sequence[int] = 16,
        overlap: float = 0.5,
        scale: float | None = None,
    ) -> None:
        super().__init__(site, backend)
        self.window = per_axis("window", window, 2 if site.grid is None else site.grid.rank)
        if min(self.window) < 1:
            raise BadInput(f"a window holds a place at least, got window {window}")
        if overlap < 0 or any(overlap * each % 2 for each in self.window):
            raise BadInput(
                f"a window of keys reaches equally far beyond both sides: overlap x window is an even number of "
                f"places, got overlap {overlap} and window {window}"
            )
        self.halo = tuple(int(overlap * each) // 2 for each in self.window)
        self.scale = scale
        self.relative_bias = nn.Parameter(torch.empty(site.heads, *(2 * each - 1 for each in self._reach())))
        nn.init.trunc_normal_(self.relative_bias, std=0.02)

    def _reach(self) -> list[int]:
        """One more than the largest offset on each axis."""
        return [window + halo for window, halo in zip(self.window, self.halo, strict=True)]

    def _check_grid(self, grid: Grid) -> None:
        if grid.rank != len(self.window):
            raise BadInput(
                f"the bias was built for {len(self.window)} axes, the call has a {grid}; build the layer with a grid "
                f"of {grid.rank} axes"
            )

    def compute(self, q_BHND: Tensor, k_BGMD: Tensor, v_BGME: Tensor, call: Call) -> Tensor:
        """One softmax per window, over windows laid side by side in the batch."""
        grid, keep = call.grid, call.mask.keys
        self._check_grid(grid)
        batch, none = len(q_BHND), (0,) * len(self.window)
        k_BGMD, v_BGME = blank_padding(keep, k_BGMD, v_BGME)
        mask = Mask.biased(self._bias().to(q_BHND.dtype))
        if keep is not None:
            real = (~self._cut((~keep)[:, None, :, None], grid, self.halo)).flatten(1)
            mask = mask & Mask.padding(real)
        o = softmax_attention(
            self._cut(q_BHND, grid, none),
            self._cut(k_BGMD, grid, self.halo),
            self._cut(v_BGME, grid, self.halo),
            mask,
            scale=self.scale,
            backend=self.backend,
        )
        return self._join(o.unflatten(0, (batch, -1)), grid)

    def _cut(self, x_BHNE: Tensor, grid: Grid, halo: Sequence[int]) -> Tensor:
        """Windows with so many places beyond either side, zeros beyond the border: (B L, H, V, E)."""
        x = grid.unflatten(x_BHNE)
        axes = zip(halo, grid.shape, self.window, strict=True)
        ends = [(each, each + -length % window) for each, length, window in axes]
        x = F.pad(x, (0, 0, *(end for pair in reversed(ends) for end in pair)))
        for axis, (window, each) in enumerate(zip(self.window, halo, strict=True), 2):
            x = x.unfold(axis, window + 2 * each, window)
        rank = grid.rank
        x = x.permute(0, *range(2, 2 + rank), 1, *range(3 + rank, 3 + 2 * rank), 2 + rank)
        return x.flatten(2 + rank, -2).flatten(0, rank)

    def _join(self, o_BLHWE: Tensor, grid: Grid) -> Tensor:
        """The places of all windows in raster order, without those beyond the border."""
        counts = [-(-length // window) for length, window in zip(grid.shape, self.window, strict=True)]
        rank = grid.rank
        o = o_BLHWE.unflatten(1, counts).unflatten(-2, self.window)  # (B, windows..., H, places..., E)
        pairs = [axis for each in range(rank) for axis in (1 + each, 2 + rank + each)]
        o = o.permute(0, 1 + rank, *pairs, 2 + 2 * rank)
        for axis, length in enumerate(grid.shape, 2):
            o = o.flatten(axis, axis + 1).narrow(axis, 0, length)
        return o.flatten(2, -2)

    def _bias(self) -> Tensor:
        """The bias of each pair of one window, (1, H, W, V)."""
        bias: Tensor = self.relative_bias
        for axis, (window, halo) in enumerate(zip(self.window, self.halo, strict=True)):
            query = torch.arange(window, device=bias.device)
            key = torch.arange(window + 2 * halo, device=bias.device)
            entry_WV = key - query.unsqueeze(1) + window - 1
            bias = bias.movedim(1 + axis, -1)[..., entry_WV].movedim((-2, -1), (1 + axis, 2 + axis))
            bias = bias.movedim(2 + axis, -1)  # queries' axes stay in front, keys' gather at the end
        rank = len(self.window)
        return bias.flatten(1 + rank).flatten(1, rank).unsqueeze(0)

    def oracle(self, q_BHND: Tensor, k_BGMD: Tensor, v_BGME: Tensor, call: Call) -> Tensor:
        """Dense scores to all places of a map with a frame of zeros, under the mask of the window of each query."""
        grid, keep = call.grid, call.mask.keys
        self._check_grid(grid)
        k_BGMD, v_BGME = blank_padding(keep, k_BGMD, v_BGME)
        batch, heads = q_BHND.shape[:2]
        repeats = heads // k_BGMD.shape[1]
        frame = [window + halo for window, halo in zip(self.window, self.halo, strict=True)]
        framed = Grid(tuple(length + 2 * edge for length, edge in zip(grid.shape, frame, strict=True)))
        place_NR, other_MR = grid.places(q_BHND.device), framed.places(q_BHND.device)
        other_MR = other_MR - torch.tensor(frame, device=q_BHND.device)
        inside_M = torch.ones(len(other_MR), dtype=torch.bool, device=q_BHND.device)
        for axis, length in enumerate(grid.shape):
            inside_M &= (other_MR[:, axis] >= 0) & (other_MR[:, axis] < length)

        def laid(x: Tensor) -> Tensor:
            wide = x.new_zeros(batch, heads, len(other_MR), x.shape[-1])
            wide[:, :, inside_M] = x.repeat_interleave(repeats, 1)
            return wide

        seen = torch.ones(len(place_NR), len(other_MR), dtype=torch.bool, device=q_BHND.device)
        index: tuple[Any, ...] = (slice(None),)
        for axis, (window, halo) in enumerate(zip(self.window, self.halo, strict=True)):
            first = place_NR[:, axis, None] // window * window
            key = other_MR[None, :, axis]
            seen &= (key >= first - halo) & (key < first + window + halo)
            offset = key - place_NR[:, axis, None]
            index += ((offset + window + halo - 1).clamp(0, 2 * (window + halo) - 2),)
        scale = q_BHND.shape[-1] ** -0.5 if self.scale is None else self.scale
        scores = torch.einsum("bhnd,bhmd->bhnm", q_BHND, laid(k_BGMD)) * scale
        scores = scores + self.relative_bias.to(scores)[index]
        seen = seen.expand(len(q_BHND), 1, -1, -1)
        if keep is not None:
            gone = torch.zeros(len(keep), len(other_MR), dtype=torch.bool, device=keep.device)
            gone[:, inside_M] = ~keep
            seen = seen & ~gone[:, None, None]
        weights = scores.exp() * seen
        return torch.einsum("bhnm,bhme->bhne", weights, laid(v_BGME)) / weights.sum(-1, keepdim=True).clamp(min=1e-30)

    def count(self, sizes: Sizes) -> Cost:
        """Two products per pair on the map; the torch backend also multiplies the zeros beyond its border."""
        grid, heads = sizes.grid, sizes.batch * self.site.heads
        self._check_grid(grid)
        pairs, windows = 1, 1
        for length, window, halo in zip(grid.shape, self.window, self.halo, strict=True):
            starts = range(0, length, window)
            keys = [min(length, start + window + halo) - max(0, start - halo) for start in starts]
            pairs *= sum(min(window, length - start) * seen for start, seen in zip(starts, keys, strict=True))
            windows *= len(starts) * window * (window + 2 * halo)
        size = 4 * heads * self.site.head_dim
        return Cost(size * pairs, size * windows, heads * pairs)
