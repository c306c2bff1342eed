"""CARE Transformer: few channels see far, few see near, a memory waits, and two steps let them meet.

    x = [mem | a | c₁ | c₂]
    f = [far(a) | DW₃(c₁) | DW₇(c₂)],    f ← f + interaction₁(f),    y = x + γ ⊙ interaction₂([mem | f])

In the last two stages far is linear attention, see the mechanism `care`; in the first two, where maps are large, it is
a column and a row of a convolution, DW_{11 x 1}(a) + DW_{1 x 11}(a). The last block of all stops in the middle of its
second interaction: its hidden channels are what the heads read. A stem of 4 x 4 patches and a batch norm; a batch norm
and 2 x 2 patches between the stages. Of two heads, mean over places, GELU, norm, linear map, one is for a teacher's
labels in training; logits are their mean.

Source: Zhou et al., "CARE Transformer: Mobile-Friendly Linear Visual Transformer via Decoupled Dual Interaction", 2024
(arXiv:2411.16170), official code zhouyuan888888/CARE-Transformer, which in training gives both heads' logits, here
`net.head.both(net.forward_features(image))`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attlas.blocks.drop_path import DropPath, rising
from attlas.blocks.embed import Downsample
from attlas.blocks.layer_scale import LayerScale
from attlas.blocks.stage import TokenStage
from attlas.core.grid import Grid
from attlas.core.mechanism import Mixer
from attlas.mechanisms.linear.care import CARE, Interaction
from attlas.models.backbone import classifier
from attlas.models.key_maps import linear, rename
from attlas.models.mixers import sizes_after, stage_mixers
from attlas.models.pyramid import Pyramid
from attlas.models.registry import State, published
from attlas.ops.batch_norm import TokenBatchNorm
from attlas.ops.grid_conv import depthwise, grid_convolution

PATCHES = ((4, 4, 0), (2, 2, 0), (2, 2, 0), (2, 2, 0))
"""Kernel, stride and padding of the stem and of each step between two stages."""
STRIP = 11
SIZES: Mapping[str, Mapping[str, Any]] = {
    "s0": {"depths": (2, 4, 8, 4), "dims": (32, 64, 128, 256), "ratios": ((2, 2), (2, 4), (4, 4), (4, 4))},
    "s1": {"depths": (3, 6, 10, 6), "dims": (32, 64, 128, 256), "ratios": ((2, 4), (2, 4), (4, 4), (4, 4))},
    "s2": {"depths": (3, 6, 10, 6), "dims": (32, 64, 192, 384), "ratios": ((4, 4), (4, 4), (4, 4), (4, 4))},
    "micro": {
        "depths": (1, 1, 1, 2),
        "dims": (16, 16, 32, 64),
        "ratios": ((2, 2), (2, 2), (2, 2), (2, 2)),
        "head_dims": (8, 8),
        "img_size": 64,
    },
}


class Strips(nn.Module):
    """The token mixer of the first stages: convolutions in all three groups, then both interactions."""

    def __init__(self, dim: int, ratios: tuple[int, int]) -> None:
        super().__init__()
        self.group = group = dim // 4
        self.column = nn.Conv2d(group, group, (STRIP, 1), groups=group)
        self.row = nn.Conv2d(group, group, (1, STRIP), groups=group)
        self.small, self.large = depthwise(group, 3, 2), depthwise(group, 7, 2)
        self.local_global = Interaction(3 * group, ratios[0] * 3 * group, 0.0)
        self.memory = Interaction(4 * group, ratios[1] * 4 * group, 0.0)

    def forward(self, x_BNC: Tensor, *, grid: Grid) -> Tensor:
        """As the mechanism `care`, without attention."""
        memory, far, near, middle = x_BNC.split(self.group, -1)
        convs = ((far, self.column), (far, self.row), (near, self.small), (middle, self.large))
        column, row, small, large = (grid_convolution(z, conv.weight, conv.bias, grid) for z, conv in convs)
        mixed = self.local_global(torch.cat([column + row, small, large], -1), grid)
        return self.memory(torch.cat([memory, mixed], -1), grid)


class CareBlock(nn.Module):
    """x + γ ⊙ mixer(x), without a norm."""

    def __init__(self, mixer: nn.Module, dim: int, drop_path: float, scale: float = 1e-6) -> None:
        super().__init__()
        self.mixer = mixer
        self.scale = LayerScale(dim, scale)
        self.drop_path = DropPath(drop_path)

    def forward(self, x_BNC: Tensor, grid: Grid) -> Tensor:
        """Mix tokens and channels."""
        return x_BNC + self.drop_path(self.scale(self.mixer(x_BNC, grid=grid)))


class Unmixed(nn.Module):
    """In place of an interaction that is left out."""

    def forward(self, z: Tensor, *_: object) -> Tensor:
        """z."""
        return z

    oracle = forward

    def flops(self, grid: Grid) -> tuple[int, int]:
        """None."""
        return 0, 0


class LastBlock(nn.Module):
    """The first interaction, then the first half of the second, without a residual path."""

    def __init__(self, mixer: Mixer, ratio: int, drop_path: float) -> None:
        super().__init__()
        if isinstance(mixer, CARE):
            mixer.memory = Unmixed()  # type: ignore[assignment]
        self.mixer = mixer
        dim = mixer.site.dim
        self.norm = TokenBatchNorm(dim)
        self.widen = nn.Linear(dim, ratio * dim)
        self.conv = depthwise(ratio * dim, 3, 2)
        self.drop_path = DropPath(drop_path)

    def forward(self, x_BNC: Tensor, grid: Grid) -> Tensor:
        """Hidden channels (B, N, ratio C)."""
        x_BNC = self.mixer(x_BNC, grid=grid)
        h_BNF = F.gelu(self.widen(self.norm(x_BNC)))
        return self.drop_path(grid_convolution(h_BNF, self.conv.weight, self.conv.bias, grid))


class CareHead(nn.Module):
    """The mean of two classifiers, of which one learns from labels and one from a teacher."""

    def __init__(self, dim: int, num_classes: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(dim, eps=1e-6) for _ in range(2))
        self.classifiers = nn.ModuleList(classifier(dim, num_classes) for _ in range(2))

    def both(self, x_BCHW: Tensor) -> list[Tensor]:
        """The logits of the classifier and of the teacher's."""
        x_BC = F.gelu(x_BCHW.mean((2, 3)))
        return [read(norm(x_BC)) for norm, read in zip(self.norms, self.classifiers, strict=True)]

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Logits (B, K)."""
        first, second = self.both(x_BCHW)
        return (first + second) / 2


def from_official(state: State, model: nn.Module) -> State:
    """The names of zhouyuan888888/CARE-Transformer."""
    assert isinstance(model, Pyramid)
    *_, stage = (module for module in model.stages if isinstance(module, TokenStage))
    last = f"stages.{len(model.stages) - 1}.blocks.{len(stage.blocks) - 1}"
    return rename(
        linear(state, r"(qk|fc\d)\.weight"),
        (
            (r"^stem\.0\.", "downsamples.0.conv."),
            (r"^stem\.1\.", "downsamples.0.after."),
            (r"^stages\.(\d)\.downsample\.0\.", r"downsamples.\1.before."),
            (r"^stages\.(\d)\.downsample\.1\.", r"downsamples.\1.conv."),
            (r"\.token_mixer\.dwconvatt_1\.", ".mixer.column."),
            (r"\.token_mixer\.dwconvatt_2\.", ".mixer.row."),
            (r"\.token_mixer\.dwconv1\.", ".mixer.small."),
            (r"\.token_mixer\.dwconv2\.", ".mixer.large."),
            (r"\.token_mixer\.qk\.", ".mixer.qk_proj."),
            (rf"^{last}\.inter_layer\.inter2_norm\.", f"{last}.norm."),
            (rf"^{last}\.inter_layer\.inter2_fc1\.", f"{last}.widen."),
            (rf"^{last}\.inter_layer\.inter2_conv\.", f"{last}.conv."),
            (r"\.inter_layer\.inter1_", ".mixer.local_global."),
            (r"\.inter_layer\.inter2_", ".mixer.memory."),
            (r"\.fc1\.", ".widen."),
            (r"\.fc2\.", ".narrow."),
            (r"\.gamma$", ".scale.weight"),
            (r"^head\.norm\.", "head.norms.0."),
            (r"^head\.fc\.", "head.classifiers.0."),
            (r"^dist_head\.norm\.", "head.norms.1."),
            (r"^dist_head\.fc\.", "head.classifiers.1."),
        ),
    )


@published(
    {f"care_{size}": settings for size, settings in SIZES.items()},
    title="CARE Transformer: Mobile-Friendly Linear Visual Transformer via Decoupled Dual Interaction",
    year=2024,
    paper="arXiv:2411.16170",
    key_maps={"official": from_official},
)
def care(
    *,
    depths: Sequence[int],
    dims: Sequence[int],
    ratios: Sequence[tuple[int, int]],
    head_dims: Sequence[int] = (16, 32),
    mixer: str = "care",
    mixer_settings: Mapping[str, Any] | None = None,
    drop_path: float = 0.1,
    num_classes: int = 1000,
    in_chans: int = 3,
    img_size: int | tuple[int, int] = 224,
) -> Pyramid:
    """The network, with its own or any other mechanism in the stages with attention.

    Args:
        depths, dims: blocks and channels of each stage.
        ratios: how much wider the two interactions of each stage are.
        head_dims: channels of a head in the last stages, which have attention.
        mixer: the mechanism of those.
        mixer_settings: of the mechanism.
        drop_path: rate of the last block.
        num_classes: of the head; 0 for features.
        in_chans: channels of the pictures.
        img_size: that it is trained on, for mechanisms that depend on it.
    """
    rates, sizes = rising(drop_path, depths), sizes_after(img_size, PATCHES[: len(dims)])
    shallow, batch_norm = len(dims) - len(head_dims), nn.BatchNorm2d
    downsamples = [Downsample(in_chans, dims[0], 4, 4, after=batch_norm)]
    downsamples += [Downsample(dims[i - 1], dims[i], 2, 2, before=batch_norm) for i in range(1, len(dims))]
    stages = []
    for i, dim in enumerate(dims):
        block = partial(CareBlock, dim=dim)
        if i < shallow:
            stages.append(TokenStage(block(Strips(dim, ratios[i]), drop_path=rate) for rate in rates[i]))
            continue
        own = {"ratios": ratios[i]} if mixer == "care" else {}
        settings = {**own, **(mixer_settings or {})}
        heads = max(1, dim // 4 // head_dims[i - shallow])
        mixers = stage_mixers(mixer, depths[i], dim, heads, Grid(sizes[i]), settings)
        blocks: list[nn.Module] = [block(each, drop_path=rate) for each, rate in zip(mixers, rates[i], strict=True)]
        if i == len(dims) - 1:
            blocks[-1] = LastBlock(mixers[-1], ratios[i][1], rates[i][-1])
        stages.append(TokenStage(blocks))
    width = ratios[-1][1] * dims[-1]
    channels = (*dims[:-1], width)
    return Pyramid(downsamples, stages, CareHead(width, num_classes), in_chans=in_chans, channels=channels)
