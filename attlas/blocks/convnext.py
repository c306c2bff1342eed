"""The ConvNeXt block: a large depthwise convolution, a norm and an MLP on one residual path.

    y = x + s ⊙ W₂ GELU(W₁ LN(conv₇ x))

B batch, C channels, H and W height and width.

Source: Liu et al., "A ConvNet for the 2020s", 2022 (arXiv:2201.03545), official code facebookresearch/ConvNeXt.
"""

from __future__ import annotations

from torch import Tensor, nn

from attlas.blocks.drop_path import DropPath
from attlas.blocks.layer_scale import LayerScale
from attlas.blocks.mlp import Mlp


class ConvNeXtBlock(nn.Module):
    """The block, on maps.

    Args:
        dim: C.
        kernel: of the convolution.
        ratio: how many times wider the MLP is.
        scale: starting value of s; None for none.
        drop_path: the share of pictures for which the branch is dropped in training.
    """

    def __init__(
        self, dim: int, *, kernel: int = 7, ratio: int = 4, scale: float | None = 1e-6, drop_path: float = 0.0
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, kernel, padding=kernel // 2, groups=dim)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, ratio * dim)
        self.scale = nn.Identity() if scale is None else LayerScale(dim, scale)
        self.drop_path = DropPath(drop_path)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Add what the neighbourhood says."""
        y_BHWC = self.scale(self.mlp(self.norm(self.conv(x_BCHW).permute(0, 2, 3, 1))))
        return x_BCHW + self.drop_path(y_BHWC.permute(0, 3, 1, 2))
