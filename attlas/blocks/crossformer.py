"""What CrossFormer has around its attention: embeddings of several scales, and layers that cool activations.

B batch, N tokens, C channels, H and W height and width.

Sources: Wang et al., "CrossFormer", 2021 (arXiv:2108.00154) and "CrossFormer++", 2023 (arXiv:2303.06908), official code
cheerss/CrossFormer.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from attlas.blocks.embed import MapNorm, filled
from attlas.core.errors import BadInput
from attlas.core.grid import Grid
from attlas.ops.grid_conv import depthwise, grid_convolution


class CrossScale(nn.Module):
    """norm([conv₁(norm x); conv₂(norm x); ...]): convolutions of one stride and several kernels side by side.

    Each gives half the channels of the one before it, the last two as many; sides that the stride does not divide are
    filled up with zeros.

    Args:
        dim, out: channels in and out.
        kernels: smallest first, an even number larger than the stride or equal to it.
        stride: of all.
        before, after: make norms over the channels of a map.
    """

    def __init__(
        self,
        dim: int,
        out: int,
        kernels: Sequence[int],
        stride: int,
        *,
        before: MapNorm | None = None,
        after: MapNorm | None = None,
    ) -> None:
        super().__init__()
        if not kernels or stride < 1:
            raise BadInput(f"a kernel at least and a stride of at least 1, got {tuple(kernels)} and {stride}")
        if any(kernel < stride or (kernel - stride) % 2 for kernel in kernels):
            raise BadInput(f"kernels are centred on patches of {stride} places, got {tuple(kernels)}")
        halvings = [*range(1, len(kernels)), len(kernels) - 1]
        if out % 2 ** halvings[-1]:
            raise BadInput(f"{len(kernels)} kernels halve the channels {halvings[-1]} times, got {out} channels")
        self.stride = stride
        self.before = nn.Identity() if before is None else before(dim)
        self.convs = nn.ModuleList(
            nn.Conv2d(dim, out // 2**times, kernel, stride, (kernel - stride) // 2)
            for kernel, times in zip(kernels, halvings, strict=True)
        )
        self.after = nn.Identity() if after is None else after(out)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """A smaller map."""
        x_BCHW = filled(self.before(x_BCHW), self.stride)
        return self.after(torch.cat([conv(x_BCHW) for conv in self.convs], 1))


class Cooling(nn.Module):
    """norm(conv(x)) with a depthwise convolution over the grid, and no residual path: what has grown is forgotten."""

    def __init__(self, dim: int, kernel: int = 3) -> None:
        super().__init__()
        self.conv = depthwise(dim, kernel, 2)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x_BNC: Tensor, grid: Grid) -> Tensor:
        """Tokens of a size that does not depend on how deep they are."""
        return self.norm(grid_convolution(x_BNC, self.conv.weight, self.conv.bias, grid))
