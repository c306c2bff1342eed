"""A large depthwise convolution with small dilated ones beside it, which are one convolution after training.

    y = Σ_i BN_i(conv_i(x)),   conv_0 of K x K taps, the others of k x k taps r apart with r (k - 1) < K

B batch, N tokens, C channels.

Source: Ding et al., "UniRepLKNet: A Universal Perception Large-Kernel ConvNet", 2023 (arXiv:2311.15599), official code
AILab-CVC/UniRepLKNet.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from attlas.core.errors import BadInput
from attlas.core.grid import Grid
from attlas.ops.batch_norm import TokenBatchNorm, scale_and_shift
from attlas.ops.maps import to_map, to_tokens

BRANCHES: Mapping[int, tuple[tuple[int, int], ...]] = {
    5: ((3, 1), (3, 2)),
    7: ((5, 1), (3, 1), (3, 2), (3, 3)),
    9: ((5, 1), (7, 1), (5, 2), (3, 3), (3, 4)),
    11: ((5, 1), (7, 1), (5, 2), (3, 3), (3, 4), (3, 5)),
    13: ((5, 1), (7, 1), (7, 2), (3, 3), (3, 4), (3, 5)),
    15: ((5, 1), (7, 1), (7, 2), (3, 3), (3, 5), (3, 7)),
    17: ((5, 1), (7, 1), (9, 2), (3, 4), (3, 5), (3, 7)),
}
"""Taps and their distance in the branches beside a large kernel."""


class DilatedReparam(nn.Module):
    """The branches, or once `fused` the one convolution that they are; see `attlas.blocks.conv_norm.fuse`.

    Args:
        dim: C.
        kernel: K, an odd number from 5 to 17.
    """

    def __init__(self, dim: int, kernel: int) -> None:
        super().__init__()
        if kernel not in BRANCHES:
            raise BadInput(f"kernel is one of {', '.join(map(str, BRANCHES))}, got {kernel}")
        self.convs: Any = nn.ModuleList(
            nn.Conv2d(dim, dim, k, padding=r * (k - 1) // 2, dilation=r, groups=dim, bias=False)
            for k, r in ((kernel, 1), *BRANCHES[kernel])
        )
        self.norms: Any = nn.ModuleList(TokenBatchNorm(dim) for _ in self.convs)
        self.merged: nn.Conv2d | None = None

    def forward(self, x_BNC: Tensor, grid: Grid) -> Tensor:
        """Convolve over the grid."""
        x_BCHW = to_map(x_BNC, grid)
        if self.merged is not None:
            return to_tokens(self.merged(x_BCHW))[0]
        branches = zip(self.convs, self.norms, strict=True)
        return torch.stack([norm(to_tokens(conv(x_BCHW))[0]) for conv, norm in branches]).sum(0)

    @torch.no_grad()
    def fused(self) -> DilatedReparam:
        """This, become one convolution with the running statistics as they are; it cannot be undone."""
        if self.merged is not None:
            return self
        large = self.convs[0]
        kernel = large.kernel_size[0]
        weight, bias = torch.zeros_like(large.weight), torch.zeros_like(large.weight[:, 0, 0, 0])
        for conv, norm in zip(self.convs, self.norms, strict=True):
            factor, shift = scale_and_shift(norm)
            (taps, _), (step, _) = conv.kernel_size, conv.dilation
            edge = (kernel - 1 - step * (taps - 1)) // 2
            weight[:, :, edge : kernel - edge : step, edge : kernel - edge : step] += (
                conv.weight * factor[:, None, None, None]
            )
            bias += shift
        self.merged = nn.Conv2d(len(weight), len(weight), kernel, padding=kernel // 2, groups=len(weight)).to(weight)
        assert self.merged.bias is not None
        self.merged.weight.copy_(weight)
        self.merged.bias.copy_(bias)
        self.convs, self.norms = nn.ModuleList(), nn.ModuleList()
        return self

    def flops(self, grid: Grid) -> tuple[int, int]:
        """FLOPs of one picture: taps that fall on the grid, and all that torch multiplies."""
        convs: list[Any] = [self.merged] if self.merged is not None else list(self.convs)
        on_grid = multiplied = 0
        for conv in convs:
            (taps, _), (step, _) = conv.kernel_size, conv.dilation
            fallen = 1
            for length in grid.shape:
                offsets = [step * (tap - taps // 2) for tap in range(taps)]
                fallen *= sum(max(0, length - abs(offset)) for offset in offsets)
            on_grid += fallen
            multiplied += grid.positions * taps * taps
        dim = convs[0].in_channels
        return 2 * dim * on_grid, 2 * dim * multiplied
