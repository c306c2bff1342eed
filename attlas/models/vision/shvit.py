"""SHViT: three stages at strides of 16, 32 and 64, the last two with single-head attention on a part of the channels.

    x ← x + BN(DWConv₃ x),    x ← x + mixer(x),    x ← x + BN(W₂ ReLU(BN(W₁ x)))

There are no norms in front of the branches and no positions; BN follows every convolution, with a weight of 0 at the
start where it ends a branch, so that a block begins as the identity. The stem is four 3 x 3 convolutions of stride 2.
Between the stages stand a depthwise convolution and an MLP, then an inverted bottleneck of stride 2 with channel
attention, then the first two again. The first stage has no mixer. `attlas.blocks.conv_norm.fuse` makes every
convolution one with its BN; the two norms inside a mixer stay.

Source: Yun and Ro, "SHViT: Single-Head Vision Transformer with Memory Efficient Macro Design", 2024
(arXiv:2401.16456), official code ysj9909/SHViT. Drop path, which it does not have, is on mixers and MLPs. With another
mechanism inside, heads have 16 channels where it has heads and the dim divides.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from attlas.blocks.conv_norm import ConvNorm, Residual
from attlas.blocks.drop_path import DropPath, rising
from attlas.blocks.stage import Stage
from attlas.core.grid import Grid
from attlas.core.mechanism import Mixer
from attlas.mechanisms.softmax.shvit import SHViT
from attlas.models.backbone import Head, start_published
from attlas.models.key_maps import linear, rename
from attlas.models.mixers import Mixers, Settings, map_sizes, per_stage, settings_per_stage, stage_mixers
from attlas.models.pyramid import Pyramid
from attlas.models.registry import State, published
from attlas.models.stages import check_stages
from attlas.ops.channel_attention import MapChannelAttention
from attlas.ops.maps import to_map, to_tokens

STRIDES = (16, 32, 64)
HEAD_DIM = 16

SIZES: Mapping[str, Mapping[str, Any]] = {
    "s1": {"depths": (2, 4, 5), "dims": (128, 224, 320), "attended": (0, 48, 68)},
    "s2": {"depths": (2, 4, 5), "dims": (128, 308, 448), "attended": (0, 66, 96)},
    "s3": {"depths": (3, 5, 5), "dims": (192, 352, 448), "attended": (0, 75, 96)},
    "s4": {"depths": (4, 7, 6), "dims": (224, 336, 448), "attended": (0, 72, 96), "img_size": 256},
    "micro": {"depths": (1, 1, 1), "dims": (16, 32, 48), "attended": (0, 8, 10), "img_size": 64},
}


def mlp(dim: int) -> nn.Sequential:
    """BN(W₂ ReLU(BN(W₁ x))) on maps, twice as wide inside."""
    return nn.Sequential(ConvNorm(dim, 2 * dim), nn.ReLU(), ConvNorm(2 * dim, dim, start=0))


class Block(nn.Module):
    """A depthwise convolution, a mixer and an MLP, each beside a residual path.

    Args:
        dim: channels.
        mixer: of tokens; None for a block without.
        drop_path: the share of pictures for which mixer and MLP are dropped in training.
    """

    def __init__(self, dim: int, mixer: Mixer | None, drop_path: float = 0.0) -> None:
        super().__init__()
        self.conv = ConvNorm(dim, dim, 3, groups=dim, start=0)
        self.mixer = mixer
        if isinstance(mixer, SHViT):
            nn.init.zeros_(mixer.out_norm.weight)
        self.mlp = mlp(dim)
        self.drop_path = DropPath(drop_path)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Neighbours, tokens, channels."""
        x = x_BCHW + self.conv(x_BCHW)
        if self.mixer is not None:
            x_BNC, grid = to_tokens(x)
            x = x + self.drop_path(to_map(self.mixer(x_BNC, grid=grid), grid))
        return x + self.drop_path(self.mlp(x))


