"""MAXIM: a U of multi-axis gated MLPs whose skips gate one another, for restoration; and with any other mechanism.

    y = x + mixer(norm x),    z = y + CA(conv(σ(conv(norm y))))                  a block; an MLP in the bottleneck's
    level(x) = u + blocks(u),    u = conv x
    x' = W(x ⊙ g(y)) + x + y',    y' = W(y ⊙ g(x)) + y                           the cross gate; g mixes on two axes
    s_i, t_i = gate([resized e_0, e_1, e_2], up t_{i+1})                         e of encoders, t_3 of the bottleneck
    d_i = level([up d_{i+1}, resized s_2, s_1, s_0])

CA is a factor per channel. Several such U in a row, each reading the picture at three resolutions and giving one at
each; between two of them a picture attends (as in MPRNet), and the later one is gated by the features of the earlier.
`forward` gives the last picture at full size, `every` all of them, which are trained together. The published code
mirrors pictures whose sides do not divide, on both sides, and so does this network.

Source: Tu et al., "MAXIM: Multi-Axis MLP for Image Processing", 2022 (arXiv:2201.02973), official code
google-research/maxim, which for pictures without three channels leaves out one addition of the picture.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attlas.blocks.drop_path import rising
from attlas.blocks.metaformer import MetaFormerBlock
from attlas.blocks.mlp import Mlp
from attlas.blocks.stage import TokenStage
from attlas.core.errors import BadInput
from attlas.core.grid import Grid
from attlas.models.key_maps import linear, rename
from attlas.models.mixers import Mixers, Settings, map_sizes, per_stage, picture_size, settings_per_stage, stage_mixers
from attlas.models.registry import State, published
from attlas.models.restoration import Restorer
from attlas.models.u_shaped import UShaped
from attlas.ops.channel_attention import ChannelAttention, ChannelConvs
from attlas.ops.maps import to_map, to_tokens
from attlas.ops.multi_axis import MultiAxisLinear
from attlas.ops.precision import wide

HEAD_DIM = 32
REDUCTION = 4
LAYER_NORM = partial(nn.LayerNorm, eps=1e-6)
GELU = partial(nn.GELU, approximate="tanh")

SIZES: Mapping[str, Mapping[str, Any]] = {
    **{f"maxim_s{stages}": {"features": 32, "stages": stages} for stages in (1, 2, 3)},
    **{f"maxim_m{stages}": {"features": 64, "stages": stages} for stages in (1, 2, 3)},
    "maxim_micro": {"features": 6, "stages": 1, "scales": 1, "depth": 1, "fine": 4, "coarse": 2, "img_size": 32},
}


class ChannelMlp(nn.Module):
    """CA(MLP(x)), token by token but for the factors of the channels."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.mlp, self.attention = Mlp(dim, dim, activation=GELU), ChannelAttention(dim, dim // REDUCTION)

    def forward(self, x_BNC: Tensor, grid: Grid) -> Tensor:
        """Mix channels."""
        return self.attention(self.mlp(x_BNC))


class SpatialGate(nn.Module):
    """g(x): half the channels mixed across blocks, the other half within them, then all of them together."""

    def __init__(self, dim: int, side: int) -> None:
        super().__init__()
        self.norm, self.in_proj = LAYER_NORM(dim), nn.Linear(dim, 2 * dim)
        self.across, self.within = (MultiAxisLinear((side, side), across) for across in (True, False))
        self.out_proj = nn.Linear(2 * dim, dim)
        for mix in (self.across, self.within):
            nn.init.ones_(mix.bias)

    def forward(self, x_BNC: Tensor, grid: Grid) -> Tensor:
        """The factor of each token's channels."""
        u_BNC, v_BNC = F.gelu(self.in_proj(self.norm(x_BNC)), approximate="tanh").chunk(2, -1)
        return self.out_proj(torch.cat([self.across(u_BNC, grid), self.within(v_BNC, grid)], -1))


