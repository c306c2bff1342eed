"""Window attention (DaViT): windows that touch, without bias and without shift.

    o_n = Σ_m softmax_m(q_n · k_m / √D) v_m     over the m in the window of n

q (B, H, N, D), k (B, G, N, D), v (B, G, N, E). The grid is cut into windows of `window` places on every axis and a
query sees its own. Nothing leaves a window: in DaViT that is left to `davit_channel`, the other half of its dual
attention, and where tokens stand to the 3 x 3 convolutions of the block around.

Where sizes do not divide the last window is smaller, and an axis shorter than a window is one. Published code pads
the map with zeros after the norm instead, and there lets their keys, the bias of the projection, take part.

Prefix tokens see every token and every token sees them, in the same softmax; the paper has none.

Time O(N w^axes D H), no parameters, no state.

Source: Ding et al., "DaViT: Dual Attention Vision Transformers", 2022 (arXiv:2204.03645), official code
dingmyu/davit, in classification as ported to timm.
"""

from collections.abc import Sequence

from torch import Tensor

from attlas.core.axis import Block
from attlas.core.errors import BadInput
from attlas.core.grid import Grid
from attlas.core.mechanism import Attend, Call, Cost, Site, Sizes
from attlas.core.registry import register
from attlas.core.spec import Example, Pattern, Spec
from attlas.ops.neighborhood import neighborhood_attention
from attlas.ops.windows import block_cost, per_axis

SPEC = Spec(
    name="davit_window",
    title="DaViT: Dual Attention Vision Transformers",
    year=2022,
    paper="arXiv:2204.03645",
    equation="o = softmax over the window of (q kᵀ / √D) v",
    complexity="O(N w D) time",
    patterns=frozenset({Pattern.NONCAUSAL_SELF}),
    grouped=True,
    examples=(
        Example(grid=(4, 6), params={"window": 2}, parameters=4 * (16 * 16 + 16)),
        Example(
            grid=(5, 4),
            prefix=1,
            heads=4,
            kv_heads=2,
            params={"window": (3, 7)},
            parameters=2 * (16 * 16 + 16) + 2 * (16 * 8 + 8),
        ),
        Example(grid=(2, 3, 3), params={"window": 2}, parameters=4 * (16 * 16 + 16)),
    ),
)


@register(SPEC)
class DavitWindow(Attend):
    """Attention in windows.

    Args:
        site: where it is installed.
        backend: of `neighborhood_attention`.
        window: places on every axis, or one number per axis.
        scale: of the scores; D ** -0.5 by default.
    """

    def __init__(
        self, site: Site, backend: str = "auto", *, window: int | Sequence[int] = 7, scale: float | None = None
    ) -> None:
        super().__init__(site, backend)
        if min(window if isinstance(window, Sequence) else (window,)) < 1:
            raise BadInput(f"a window holds a place at least, got window {window}")
        self.window = window
        self.scale = scale
        if site.grid is not None:
            self._axes(site.grid)

    def _axes(self, grid: Grid) -> tuple[Block, ...]:
        """The rule of each axis."""
        windows = per_axis("window", self.window, grid.rank)
        return tuple(Block(length, min(length, window)) for length, window in zip(grid.shape, windows, strict=True))

    def compute(self, q_BHND: Tensor, k_BGMD: Tensor, v_BGME: Tensor, call: Call) -> Tensor:
        """Run the op."""
        return neighborhood_attention(
            q_BHND,
            k_BGMD,
            v_BGME,
            self._axes(call.grid),
            prefix=call.grid.prefix,
            keep=call.mask.keys,
            scale=self.scale,
            backend=self.backend,
        )

    oracle = compute  # the op's own oracle backend

    def count(self, sizes: Sizes) -> Cost:
        """Two products per visible pair."""
        return block_cost(self.site, sizes, self._axes(sizes.grid))