def between(dim: int, out: int) -> nn.Sequential:
    """From one stage to the next, half the sides."""
    wide = 4 * dim
    return nn.Sequential(
        Residual(ConvNorm(dim, dim, 3, groups=dim)),
        Residual(mlp(dim)),
        nn.Sequential(
            ConvNorm(dim, wide),
            nn.ReLU(),
            ConvNorm(wide, wide, 3, 2, groups=wide),
            nn.ReLU(),
            MapChannelAttention(wide, max(8, (dim + 4) // 8 * 8)),
            ConvNorm(wide, out),
        ),
        Residual(ConvNorm(out, out, 3, groups=out)),
        Residual(mlp(out)),
    )


def from_timm(state: State, model: nn.Module) -> State:
    """The names of timm."""
    return rename(
        linear(state, r"(se\.fc\d|mixer\.m\.(qkv|proj\.1)\.c)\.weight"),
        (
            (r"^patch_embed\.", "downsamples.0."),
            (r"^stages\.(\d)\.downsample\.", r"downsamples.\1."),
            (r"^(downsamples\.\d\.2)\.conv1\.", r"\1.0."),
            (r"^(downsamples\.\d\.2)\.conv2\.", r"\1.2."),
            (r"^(downsamples\.\d\.2)\.se\.fc1\.", r"\1.4.squeeze."),
            (r"^(downsamples\.\d\.2)\.se\.fc2\.", r"\1.4.excite."),
            (r"^(downsamples\.\d\.2)\.conv3\.", r"\1.5."),
            (r"\.mixer\.m\.pre_norm\.", ".mixer.norm."),
            (r"\.mixer\.m\.qkv\.c\.", ".mixer.qkv_proj."),
            (r"\.mixer\.m\.qkv\.bn\.", ".mixer.qkv_norm."),
            (r"\.mixer\.m\.proj\.1\.c\.", ".mixer.out_proj."),
            (r"\.mixer\.m\.proj\.1\.bn\.", ".mixer.out_norm."),
            (r"\.conv\.m\.", ".conv."),
            (r"\.ffn\.m\.pw1\.", ".mlp.0."),
            (r"\.ffn\.m\.pw2\.", ".mlp.2."),
            (r"\.m\.pw1\.", ".module.0."),
            (r"\.m\.pw2\.", ".module.2."),
            (r"\.m\.", ".module."),
            (r"^head\.bn\.", "head.after."),
            (r"^head\.l\.", "head.classifier."),
            (r"\.c\.weight$", ".conv.weight"),
            (r"\.bn\.", ".norm."),
        ),
    )


def from_official(state: State, model: nn.Module) -> State:
    """The names of ysj9909/SHViT, whose stages begin with three entries that lead to them."""
    rules = []
    for stage in (1, 2):
        before = rf"^blocks{stage + 1}\."
        for old, new in ((r"0\.0", 0), (r"0\.1", 1), ("1", 2), (r"2\.0", 3), (r"2\.1", 4)):
            rules.append((rf"{before}{old}\.", f"stages.{stage}.downsample.{new}."))
        depth = len(model.stages[stage].blocks)  # type: ignore[index,union-attr]
        rules += [(rf"{before}{block + 3}\.", f"stages.{stage}.blocks.{block}.") for block in range(depth)]
    return from_timm(rename(state, [(r"^blocks1\.", "stages.0.blocks."), *rules]), model)


@published(
    {f"shvit_{size}": settings for size, settings in SIZES.items()},
    title="SHViT: Single-Head Vision Transformer with Memory Efficient Macro Design",
    year=2024,
    paper="arXiv:2401.16456",
    key_maps={"timm": from_timm, "official": from_official},
)
def shvit(
    *,
    depths: Sequence[int],
    dims: Sequence[int],
    attended: Sequence[int],
    mixer: Mixers = "shvit",
    mixer_settings: Settings = None,
    drop_path: float = 0.0,
    num_classes: int = 1000,
    in_chans: int = 3,
    img_size: int | tuple[int, int] = 224,
) -> Pyramid:
    """The network.

    Args:
        depths, dims: blocks and channels of each stage.
        attended: channels of each stage that attend; 0 for a stage without mixers.
        mixer: the mechanism, one for all stages with mixers or one for each of these.
        mixer_settings: of the mechanisms, for all these stages or for each.
        drop_path: rate of the last block.
        num_classes: of the head; 0 for features.
        in_chans: channels of the pictures.
        img_size: that it is trained on, for mechanisms that depend on it.
    """
    check_stages(most=3, depths=depths, dims=dims, attended=attended)
    mixed = sum(part > 0 for part in attended)
    names, given = iter(per_stage(mixer, mixed)), iter(settings_per_stage(mixer_settings, mixed))
    rates, first = rising(drop_path, depths), dims[0]
    widths = (in_chans, first // 8, first // 4, first // 2, first)
    stem: list[nn.Module] = []
    for dim, out in itertools.pairwise(widths):
        stem += [ConvNorm(dim, out, 3, 2), nn.ReLU()]
    downsamples = [nn.Sequential(*stem[:-1]), *(between(dims[i - 1], dims[i]) for i in range(1, len(dims)))]
    stages = []
    for i, size in enumerate(map_sizes(img_size, STRIDES[: len(dims)])):
        mixers: Sequence[Mixer | None] = [None] * depths[i]
        if attended[i]:
            name = next(names)
            heads = dims[i] // HEAD_DIM if dims[i] % HEAD_DIM == 0 else 1
            settings = {**({"attended": attended[i]} if name == "shvit" else {}), **next(given)}
            mixers = stage_mixers(name, depths[i], dims[i], heads, Grid(size), settings)
        stages.append(Stage(Block(dims[i], each, rate) for each, rate in zip(mixers, rates[i], strict=True)))
    head = Head(dims[-1], num_classes, after=nn.BatchNorm1d)
    start_published(head)
    return Pyramid(downsamples, stages, head, in_chans=in_chans, channels=dims, strides=STRIDES)