class GatedPath(nn.Module):
    """One of the two that gate one another: u = conv x, h = gelu(W norm u), the gate g(h), and the way out."""

    def __init__(self, source: int, dim: int, side: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(source, dim, 1)
        self.norm, self.in_proj = LAYER_NORM(dim), nn.Linear(dim, dim)
        self.gate, self.out_proj = SpatialGate(dim, side), nn.Linear(dim, dim)

    def forward(self, x_BCHW: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """u, h and g(h), all of tokens."""
        u_BNC, grid = to_tokens(self.conv(x_BCHW))
        h_BNC = F.gelu(self.in_proj(self.norm(u_BNC)), approximate="tanh")
        return u_BNC, h_BNC, self.gate(h_BNC, grid)


class CrossGate(nn.Module):
    """Two maps that gate one another.

    Args:
        sources: channels of both.
        dim: channels of both that come out.
        side: of a block, and how many blocks there are on each axis.
        up: whether the second is half as high and wide, and is enlarged first.
    """

    def __init__(self, sources: tuple[int, int], dim: int, side: int, up: bool = False) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(sources[1], dim, 2, 2) if up else nn.Identity()
        self.first, self.second = GatedPath(sources[0], dim, side), GatedPath(dim if up else sources[1], dim, side)

    def forward(self, x_BCHW: Tensor, y_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """Both, gated."""
        u, h, gate = self.first(x_BCHW)
        v, k, back = self.second(self.up(y_BCHW))
        grid = Grid(tuple(x_BCHW.shape[2:]))
        y_BNC = v + self.second.out_proj(k * gate)
        x_BNC = u + self.first.out_proj(h * back) + y_BNC
        return to_map(x_BNC, grid), to_map(y_BNC, grid)


class Level(nn.Module):
    """u + blocks(u), u = conv of the map and of what stands beside it; then gated by an earlier U, if there is one."""

    def __init__(self, source: int, dim: int, blocks: Sequence[nn.Module], gate: CrossGate | None = None) -> None:
        super().__init__()
        self.conv, self.stage, self.gate = nn.Conv2d(source, dim, 1), TokenStage(blocks), gate

    def forward(self, x_BCHW: Tensor, beside: Tensor | None = None, earlier: Tensor | None = None) -> Tensor:
        """A map of the same size."""
        u_BCHW = self.conv(x_BCHW if beside is None else torch.cat([x_BCHW, beside], 1))
        y_BCHW = u_BCHW + self.stage(u_BCHW)
        return y_BCHW if self.gate is None else self.gate(y_BCHW, earlier)[0]


class Resized(nn.Module):
    """Maps of all levels, each resized to one level and projected, one upon the other."""

    def __init__(self, sources: Sequence[int], dim: int) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(source, dim, 1) for source in sources)

    def forward(self, maps: Sequence[Tensor], level: int) -> Tensor:
        """At the size of `maps[level]`."""
        size = tuple(maps[level].shape[2:])
        resized = [each if tuple(each.shape[2:]) == size else _resize(each, size) for each in maps]
        return torch.cat([conv(each) for conv, each in zip(self.convs, resized, strict=True)], 1)


def _resize(x_BCHW: Tensor, size: tuple[int, ...]) -> Tensor:
    return F.interpolate(wide(x_BCHW), size, mode="bilinear", antialias=True).to(x_BCHW.dtype)


class Fuse(nn.Module):
    """Skips: every level gated with the one below, then what each decoder sees of all of them."""

    def __init__(self, dims: Sequence[int], sides: Sequence[int]) -> None:
        super().__init__()
        below = (*dims[1:], dims[-1])
        self.encoded = nn.ModuleList(Resized(dims, dim) for dim in dims)
        self.skipped = nn.ModuleList(Resized(dims[::-1], dim) for dim in dims)
        self.gates = nn.ModuleList(
            CrossGate((len(dims) * dim, other), dim, side, up=True)
            for dim, other, side in zip(dims, below, sides, strict=True)
        )

    def forward(self, encoded: Sequence[Tensor], bottleneck: Tensor) -> list[Tensor]:
        """From the coarsest level up."""
        y, skips = bottleneck, []
        for level in reversed(range(len(encoded))):
            skip, y = self.gates[level](self.encoded[level](encoded, level), y)
            skips.append(skip)
        return [resized(skips, -1 - level) for level, resized in enumerate(self.skipped)]


class Supervised(nn.Module):
    """A picture from a map, and the map attended by that picture; the last U gives the picture alone."""

    def __init__(self, dim: int, chans: int, last: bool) -> None:
        super().__init__()
        self.picture = nn.Conv2d(dim, chans, 3, padding=1)
        self.conv = None if last else nn.Conv2d(dim, dim, 3, padding=1)
        self.attend = None if last else nn.Conv2d(chans, dim, 3, padding=1)

    def forward(self, x_BCHW: Tensor, image_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """The picture and the map."""
        picture_BCHW = self.picture(x_BCHW) + image_BCHW
        if self.conv is None or self.attend is None:
            return picture_BCHW, x_BCHW
        return picture_BCHW, x_BCHW + self.conv(x_BCHW) * self.attend(picture_BCHW).sigmoid()


class StageOfMaxim(nn.Module):
    """One U with its ways in and out.

    Args:
        shape: the U.
        dims, sides: of the levels that read and give pictures.
        chans: channels of pictures.
        first, last: which of the stages it is.
    """

    def __init__(
        self, shape: UShaped, dims: Sequence[int], sides: Sequence[int], chans: int, *, first: bool, last: bool
    ) -> None:
        super().__init__()
        self.inputs = nn.ModuleList(nn.Conv2d(chans, dim, 3, padding=1) for dim in dims)
        self.gates = nn.ModuleList(
            () if first else (CrossGate((dim, dim), dim, side) for dim, side in zip(dims, sides, strict=True))
        )
        self.shape = shape
        self.outputs = nn.ModuleList(Supervised(dim, chans, last) for dim in dims)

    def forward(
        self, images: Sequence[Tensor], earlier: tuple[list[Tensor], list[Tensor]] | None
    ) -> tuple[list[Tensor], tuple[list[Tensor], list[Tensor]]]:
        """Pictures of all scales, and for the next stage attended maps of these and features of all levels."""
        maps = [conv(image) for conv, image in zip(self.inputs, images, strict=True)]
        features: Sequence[Tensor | None] = [None] * len(self.shape.encoders)
        if earlier is not None:
            attended, features = earlier
            maps = [gate(x, y)[0] for gate, x, y in zip(self.gates, maps, attended, strict=True)]
        padded = [*maps, *[None] * (len(features) - len(maps))]
        encoded, decoded = self.shape(maps[0], list(zip(padded, features, strict=True)))
        found = [out(x, image) for out, x, image in zip(self.outputs, decoded, images, strict=False)]
        sums = [a + b for a, b in zip(encoded, decoded, strict=True)]
        return [picture for picture, _ in found], ([attended for _, attended in found], sums)


class MAXIM(Restorer):
    """Stages in a row."""

    def __init__(self, stages: Sequence[StageOfMaxim], *, in_chans: int, multiple: int) -> None:
        super().__init__(in_chans, multiple, centred=True)
        self.stages: Any = nn.ModuleList(stages)

    def every(self, image_BCHW: Tensor) -> list[list[Tensor]]:
        """The pictures of each stage, finest first; sides must divide.

        The coarser ones are wanted to be the picture at every second, fourth ... pixel.
        """
        side = self.multiple
        if image_BCHW.shape[2] % side or image_BCHW.shape[3] % side:
            raise BadInput(f"sides are multiples of {side}, got {tuple(image_BCHW.shape)}; `mirrored` makes them so")
        scales = len(self.stages[0].inputs)
        steps = [2**scale for scale in range(scales)]
        images = [image_BCHW[:, :, step // 2 :: step, step // 2 :: step] for step in steps]
        pictures, earlier = [], None
        for stage in self.stages:
            found, earlier = stage(images, earlier)
            pictures.append(found)
        return pictures

    def restore(self, image_BCHW: Tensor) -> Tensor:
        """The last picture at full size."""
        return self.every(image_BCHW)[-1][0]


def from_official(state: State, model: nn.Module) -> State:
    """The names of google-research/maxim, joined by "/", with the arrays that stand under opt/target as tensors."""
    turned = {}
    for key, value in state.items():
        if key.endswith("/kernel"):
            axes = (1, 0) if value.ndim == 2 else (3, 2, 0, 1)
            value = value.flip(0, 1).permute(2, 3, 0, 1) if "ConvTranspose" in key else value.permute(axes)
        turned[key] = value
    turned = {_resized_name(key): value for key, value in turned.items()}
    return linear(rename(turned, RULES), r"attention\.(squeeze|excite)")


def _resized_name(key: str) -> str:
    """Projections of resized maps are counted through, from the coarsest level of the skips to the finest."""
    number, found, rest = key.removeprefix("UpSampleRatio_").partition("/Conv_0/")
    if not found or not number.isdigit():
        return key
    stage, place = divmod(int(number), 18)
    kind, place = divmod(place, 9)
    level, source = divmod(place, 3)
    return f"stages.{stage}.shape.fuse.{('encoded', 'skipped')[kind]}.{2 - level}.convs.{source}/{rest}"


RULES = (
    (r"/(kernel|scale)$", "/weight"),
    (r"^stage_(\d+)_input_conv_", r"stages.\1.inputs."),
    (r"^stage_(\d+)_input_fuse_sam_", r"stages.\1.gates."),
    (r"^stage_(\d+)_output_conv_(\d+)", r"stages.\1.outputs.\2.picture"),
    (r"^stage_(\d+)_supervised_attention_module_", r"stages.\1.outputs."),
    (r"(outputs\.\d)/Conv_0", r"\1.conv"),
    (r"(outputs\.\d)/Conv_1", r"\1.picture"),
    (r"(outputs\.\d)/Conv_2", r"\1.attend"),
    (r"^stage_(\d+)_encoder_block_(\d+)/Conv_1", r"stages.\1.shape.downs.\2"),
    (r"^stage_(\d+)_encoder_block_", r"stages.\1.shape.encoders."),
    (r"^stage_(\d+)_global_block_", r"stages.\1.shape.bottleneck."),
    (r"^stage_(\d+)_decoder_block_(\d+)/ConvTranspose_0", r"stages.\1.shape.ups.\2"),
    (r"^stage_(\d+)_decoder_block_(\d+)/UNetEncoderBlock_0", r"stages.\1.shape.decoders.\2"),
    (r"^stage_(\d+)_cross_gating_block_", r"stages.\1.shape.fuse.gates."),
    (r"/cross_gating_block/", ".gate/"),
    (r"(encoders|decoders)(\.\d)/Conv_0", r"\1\2.conv"),
    (r"/input_proj/", ".conv/"),
    (r"/channel_attention_block_1_?(\d+)/LayerNorm", r".stage.blocks.\1.norm2"),
    (r"/channel_attention_block_1_?(\d+)/", r".stage.blocks.\1.mlp/"),
    (r"/channel_mixing/Dense_0", ".mlp.fc1"),
    (r"/channel_mixing/Dense_1", ".mlp.fc2"),
    (r"/channel_attention/Conv_0", ".attention.squeeze"),
    (r"/channel_attention/Conv_1", ".attention.excite"),
    (r"/SplitHeadMultiAxisGmlpLayer_(\d+)/LayerNorm_in", r".stage.blocks.\1.norm1"),
    (r"/SplitHeadMultiAxisGmlpLayer_(\d+)/", r".stage.blocks.\1.mixer/"),
    (r"/GridGmlpLayer/", ".across/"),
    (r"/BlockGmlpLayer/", ".within/"),
    (r"/(?:Grid|Block)GatingUnit/intermediate_layernorm", ".gate_norm"),
    (r"/(?:Grid|Block)GatingUnit/Dense_0", ".mix"),
    (r"/SplitHeadMultiAxisGating_x/", ".first.gate/"),
    (r"/SplitHeadMultiAxisGating_y/", ".second.gate/"),
    (r"gate/Dense_0", "gate.across"),
    (r"gate/Dense_1", "gate.within"),
    (r"/ConvTranspose_0", ".up"),
    (r"/Conv_0", ".first.conv"),
    (r"/Conv_1", ".second.conv"),
    (r"/(LayerNorm|in_project|out_project)_x", r".first.\1"),
    (r"/(LayerNorm|in_project|out_project)_y", r".second.\1"),
    (r"[/.]LayerNorm(_in)?/", ".norm/"),
    (r"[/.](in|out)_project/", r".\1_proj/"),
    (r"/", "."),
)


@published(
    SIZES,
    title="MAXIM: Multi-Axis MLP for Image Processing",
    year=2022,
    paper="arXiv:2201.02973",
    task="restoration",
    key_maps={"official": from_official},
)
def maxim(
    *,
    features: int,
    stages: int,
    scales: int = 3,
    depth: int = 2,
    fine: int = 16,
    coarse: int = 8,
    mixer: Mixers = "maxim",
    mixer_settings: Settings = None,
    drop_path: float = 0.0,
    in_chans: int = 3,
    img_size: int | tuple[int, int] = 256,
) -> MAXIM:
    """A U of any mechanism with the cross gates of MAXIM: three levels and a bottleneck.

    Args:
        features: channels of the finest level; twice and four times as many below.
        stages: how many U.
        scales: resolutions that go in and out, 1 to 3.
        depth: blocks of each level, and of each of the two bottlenecks.
        fine, coarse: sides of blocks, and blocks on each axis, in the two finer levels and further below.
        mixer: the mechanism, one for all or one for each of the three levels and the bottleneck; they may have heads of
            32 channels.
        mixer_settings: of the mechanisms, for all or for each; sides of `maxim` are as above where they say nothing.
        drop_path: rate of every block's last in a U.
        in_chans: channels of the pictures.
        img_size: that it is trained on, for mechanisms that depend on it.
    """
    if not 1 <= scales <= 3 or stages < 1:
        raise BadInput(f"there is a stage at least and pictures have 1 to 3 scales, got {stages} and {scales}")
    dims = (features, 2 * features, 4 * features)
    sides = (fine, fine, coarse, coarse)
    multiple = math.lcm(*(side * 2**level for level, side in enumerate(sides)))
    names, given = per_stage(mixer, 4), settings_per_stage(mixer_settings, 4)
    height, width = (side + -side % multiple for side in picture_size(img_size))
    grids = [Grid(size) for size in map_sizes((height, width), (1, 2, 4, 8))]
    rates = rising(drop_path, [depth] * 8)

    def blocks(level: int, place: int) -> list[nn.Module]:
        name, dim = names[level], dims[min(level, 2)]
        own = {"cells": sides[level], "block": sides[level]} if name == "maxim" else {}
        settings = {**own, **given[level]}
        heads = max(1, dim // HEAD_DIM)
        mixers = stage_mixers(name, depth, dim, heads, grids[level], settings, first=place * depth, layers=8 * depth)
        return [
            MetaFormerBlock(each, _channels(level, dim), norm=LAYER_NORM, drop_path=rate)
            for each, rate in zip(mixers, rates[place], strict=True)
        ]

    def shape(first: bool) -> UShaped:
        encoders = []
        for level, dim in enumerate(dims):
            source = dims[max(level - 1, 0)] + (dim if level < scales else 0)
            gate = None if first else CrossGate((dim, dim), dim, sides[level])
            encoders.append(Level(source, dim, blocks(level, level), gate))
        below = (*dims[1:], dims[-1])
        return UShaped(
            encoders,
            [nn.Conv2d(dim, dim, 4, 2, 1) for dim in dims],
            nn.Sequential(*(Level(dims[-1], dims[-1], blocks(3, 3 + each)) for each in range(2))),
            [nn.ConvTranspose2d(other, dim, 2, 2) for dim, other in zip(dims, below, strict=True)],
            [Level(4 * dim, dim, blocks(level, 7 - level)) for level, dim in enumerate(dims)],
            Fuse(dims, sides[:3]),
        )

    made = [
        StageOfMaxim(
            shape(stage == 0), dims[:scales], sides[:scales], in_chans, first=stage == 0, last=stage == stages - 1
        )
        for stage in range(stages)
    ]
    return MAXIM(made, in_chans=in_chans, multiple=multiple)


def _channels(level: int, dim: int) -> nn.Module:
    """What follows a mixer: convolutions in the levels, an MLP in the bottleneck."""
    return ChannelMlp(dim) if level == 3 else ChannelConvs(dim, dim, dim // REDUCTION, partial(nn.LeakyReLU, 0.2))
