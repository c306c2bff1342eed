"""Terminator: layers of HyperZ.Z.W at the resolution of the pixels, without residual paths; reconstructed.

    x ← drop(gelu(G(W mixer(x)))) + β,    G = s IN + (1 - s) BN, one share s for each group of channels

The mixer is `hyperzzw`, whose kernels come from coordinates and are multiplied by what they act on; W widens the
channels. Logits are a linear map of the means over all pixels. The kernels are those of one size: a picture of another
one is resampled to it, feature maps back.

The published code is not whole: the network and its group standardisation are missing. Here each layer widens after the
mixer and not in its last matrix, earlier layers' inputs are not read again, and G mixes the two standardisations with a
learned share. `attlas.mechanisms.conv.hyperzzw.slow_neural_loss` is the loss between the kernels of layers.

Source: Zhang, "HyperZ.Z.W Operator Connects Slow-Fast Networks for Full Context Interaction", 2024 (arXiv:2401.17948),
official code hyperevolnet/Terminator (older commits).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attlas.blocks.stage import TokenStage
from attlas.core.errors import BadInput, share
from attlas.core.grid import Grid
from attlas.core.mechanism import Mixer
from attlas.models.backbone import Backbone, Head
from attlas.models.mixers import Mixers, Settings, per_stage, picture_size, settings_per_stage, stage_mixers
from attlas.models.registry import published
from attlas.ops.batch_norm import TokenBatchNorm
from attlas.ops.precision import wide

HEAD_DIM = 32
GROUPS = 12
SMALL: Mapping[str, int] = {
    "global_hidden": 8,
    "spatial_hidden": 8,
    "local_hidden": 4,
    "channel_hidden": 8,
    "interaction_hidden": 8,
}

SIZES: Mapping[str, Mapping[str, Any]] = {
    "terminator_cifar10": {"factors": (4, 3, 2, 2, 2)},
    "terminator_micro": {"factors": (4, 2), "slow": SMALL},
}


class GroupStandardisation(nn.Module):
    """Standardised over the pixels of a picture and over those of a batch, mixed with a share for each group.

    In evaluation the statistics of batches are running ones.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.share = nn.Parameter(torch.zeros(math.gcd(dim, GROUPS), 1))
        self.batch = TokenBatchNorm(dim)

    def forward(self, x_BNC: Tensor) -> Tensor:
        """Mix both."""
        own_BNC = F.instance_norm(wide(x_BNC).mT).mT.to(x_BNC.dtype)
        share_C = self.share.sigmoid().expand(-1, x_BNC.shape[-1] // len(self.share)).flatten()
        return share_C * own_BNC + (1 - share_C) * self.batch(x_BNC)


class SlowFastBlock(nn.Module):
    """A mixer, more channels, standardisation, GELU, dropout of whole channels and one bias.

    Args:
        mixer: of tokens.
        out: channels that come out.
        drop: of channels.
    """

    def __init__(self, mixer: Mixer, out: int, drop: float) -> None:
        super().__init__()
        self.mixer, self.widen = mixer, nn.Linear(mixer.site.dim, out)
        self.norm, self.drop = GroupStandardisation(out), nn.Dropout1d(share("drop", drop))
        self.bias = nn.Parameter(torch.zeros(1))

    def forward(self, x_BNC: Tensor, grid: Grid) -> Tensor:
        """Tokens with `out` channels."""
        y_BNC = F.gelu(self.norm(self.widen(self.mixer(x_BNC, grid=grid))))
        return self.drop(y_BNC.mT).mT + self.bias


class Terminator(Backbone):
    """Blocks at the resolution of the pixels; one feature map per block.

    Args:
        blocks: from maps to maps of the same size.
        dims: channels after each.
        size: of the pictures that the blocks are made for.
        num_classes: K.
        in_chans: channels of the pictures.
    """

    def __init__(
        self,
        blocks: Sequence[TokenStage],
        dims: Sequence[int],
        size: tuple[int, int],
        *,
        num_classes: int,
        in_chans: int,
    ) -> None:
        super().__init__(in_chans, dims, (1,) * len(dims))
        self.stages, self.size = nn.ModuleList(blocks), size
        self.head = Head(dims[-1], num_classes)

    def forward_features(self, image_BCHW: Tensor, maps: list[Tensor] | None = None) -> Tensor:
        """The last map, at the size of the blocks."""
        whole = tuple(image_BCHW.shape[2:])
        x = _resampled(image_BCHW, self.size)
        for stage in self.stages:
            x = stage(x)
            if maps is not None:
                maps.append(_resampled(x, whole))
        return x


def _resampled(x_BCHW: Tensor, size: tuple[int, ...]) -> Tensor:
    if tuple(x_BCHW.shape[2:]) == size:
        return x_BCHW
    return F.interpolate(wide(x_BCHW), size, mode="bilinear", antialias=True).to(x_BCHW.dtype)


@published(
    SIZES,
    title="HyperZ.Z.W Operator Connects Slow-Fast Networks for Full Context Interaction",
    year=2024,
    paper="arXiv:2401.17948",
    reconstruction=True,
)
def terminator(
    *,
    factors: Sequence[int],
    mixer: Mixers = "hyperzzw",
    mixer_settings: Settings = None,
    slow: Mapping[str, int] | None = None,
    drop_path: float = 0.0,
    num_classes: int = 10,
    in_chans: int = 3,
    img_size: int | tuple[int, int] = 32,
) -> Terminator:
    """Terminator with any mechanism.

    Args:
        factors: how many times more channels each block gives than it gets.
        mixer: the mechanism, one or one for each block; it may have heads of 32 channels.
        mixer_settings: of the mechanisms, for all blocks or for each; the global kernel of `hyperzzw` has one layer
            more in the first block.
        slow: settings of `hyperzzw` alone, the sizes of its slow nets.
        drop_path: rate of channels that are dropped behind each block; there is no residual path.
        num_classes: of the head; 0 for features.
        in_chans: channels of the pictures.
        img_size: of the pictures inside, square for `hyperzzw`.
    """
    if not factors or min(factors) < 1:
        raise BadInput(f"factors name the channels of one block at least, each at least 1, got {list(factors)}")
    size, names = picture_size(img_size), per_stage(mixer, len(factors))
    given = settings_per_stage(mixer_settings, len(factors))
    blocks, dims, dim = [], [], in_chans
    for index, (name, factor) in enumerate(zip(names, factors, strict=True)):
        own = {"global_layers": 3 if index == 0 else 2, **(slow or {})} if name == "hyperzzw" else {}
        settings = {**own, **given[index]}
        heads = max(1, dim // HEAD_DIM)
        (each,) = stage_mixers(name, 1, dim, heads, Grid(size), settings, first=index, layers=len(factors))
        blocks.append(TokenStage([SlowFastBlock(each, factor * dim, drop_path)]))
        dim *= factor
        dims.append(dim)
    return Terminator(blocks, dims, size, num_classes=num_classes, in_chans=in_chans)
