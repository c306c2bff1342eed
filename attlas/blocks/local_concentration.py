"""Local concentration: two large depthwise convolutions that gather what a linear attention spread too wide.

    y = conv₂(BN(GELU(conv₁(x))))

Both convolutions are depthwise, 7 x 7, with a bias. It is a residual branch of its own, after the attention's and
before the MLP's: x = x + lcm(norm(x), grid). See the mechanism `l2vit`.

x (B, N, C) on a grid; 0 comes out for prefix tokens and padding, which enter neither the convolutions nor the
statistics. Time O(N C 98), 2 C (49 + 1) + 2 C parameters.

Source: Zheng, "The Linear Attention Resurrection in Vision Transformer", 2025 (arXiv:2501.16182), official code
ChuanyangZheng/L2ViT. One and three axes are ours.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from attlas.core.errors import BadInput
from attlas.core.grid import Grid
from attlas.core.state import check_keep
from attlas.ops.batch_norm import TokenBatchNorm
from attlas.ops.grid_conv import depthwise, grid_convolution


class LocalConcentration(nn.Module):
    """The local concentration module.

    Args:
        dim: C.
        kernel: taps of both convolutions on each axis, odd.
        axes: of the grid.
    """

    def __init__(self, dim: int, kernel: int = 7, axes: int = 2) -> None:
        super().__init__()
        if not 1 <= axes <= 3:
            raise BadInput(f"a grid has one to three axes, got axes={axes}")
        self.dim = dim
        self.conv1, self.conv2 = (depthwise(dim, kernel, axes) for _ in range(2))
        self.norm = TokenBatchNorm(dim)

    def forward(self, x_BNC: Tensor, grid: Grid | Sequence[int], keep: Tensor | None = None) -> Tensor:
        """What is added to x; `keep` (B, N) marks the real tokens.

        Raises:
            BadInput: shapes that do not fit.
        """
        if x_BNC.ndim != 3 or x_BNC.shape[2] != self.dim:
            raise BadInput(f"x is (batch, tokens, {self.dim} channels), got {tuple(x_BNC.shape)}")
        grid = Grid.of(grid, x_BNC.shape[1])
        keep = check_keep(keep, *x_BNC.shape[:2])
        y = F.gelu(grid_convolution(x_BNC, self.conv1.weight, self.conv1.bias, grid, keep))
        positions = Grid(grid.shape)
        y, keep = grid.split(y)[1], None if keep is None else keep[:, grid.prefix :]
        y = grid_convolution(self.norm(y, keep), self.conv2.weight, self.conv2.bias, positions, keep)
        return F.pad(y, (0, 0, grid.prefix, 0))
