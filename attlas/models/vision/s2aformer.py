"""S2AFormer: a pyramid of strip self-attention and local interaction.

    a = x + DW₃ x,    b = a + mixer(LN a),    c = b + DW₃ GELU(BN(DW₃ LN b)),    y = c + MLP(LN c)

A stem of three 3 x 3 convolutions, of which the first has stride 2; every stage begins with a 3 x 3 convolution of
stride 2 and has strides of 4, 8, 16 and 32. Keys and values are r times coarser on either axis, r = 8, 4, 2, 1.

Source: Xu et al., "S2AFormer: Strip Self-Attention for Efficient Vision Transformer", 2025 (arXiv:2505.22195).
Reconstruction: no official code is known. The order of the parts is that of descriptions of the paper; norms, the
inside of the local interaction, r and the MLP's width are assumed, and since depths and widths of the published sizes
are not known here either, there is only one small network. Others have their own `depths`, `dims` and `heads`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from attlas.blocks.conv_stem import ConvStem
from attlas.blocks.drop_path import DropPath
from attlas.blocks.embed import Downsample
from attlas.blocks.metaformer import MetaFormerBlock
from attlas.blocks.mlp import Mlp
from attlas.blocks.norms import MapLayerNorm
from attlas.core.grid import Grid
from attlas.core.mechanism import Mixer
from attlas.models.backbone import Head
from attlas.models.mixers import Mixers, Settings, map_sizes, token_stages
from attlas.models.pyramid import Pyramid
from attlas.models.registry import published
from attlas.ops.batch_norm import TokenBatchNorm
from attlas.ops.grid_conv import depthwise, grid_convolution

STRIDES = (4, 8, 16, 32)
REDUCTIONS = (8, 4, 2, 1)
MICRO = {"depths": (1, 1, 2, 1), "dims": (16, 32, 48, 64), "heads": (1, 2, 3, 4), "img_size": 64}


class LocalInteraction(nn.Module):
    """DW₃ GELU(BN(DW₃ x)): each channel over the neighbouring places, twice."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.first, self.second = depthwise(dim, 3, 2), depthwise(dim, 3, 2)
        self.norm = TokenBatchNorm(dim)

    def forward(self, x_BNC: Tensor, grid: Grid) -> Tensor:
        """Mix places."""
        h_BNC = F.gelu(self.norm(grid_convolution(x_BNC, self.first.weight, self.first.bias, grid)))
        return grid_convolution(h_BNC, self.second.weight, self.second.bias, grid)


class HybridBlock(nn.Module):
    """Position, mixer, local interaction, MLP."""

    def __init__(self, mixer: Mixer, drop_path: float) -> None:
        super().__init__()
        dim = mixer.site.dim
        self.mix = MetaFormerBlock(mixer, None, drop_path=drop_path, positions=(True, False))
        self.local_norm, self.local = nn.LayerNorm(dim), LocalInteraction(dim)
        self.mlp_norm, self.mlp = nn.LayerNorm(dim), Mlp(dim, 4 * dim)
        self.drop_path = DropPath(drop_path)

    def forward(self, x_BNC: Tensor, grid: Grid) -> Tensor:
        """Far, near, then channels."""
        x_BNC = self.mix(x_BNC, grid)
        x_BNC = x_BNC + self.drop_path(self.local(self.local_norm(x_BNC), grid))
        return x_BNC + self.drop_path(self.mlp(self.mlp_norm(x_BNC), grid))


@published(
    {"s2aformer_micro": MICRO},
    title="S2AFormer: Strip Self-Attention for Efficient Vision Transformer",
    year=2025,
    paper="arXiv:2505.22195",
    reconstruction=True,
)
def s2aformer(
    *,
    depths: Sequence[int],
    dims: Sequence[int],
    heads: Sequence[int],
    mixer: Mixers = "s2aformer",
    mixer_settings: Settings = None,
    drop_path: float = 0.0,
    num_classes: int = 1000,
    in_chans: int = 3,
    img_size: int | tuple[int, int] = 224,
) -> Pyramid:
    """The network, with its own or any other mechanism, one for all stages or one for each.

    Args:
        depths, dims, heads: blocks, channels and heads of each stage.
        mixer: the mechanism of each stage.
        mixer_settings: of the mechanisms, for all stages or for each.
        drop_path: rate of the last block.
        num_classes: of the head; 0 for features.
        in_chans: channels of the pictures.
        img_size: that it is trained on, for mechanisms that depend on it.
    """
    stages = token_stages(
        mixer,
        depths,
        dims,
        heads,
        map_sizes(img_size, STRIDES[: len(depths)]),
        HybridBlock,
        settings=mixer_settings,
        own=lambda i, name: {"reduction": REDUCTIONS[i]} if name == "s2aformer" else {},
        drop_path=drop_path,
    )
    downsamples = []
    for i, dim in enumerate(dims):
        step: nn.Module = Downsample(dims[max(0, i - 1)], dim, 3, 2, after=MapLayerNorm)
        if i == 0:
            step = nn.Sequential(ConvStem(in_chans, (dim,) * 3, (2, 1, 1)), nn.GELU(), step)
        downsamples.append(step)
    head = Head(dims[-1], num_classes, before=MapLayerNorm)
    return Pyramid(downsamples, stages, head, in_chans=in_chans, channels=dims, strides=STRIDES)
