"""Shifted-window attention (Swin): windows that touch, and in every second layer lie half a window further.

    o_n = Σ_m softmax_m(q_n · k_m / √D + b_(m - n)) v_m     over the m in the window of n

q (B, H, N, D), k (B, G, N, D), v (B, G, N, E). The grid is cut into windows of `window` places on every axis; a
query sees its own. Where the shift is s the first border lies at s: what the published code gets by rolling the
map by s and masking, in the windows that then hold two ends of it, the pairs from different ends. So the windows
at both ends are smaller, no pair is computed in vain, and sizes need not divide; official code for other sizes
lets zero padding take part, here there is none. Two layers, one shifted, connect what no window holds together.

b (H, 2 window - 1, ...) is learned, one number per head and offset; entry `window - 1` is offset 0 and offsets
are key - query (published tables are query - key: flip every axis). An axis, of the site's grid or of the call's, that
is no longer than a window is one window and is not shifted; others keep their window and shift. So does the code of
Video Swin, which is three axes; that of Swin, where the shorter axis fits into a window, makes both windows so long and
shifts neither.

Prefix tokens see every token and every token sees them, in the same softmax and without bias; the paper has none.

Time O(N w^axes D H), no state.

Source: Liu et al., "Swin Transformer: Hierarchical Vision Transformer using Shifted Windows", 2021
(arXiv:2103.14030), official code microsoft/Swin-Transformer.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from attlas.core.axis import Block
from attlas.core.errors import BadInput
from attlas.core.grid import Grid
from attlas.core.mechanism import Attend, Call, Cost, Site, Sizes
from attlas.core.registry import register
from attlas.core.spec import Example, Pattern, Spec
from attlas.ops.neighborhood import neighborhood_attention
from attlas.ops.windows import block_cost, per_axis

SHELL_PARAMETERS = 4 * (16 * 16 + 16)

SPEC = Spec(
    name="swin",
    title="Swin Transformer: Hierarchical Vision Transformer using Shifted Windows",
    year=2021,
    paper="arXiv:2103.14030",
    equation="o = softmax over the window of (q kᵀ / √D + b) v, windows shifted in every second layer",
    complexity="O(N w D) time",
    patterns=frozenset({Pattern.NONCAUSAL_SELF}),
    grouped=True,
    examples=(
        Example(grid=(6, 4), params={"window": 3, "shift": 1}, parameters=SHELL_PARAMETERS + 2 * 5 * 5),
        Example(
            grid=(5, 4),
            prefix=1,
            heads=4,
            kv_heads=2,
            params={"window": (2, 4)},
            parameters=2 * (16 * 16 + 16) + 2 * (16 * 8 + 8) + 4 * 3 * 7,
        ),
        Example(grid=(11,), params={"window": 4, "shift": 2}, parameters=SHELL_PARAMETERS + 2 * 7),
        Example(
            grid=(3, 2, 4),
            params={"window": (2, 7, 2), "shift": (1, 3, 1)},
            parameters=SHELL_PARAMETERS + 2 * 3 * 3 * 3,
        ),
    ),
)


@register(SPEC)
class Swin(Attend):
    """Attention in windows, shifted in odd layers.

    Args:
        site: where it is installed; its layer says whether windows are shifted, its grid how many axes there are
            (two where it has none).
        backend: of `neighborhood_attention`.
        window: places on every axis, or one number per axis.
        shift: where the first border lies, less than the window, or one number per axis. By default half the
            window, rounded down, in layers 1, 3, 5 ... and 0 in the others.
        scale: of the scores; D ** -0.5 by default.
    """

    def __init__(
        self,
        site: Site,
        backend: str = "auto",
        *,
        window: int | Sequence[int] = 7,
        shift: int | Sequence[int] | None = None,
        scale: float | None = None,
    ) -> None:
        super().__init__(site, backend)
        rank = 2 if site.grid is None else site.grid.rank
        windows = per_axis("window", window, rank)
        if min(windows) < 1:
            raise BadInput(f"a window holds a place at least, got window {window}")
        lengths = windows if site.grid is None else site.grid.shape
        self.window = tuple(min(pair) for pair in zip(windows, lengths, strict=True))
        if shift is None:
            self.shift = tuple(each // 2 * (site.layer % 2) for each in self.window)
        else:
            self.shift = per_axis("shift", shift, rank)
        for each, largest in zip(self.shift, windows, strict=True):
            if not 0 <= each < largest:
                raise BadInput(
                    f"shift {each} is not in 0 to window - 1; with window {largest} take it modulo {largest}"
                )
        self.scale = scale
        self.relative_bias = nn.Parameter(torch.empty(site.heads, *(2 * each - 1 for each in self.window)))
        nn.init.trunc_normal_(self.relative_bias, std=0.02)

    def _axes(self, grid: Grid) -> tuple[Block, ...]:
        """The rule of each axis; one that fits into a window is not shifted."""
        if grid.rank != len(self.window):
            raise BadInput(
                f"the bias was built for {len(self.window)} axes, the call has a {grid}; build the layer with a grid "
                f"of {grid.rank} axes"
            )
        return tuple(
            Block(length, min(window, length), shift if window < length else 0)
            for length, window, shift in zip(grid.shape, self.window, self.shift, strict=True)
        )

    def compute(self, q_BHND: Tensor, k_BGMD: Tensor, v_BGME: Tensor, call: Call) -> Tensor:
        """Run the op, with the offsets that its windows have."""
        axes = self._axes(call.grid)
        bias: Tensor = self.relative_bias
        for number, (axis, window) in enumerate(zip(axes, self.window, strict=True), 1):
            bias = bias.narrow(number, window - axis.window, 2 * axis.window - 1)
        return neighborhood_attention(
            q_BHND,
            k_BGMD,
            v_BGME,
            axes,
            prefix=call.grid.prefix,
            keep=call.mask.keys,
            bias=bias,
            scale=self.scale,
            backend=self.backend,
        )

    oracle = compute  # the op's own oracle backend

    def count(self, sizes: Sizes) -> Cost:
        """Two products per visible pair."""
        return block_cost(self.site, sizes, self._axes(sizes.grid))
