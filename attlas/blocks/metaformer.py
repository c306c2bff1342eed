"""The MetaFormer block: any token mixer, then any channel mixer, each behind a norm and beside a residual path.

    y = x + s₁ ⊙ drop(mixer(norm x)),    z = y + s₂ ⊙ drop(mlp(norm y))

B batch, N tokens, C channels.

Source: Yu et al., "MetaFormer Is Actually What You Need for Vision", 2021 (arXiv:2111.11418).
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from attlas.blocks.drop_path import DropPath
from attlas.blocks.layer_scale import LayerScale
from attlas.core.grid import Grid
from attlas.core.mechanism import Mixer
from attlas.ops.grid_conv import depthwise, grid_convolution

Norm = Callable[[int], nn.Module]


class ConvPosition(nn.Module):
    """x + a depthwise convolution of x over its grid: a conditional position encoding. Prefix tokens stay as they are.

    Source: Chu et al., "Conditional Positional Encodings for Vision Transformers", 2021 (arXiv:2102.10882).
    """

    def __init__(self, dim: int, kernel: int = 3) -> None:
        super().__init__()
        self.conv = depthwise(dim, kernel, 2)

    def forward(self, x_BNC: Tensor, grid: Grid) -> Tensor:
        """Tokens that know their neighbours."""
        return x_BNC + grid_convolution(x_BNC, self.conv.weight, self.conv.bias, grid)


class MetaFormerBlock(nn.Module):
    """The block.

    Args:
        mixer: of tokens.
        mlp: of channels, called with tokens and grid; None for a block without.
        norm: makes a norm over C channels of tokens.
        scale: starting value of the layer scales s₁ and s₂; None for none.
        drop_path: the share of pictures for which a branch is dropped in training.
        positions: whether a 3 x 3 `ConvPosition` stands before the mixer and before the MLP.
        post_norm: whether the norms stand behind mixer and MLP instead of in front of them.
    """

    def __init__(
        self,
        mixer: Mixer,
        mlp: nn.Module | None,
        *,
        norm: Norm = nn.LayerNorm,
        scale: float | None = None,
        drop_path: float = 0.0,
        positions: tuple[bool, bool] = (False, False),
        post_norm: bool = False,
    ) -> None:
        super().__init__()
        dim = mixer.site.dim
        self.post_norm = post_norm
        self.position1 = ConvPosition(dim) if positions[0] else None
        self.norm1 = norm(dim)
        self.mixer = mixer
        self.scale1 = nn.Identity() if scale is None else LayerScale(dim, scale)
        self.drop_path = DropPath(drop_path)
        self.mlp = mlp
        if mlp is not None:
            self.position2 = ConvPosition(dim) if positions[1] else None
            self.norm2 = norm(dim)
            self.scale2 = nn.Identity() if scale is None else LayerScale(dim, scale)

    def forward(self, x_BNC: Tensor, grid: Grid) -> Tensor:
        """Mix tokens, then channels."""
        if self.position1 is not None:
            x_BNC = self.position1(x_BNC, grid)
        before, after = (_same, self.norm1) if self.post_norm else (self.norm1, _same)
        x_BNC = x_BNC + self.drop_path(self.scale1(after(self.mixer(before(x_BNC), grid=grid))))
        if self.mlp is None:
            return x_BNC
        if self.position2 is not None:
            x_BNC = self.position2(x_BNC, grid)
        before, after = (_same, self.norm2) if self.post_norm else (self.norm2, _same)
        return x_BNC + self.drop_path(self.scale2(after(self.mlp(before(x_BNC), grid))))


def _same(x: Tensor) -> Tensor:
    return x
