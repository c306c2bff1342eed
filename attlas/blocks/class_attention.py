"""Class attention: only the class token is renewed, from all tokens; the others stay as they are.

    c ← c + mixer(norm [c; x])_0,    c ← c + MLP(norm c)

The mechanism `crossvit`, whose one query is the class token, is CaiT's class attention.

B batch, N patches, C channels.

Source: Touvron et al., "Going deeper with Image Transformers", 2021 (arXiv:2103.17239).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from attlas.blocks.drop_path import DropPath
from attlas.blocks.metaformer import Norm
from attlas.core.grid import Grid
from attlas.core.mechanism import Mixer


class ClassBlock(nn.Module):
    """The block.

    Args:
        mixer: of tokens; of its output only the row of the class token is read.
        mlp: of channels.
        norm: makes a norm over C channels of tokens.
        drop_path: the share of pictures for which a branch is dropped in training.
    """

    def __init__(self, mixer: Mixer, mlp: nn.Module, *, norm: Norm = nn.LayerNorm, drop_path: float = 0.0) -> None:
        super().__init__()
        self.norm1, self.norm2 = norm(mixer.site.dim), norm(mixer.site.dim)
        self.mixer, self.mlp = mixer, mlp
        self.drop_path = DropPath(drop_path)

    def forward(self, x_BNC: Tensor, grid: Grid) -> Tensor:
        """Class token first, (B, 1 + N, C)."""
        class_B1C = x_BNC[:, :1] + self.drop_path(self.mixer(self.norm1(x_BNC), grid=grid)[:, :1])
        class_B1C = class_B1C + self.drop_path(self.mlp(self.norm2(class_B1C)))
        return torch.cat([class_B1C, x_BNC[:, 1:]], 1)
