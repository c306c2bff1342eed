"""Norms by the layout of what they see: tokens (B, N, C) or maps (B, C, H, W)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class MapLayerNorm(nn.LayerNorm):
    """LayerNorm over the channels of each place of a map (B, C, H, W)."""

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Normalise."""
        return super().forward(x_BCHW.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class TokenGroupNorm(nn.Module):
    """One group over all tokens and channels of a picture, with a weight and a bias per channel.

    Source: "modified LayerNorm" of PoolFormer (arXiv:2111.11418).
    """

    def __init__(self, dim: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(1, dim, eps)

    def forward(self, x_BNC: Tensor) -> Tensor:
        """Normalise."""
        norm = self.norm
        return F.group_norm(x_BNC.transpose(1, 2), 1, norm.weight, norm.bias, norm.eps).transpose(1, 2)
