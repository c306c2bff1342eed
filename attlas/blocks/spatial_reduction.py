"""Spatial-reduction attention: keys and values are made of a coarser picture.

B batch, N queries, M keys, C channels, S... grid axes.
"""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, nn

from attlas.blocks.attention import Attention
from attlas.core.errors import BadInput, Unsupported
from attlas.core.grid import Grid
from attlas.core.mechanism import Attend, Call, Cost, Sizes


class SpatialReduction(Attention):
    """The shell of PVT: y = W_o attend(W_q x, W_k z, W_v z) with z = LayerNorm(conv(x)).

    The convolution has `reduction` taps on each axis and as long steps: M is N / reduction². A reduced key is made of
    several tokens and stands at no position: prefix tokens, masks of any kind and positions are refused.

    >>> import attlas
    >>> attend = attlas.make_attend("agent", 2, 8, grid=(8, 8), agents=9, reduction=4)
    >>> layer = SpatialReduction(attend, reduction=4)

    Args:
        attend: a noncausal mechanism that takes fewer keys than queries, such as `softmax`, or `agent` with the same
            reduction; its site names the grid.
        reduction: positions that become one key, on each axis.
        **shell: settings of `Attention`, without a position.

    Source: Wang et al., "Pyramid Vision Transformer", 2021 (arXiv:2102.12122), official code whai362/PVT.
    """

    def __init__(self, attend: Attend, *, reduction: int, **shell: Any) -> None:
        if shell.get("position") is not None:
            raise BadInput(
                f"a reduced key stands at no position, so that {type(shell['position']).__name__} has no place here: "
                "leave position away, and add positions to the tokens before the layer"
            )
        super().__init__(attend, **shell)
        grid, dim = attend.site.grid, attend.site.dim
        if grid is None or attend.site.causal:
            raise BadInput("keys are reduced on a picture: build a noncausal attend with grid=(height, width)")
        if not isinstance(reduction, int) or reduction < 1:
            raise BadInput(f"reduction is a whole number, at least 1, got {reduction}")
        self.reduction, self.rank = reduction, grid.rank
        conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[grid.rank - 1]
        self.reduce = conv(dim, dim, reduction, stride=reduction)
        self.reduce_norm = nn.LayerNorm(dim)

    def compute(self, x_BNC: Tensor, context_BMC: Tensor | None, call: Call) -> Tensor:
        """Reduce, project, attend, merge."""
        grid = call.grid
        self._key_shape(grid)
        mask = call.mask
        if call.cross or mask.causal or any(x is not None for x in (mask.keys, mask.queries, mask.rule, mask.bias)):
            raise Unsupported(
                "spatial reduction serves self-attention without padding, causality, visibility rules and biases: a "
                f"reduced key is made of several tokens; for those take attlas.mixer({self.spec.name!r}, ...)"
            )
        z_BCS = self.reduce(grid.unflatten(x_BNC.mT, -1))
        q, k, v = self._project(x_BNC, self.reduce_norm(z_BCS.flatten(2).mT), 0)
        o = self.attend(q, k, v, grid=grid, tokens=x_BNC)
        return self._merge(o, x_BNC)

    oracle = compute  # the attend has the oracle

    def _key_shape(self, grid: Grid) -> tuple[int, ...]:
        if grid.rank != self.rank or grid.prefix or min(grid.shape) < self.reduction:
            raise BadInput(
                f"this layer reduces {self.rank} axes without prefix tokens by {self.reduction} each, got a {grid}"
            )
        return tuple(length // self.reduction for length in grid.shape)

    def count(self, sizes: Sizes) -> Cost:
        """The convolution, then the shell with fewer keys."""
        keys = math.prod(self._key_shape(sizes.grid))
        dim = self.site.dim
        conv = 2 * sizes.batch * keys * self.reduction**self.rank * dim * dim
        return super().count(Sizes(sizes.batch, sizes.queries, keys, sizes.grid)) + Cost(conv, conv)
