"""The shell of attention with locally enhanced positions: a depthwise convolution stands beside the attention.

B batch, N tokens, C channels, H heads, D head size.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from attlas.blocks.attention import Attention
from attlas.core.errors import BadInput
from attlas.core.mechanism import Attend, Call, Cost, Sizes
from attlas.ops.grid_conv import convolution_flops, convolve_values, depthwise, grid_convolution
from attlas.ops.rotary import rotate_axes

SOURCES = ("values", "tokens", "projection")


class LocallyEnhanced(Attention):
    """y = W_o (gate(x) ⊙ norm(attend(R q, R k, v) + conv(u))), for mechanisms that have no such term themselves.

    u is v in CSWin and RAVLT, x in the last stage of BiFormer, W_u x in that of SG-Former. R turns neighbouring
    features by their places on the grid, an equal share for each axis. Prefix tokens stand at place 0 and have no
    convolution.

    >>> import attlas
    >>> layer = LocallyEnhanced(attlas.make_attend("softmax", 2, 8, grid=(4, 4)), turned=True)

    Args:
        attend: a noncausal mechanism; its site names the grid.
        of: "values", "tokens" or "projection": what u is.
        kernel: taps of the convolution on each axis, odd.
        turned: whether queries and keys are turned by R.
        **shell: settings of `Attention`.

    Source: Dong et al., "CSWin Transformer", 2021 (arXiv:2107.00652), which names the term LePE.
    """

    def __init__(
        self, attend: Attend, *, of: str = "values", kernel: int = 5, turned: bool = False, **shell: Any
    ) -> None:
        super().__init__(attend, **shell)
        site = attend.site
        if of not in SOURCES:
            raise BadInput(f"what is convolved is one of {', '.join(SOURCES)}, got of={of!r}")
        if site.grid is None or site.causal or site.kv_heads != site.heads:
            raise BadInput(
                "the convolution is over a picture, of as many heads as queries have: build a noncausal attend with "
                "grid=(height, width) and no kv_heads"
            )
        width = site.heads * site.head_dim
        if of == "tokens" and width != site.dim:
            raise BadInput(f"tokens of {site.dim} channels cannot be added to heads of {width}: take of='projection'")
        self.of, self.kernel, self.turned = of, kernel, turned
        self.local_proj = nn.Linear(site.dim, width) if of == "projection" else None
        self.conv = depthwise(width, kernel, site.grid.rank)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, x_BNC: Tensor, call: Call) -> Tensor:
        """Turn, attend, and add the convolution."""
        if call.cross:
            raise self._unsupported("a second sequence beside a convolution of the first")
        if self.turned:
            places_NR = F.pad(call.grid.places(x_BNC.device), (0, 0, call.grid.prefix, 0))
            q, k = rotate_axes(q, places_NR), rotate_axes(k, places_NR)
        return super()._attend(q, k, v, x_BNC, call) + self._local(x_BNC, v, call)

    def _local(self, x_BNC: Tensor, v_BHND: Tensor, call: Call) -> Tensor:
        """The convolution as heads (B, H, N, D)."""
        backend = "oracle" if self.backend == "oracle" else "auto"
        if self.of == "values":
            return convolve_values(self.conv, v_BHND, call.grid, call.mask.keys, backend)
        u_BNC = x_BNC if self.local_proj is None else self.local_proj(x_BNC)
        y_BNC = grid_convolution(u_BNC, self.conv.weight, self.conv.bias, call.grid, call.mask.keys, backend=backend)
        return y_BNC.unflatten(-1, (self.site.heads, -1)).transpose(1, 2)

    def count(self, sizes: Sizes) -> Cost:
        """The shell, the convolution's taps that fall on the grid, and the projection before it."""
        width = self.site.heads * self.site.head_dim
        on_grid, multiplied = (sizes.batch * width * taps for taps in convolution_flops(sizes.grid, self.kernel))
        linear = 0 if self.local_proj is None else 2 * sizes.batch * sizes.queries * width * self.site.dim
        return super().count(sizes) + Cost(on_grid + linear, multiplied + linear)
